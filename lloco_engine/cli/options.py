"""Options that several commands share, and how ``key=value`` is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from lloco_engine.cli.filters import HELP, TEXT_KEYS, parse_filters, value_of
from lloco_engine.config import ReadConfig
from lloco_engine.errors import ConfigError
from lloco_engine.flags import AsJSON, Device, Options
from lloco_engine.types import MetadataValue

if TYPE_CHECKING:
    from lloco_engine.cluster import RayCluster

__all__ = [
    "Adapter",
    "AsJSON",
    "Cluster",
    "CompressorName",
    "CompressorSettings",
    "Decoder",
    "Device",
    "Embedder",
    "FilterTerms",
    "Models",
    "RayCommand",
    "StoreDir",
    "Tenant",
    "parse_filters",
    "parse_limits",
    "parse_metadata",
    "parse_settings",
]

_ADDRESS = re.compile(r"auto|local|(?:ray://)?[^/\s]+:\d+")  # of a Ray cluster

StoreDir = Annotated[
    Path, typer.Option("--store", envvar="LLOCO_STORE", metavar="DIR", help="Folder of the store.", show_default=True)
]
Decoder = Annotated[
    str | None,
    typer.Option(
        "--decoder",
        envvar="LLOCO_DECODER",
        metavar="NAME",
        help="'embedded', a local folder, a hub id (owner/model, owner/model@revision) or a GGUF file. Default: "
        "the store's own, 'embedded' for a new one.",
    ),
]
Embedder = Annotated[
    str | None, typer.Option("--embedder", metavar="NAME", help="As --decoder, for the search embedder.")
]
Tenant = Annotated[
    str, typer.Option("--tenant", metavar="NAME", help="Whose documents; tenants never see each other's.")
]
CompressorName = Annotated[
    str | None,
    typer.Option(
        "--compressor",
        metavar="NAME",
        help="attention_matching (compact KV), autocompressor (summary embeddings) or uncompressed. Default: the "
        "store's own, attention_matching for a new one.",
    ),
]
CompressorSettings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of the compressor, for a new store; repeatable."),
]
TemplateName = Annotated[
    str | None,
    typer.Option(
        "--template",
        metavar="NAME",
        help="Prompt form: chat, lloco, lloco-qasper, lloco-qmsum, lloco-nqa or lloco-quality. Default: what suits "
        "the decoder.",
    ),
]
Adapter = Annotated[
    str,
    typer.Option(
        "--adapter", metavar="NAME", help="A group's LoRA adapter; 'auto': that of the hits' group; or 'none'."
    ),
]
FilterTerms = Annotated[list[str] | None, typer.Option("--filter", "-f", metavar="TERM", help=HELP)]


def models(
    decoder: Decoder = None,
    compressor: CompressorName = None,
    template: TemplateName = None,
    embedder: Embedder = None,
    device: Device = None,
) -> dict[str, Any]:
    """What answers, as `lloco_engine.cli.stores.open_engine` takes it."""
    given = {"decoder": decoder, "compressor": compressor, "template": template, "embedder": embedder}
    return {**given, "device": device}


Models = Annotated[dict[str, Any], Options(models)]


class RayCommand(TyperCommand):
    """A command with ``--ray [ADDRESS]``: what follows is its value only where it looks like an address."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See `TyperCommand.parse_args`; ``--ray`` alone is this machine."""
        end = args.index("--") if "--" in args else len(args)
        named = list(args)
        for at, one in enumerate(args[:end]):
            if one == "--ray" and not _ADDRESS.fullmatch("".join(args[at + 1 : at + 2])):
                named[at] = "--ray=local"
        return super().parse_args(ctx, named)


def cluster(
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="[ADDRESS]",
            help="Let workers of a Ray cluster make the segments: of this machine's cores and GPUs, or of the cluster "
            "at HOST:PORT, or 'auto' where this machine is a part of it.",
        ),
    ] = None,
    ray_workers: Annotated[
        int | None, typer.Option("--ray-workers", min=1, metavar="N", help="Default: as many as there is room for.")
    ] = None,
    ray_cores: Annotated[float, typer.Option("--ray-cores", metavar="N", help="Cores of each worker.")] = 1,
    ray_gpus: Annotated[
        float | None,
        typer.Option(
            "--ray-gpus", min=0, metavar="N", help="GPUs of each worker. Default: one, if the cluster has any."
        ),
    ] = None,
) -> Any:
    """The `RayCluster` whose workers make segments; None without ``--ray``. Commands that take it are `RayCommand`.

    Raises:
        ConfigError: a number is outside its rule.
        typer.BadParameter: workers are asked for without ``--ray``.
    """
    if ray is None:
        if ray_workers is not None:
            raise typer.BadParameter("say --ray beside --ray-workers")
        return None
    from lloco_engine.cluster import RayCluster

    return RayCluster(ray, ray_workers, ray_cores, ray_gpus)


Cluster = Annotated["RayCluster | None", Options(cluster)]


def parse_metadata(pairs: Sequence[str]) -> dict[str, MetadataValue]:
    """``key=value`` pairs as metadata: true, false and numbers as such, the rest as text (``key="2024"`` is text).

    Raises:
        typer.BadParameter: a pair has no ``=`` or no key, or a key is one that every document has.
    """
    values: dict[str, MetadataValue] = {}
    for pair in pairs:
        key, text = _halves(pair)
        if key in (*TEXT_KEYS, "text", "tenant"):
            raise typer.BadParameter(f"metadata must not use the name {key!r}, which every document has")
        values[key] = value_of(text)
    return values


def parse_limits(pairs: Sequence[str]) -> ReadConfig:
    """``name=number`` pairs as limits for the readers.

    Raises:
        typer.BadParameter: a pair is none of a limit and a number that it may be.
    """
    try:
        return ReadConfig.from_json(parse_settings(pairs))
    except (ConfigError, TypeError) as error:
        raise typer.BadParameter(str(error)) from error


def parse_settings(pairs: Sequence[str]) -> dict[str, MetadataValue]:
    """``key=value`` pairs as settings: true, false and numbers as such, the rest as text.

    Raises:
        typer.BadParameter: a pair has no ``=`` or no key.
    """
    return {key: value_of(text) for key, text in map(_halves, pairs)}


def _halves(pair: str) -> tuple[str, str]:
    key, equals, text = pair.partition("=")
    if not equals or not key.strip():
        raise typer.BadParameter(f"must be key=value, not {pair!r}")
    return key.strip(), text
