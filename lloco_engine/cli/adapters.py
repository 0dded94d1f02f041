"""``lloco adapters``: the LoRA adapters that a store keeps, and the mean of two. None of it loads a decoder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from lloco_engine.adapters.loading import default_folder
from lloco_engine.adapters.manifest import AdapterManifest
from lloco_engine.adapters.registry import Kept, Registry
from lloco_engine.cli import stores
from lloco_engine.cli.options import AsJSON, StoreDir, Tenant
from lloco_engine.cli.output import human_bytes, print_json, print_table

__all__ = ["register"]

Group = Annotated[str, typer.Argument(help="The group, as `lloco adapters ls` shows it.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    commands = typer.Typer(no_args_is_help=True, help="List, add, remove and roll back the store's LoRA adapters.")
    commands.command("ls")(list_adapters)
    commands.command()(add)
    commands.command("rm")(remove)
    commands.command()(rollback)
    commands.command()(average)
    app.add_typer(commands, name="adapters")


def list_adapters(
    store: StoreDir = Path("lloco-store"),
    tenant: Annotated[
        str | None, typer.Option("--tenant", metavar="NAME", help="Only this tenant's. Default: all.")
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """List the adapters of the store, and the one that comes with the engine.

    \b
    Examples:
      lloco adapters ls
      lloco adapters ls --store work --json
    """
    with _registry(store) as registry:
        kept = registry.kept(tenant)
    shipped = default_folder()
    manifest = None if shipped is None else AdapterManifest.load(shipped)
    if as_json:
        print_json({"adapters": [_as_json(one) for one in kept], "shipped": manifest and manifest.to_json()})
        return
    rows: list[tuple[object, ...]] = [
        (
            one.tenant,
            one.group,
            one.version,
            "yes" if one.current else "",
            *_facts(one.manifest),
            human_bytes(one.bytes),
        )
        for one in kept
    ]
    if manifest is not None:
        rows.append(("(all)", "(shipped)", "-", "where no other does", *_facts(manifest), ""))
    print_table(
        ["tenant", "group", "version>", "answers", "decoder", "questions>", "held-out loss", "made", "size>"], rows
    )


def add(
    folder: Annotated[Path, typer.Argument(help="Of the adapter, as `lloco finetune --out` writes it.")],
    group: Annotated[
        str, typer.Option("--group", metavar="NAME", help="Whose documents it reads.", show_default=False)
    ],
    store: StoreDir = Path("lloco-store"),
    tenant: Tenant = "",
    as_json: AsJSON = False,
) -> None:
    """Copy an adapter into the store as its group's newest version.

    One that was made for another decoder, tokenizer, template or kind of
    memory is refused.

    \b
    Examples:
      lloco adapters add trained/ --group law
    """
    names = ("decoder_fingerprint", "tokenizer_fingerprint", "template_fingerprint", "memory")
    with stores.open_store(store) as opened:
        AdapterManifest.load(folder).check({name: getattr(opened.manifest, name) for name in names})
        version = Registry(opened).add(folder, group, tenant).version
    _said({"group": group, "version": version}, f"group {group} is answered by version {version}", as_json)


def remove(
    group: Group,
    version: Annotated[
        int | None, typer.Option("--version", metavar="N", min=1, help="Only this one. Default: all of the group.")
    ] = None,
    store: StoreDir = Path("lloco-store"),
    tenant: Tenant = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Remove adapters of a group.

    \b
    Examples:
      lloco adapters rm law --version 2
      lloco adapters rm law --yes
    """
    if not yes:
        if as_json or not sys.stdin.isatty():
            raise typer.BadParameter("without a terminal to ask on, removing needs --yes")
        what = "every adapter" if version is None else f"version {version}"
        typer.confirm(f"Remove {what} of group {group!r} from {store}?", abort=True, err=True)
    with _registry(store) as registry:
        removed = registry.remove(group, version, tenant)
    _said({"group": group, "removed": removed}, f"removed version {', '.join(map(str, removed))} of {group}", as_json)


def rollback(
    group: Group,
    to: Annotated[
        int | None, typer.Option("--to", metavar="N", min=1, help="The version. Default: the one before the present.")
    ] = None,
    store: StoreDir = Path("lloco-store"),
    tenant: Tenant = "",
    as_json: AsJSON = False,
) -> None:
    """Let an earlier version of a group's adapter answer.

    \b
    Examples:
      lloco adapters rollback law
      lloco adapters rollback law --to 3
    """
    with _registry(store) as registry:
        version = registry.rollback(group, to, tenant)
    _said({"group": group, "version": version}, f"group {group} is answered by version {version}", as_json)


def average(
    earlier: Annotated[Path, typer.Argument(help="Folder of the adapter that the training began with.")],
    later: Annotated[Path, typer.Argument(help="Folder of the adapter that it made.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Write the adapter's folder here.")],
    share: Annotated[float, typer.Option("--share", metavar="X", min=0.0, max=1.0, help="Of the later adapter.")] = 0.7,
    as_json: AsJSON = False,
) -> None:
    """Average an adapter with the one that it was trained on from.

    What `lloco finetune --from` teaches, it teaches at some cost of what the
    adapter did before; between the two lie weights that do both.

    \b
    Examples:
      lloco adapters average before/ after/ --share 0.7 --out both/
    """
    from lloco_engine.adapters.interpolate import average as write_average

    manifest = write_average(earlier, later, share, out)
    _said(manifest.to_json(), f"written to {out}: {share:g} of {later}, the rest of {earlier}", as_json)


@contextmanager
def _registry(store: Path) -> Iterator[Registry]:
    with stores.open_store(store) as opened:
        yield Registry(opened)


def _said(value: dict[str, Any], sentence: str, as_json: bool) -> None:
    if as_json:
        print_json(value)
    else:
        typer.echo(sentence)


def _facts(manifest: AdapterManifest) -> tuple[str, int, str, str]:
    loss = manifest.metrics.get("held_out_loss")
    before = manifest.metrics.get("held_out_loss_before")
    shown = "-" if loss is None or before is None else f"{before:.2f} -> {loss:.2f}"
    questions = sum(int(file.get("questions", 0)) for file in manifest.data)
    return manifest.decoder, questions, shown, manifest.created[:16].replace("T", " ")


def _as_json(kept: Kept) -> dict[str, Any]:
    return {
        "tenant": kept.tenant,
        "group": kept.group,
        "version": kept.version,
        "current": kept.current,
        "bytes": kept.bytes,
        "manifest": kept.manifest.to_json(),
    }
