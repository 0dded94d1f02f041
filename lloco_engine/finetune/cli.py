"""``lloco finetune``: teach the decoder to read a group's compressed documents."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lloco_engine.finetune.train import Progress

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command()(finetune)


def finetune(
    data: Annotated[
        list[Path],
        typer.Option("--data", metavar="FILE", help="JSON Lines, one document with its questions a line; repeatable."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The adapter's folder.")],
    group: Annotated[str, typer.Option("--group", metavar="NAME", help="The documents' group.")] = "default",
    preset: Annotated[
        str, typer.Option(metavar="NAME", help="small (decoders under a billion weights) or paper (LLoCO's own).")
    ] = "small",
    limit: Annotated[
        list[int] | None,
        typer.Option("--limit", metavar="DOCS", min=1, help="First documents of each --data, in the same order."),
    ] = None,
    max_document_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Leave longer documents out.")
    ] = None,
    begin_with: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help="An adapter to go on from, of the same rank.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(metavar="X", help="Instead of the preset's.")] = None,
    rank: Annotated[int | None, typer.Option(metavar="N", help="Instead of the preset's.")] = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", help="Instead of the preset's.")] = None,
    max_minutes: Annotated[
        float, typer.Option(metavar="M", min=0.0, help="Wall time by which the run ends well; 0 is no limit.")
    ] = 0.0,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=JSON", help="Any other setting of the preset, e.g. ratios=[8,16]."),
    ] = None,
    work: Annotated[
        Path | None, typer.Option("--work", metavar="DIR", help="The run's own folder. Default: beside --out.")
    ] = None,
    decoder: Annotated[str, typer.Option("--decoder", metavar="NAME", help="Without --store.")] = "embedded",
    device: Annotated[str | None, typer.Option("--device", metavar="NAME", help="cpu, cuda, cuda:N or mps.")] = None,
) -> None:
    """Train a LoRA adapter to read compressed documents."""
    from lloco_engine.chunking import Chunker
    from lloco_engine.compress import registry
    from lloco_engine.config import CompressConfig
    from lloco_engine.decoder.local import LocalDecoder
    from lloco_engine.finetune.config import preset as get_preset
    from lloco_engine.finetune.run import DataFile, Finetune

    named = {"learning_rate": learning_rate, "rank": rank, "epochs": epochs, "max_minutes": max_minutes}
    changes: dict[str, Any] = {name: value for name, value in named.items() if value is not None} | _settings(setting)
    config = get_preset(preset, **changes)
    limits = list(limit or []) + [None] * len(data)
    files = [DataFile(path, most) for path, most in zip(data, limits, strict=False)]
    loaded = LocalDecoder.load(decoder, device=device)
    run = Finetune(
        loaded,
        registry.get(CompressConfig.name),
        Chunker(loaded.tokenizer),
        files,
        config,
        group=group,
        longest=max_document_tokens,
        start=begin_with,
    )
    typer.echo(", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in run.summary.items()), err=True)
    with _shown() as progress:
        manifest = run.run(out, work or out.with_name(f".{out.name}.work"), progress)
    typer.echo(f"{out}: {manifest.metrics}")


def _settings(pairs: list[str] | None) -> dict[str, Any]:
    import json

    made = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        try:
            if not equals:
                raise ValueError("there is no '='")
            made[name.strip()] = json.loads(value)
        except ValueError as error:
            raise typer.BadParameter(f"must be NAME=JSON, not {pair!r} ({error})", param_hint="--set") from error
    return made


@contextmanager
def _shown() -> Iterator[Callable[[Progress], None]]:
    """Progress on stderr: a line for every update."""

    def show(at: Progress) -> None:
        held = "" if at.held_out is None else f", held out {at.held_out:.3f}"
        sys.stderr.write(
            f"update {at.step} of {at.steps}: loss {at.loss:.3f}{held}, {at.tokens_per_s:.0f} tokens/s, "
            f"{at.seconds_left / 60:.1f} min left\n"
        )
        sys.stderr.flush()

    yield show
