"""``lloco verify``, ``backup``, ``restore``, ``stats`` and ``info``: is the store sound, and what is it made with."""

from __future__ import annotations

import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lloco_engine import __version__
from lloco_engine.cli import stores
from lloco_engine.cli.options import AsJSON, Decoder, Device, StoreDir
from lloco_engine.cli.output import counted, human_bytes, print_json, safe
from lloco_engine.errors import ModelNotFound, StoreNotFound
from lloco_engine.types import Document

if TYPE_CHECKING:
    from lloco_engine.store import Problem

__all__ = ["register"]

_LIBRARIES = ("torch", "transformers", "peft", "faiss-cpu", "sentence-transformers", "tiktoken", "safetensors", "numpy")


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command()(verify)
    app.command()(backup)
    app.command()(restore)
    app.command()(stats)
    app.command()(info)


def verify(
    store: StoreDir = Path("lloco-store"),
    repair: Annotated[
        bool, typer.Option("--repair", help="Put it in order; what can be made again from the store's text is.")
    ] = False,
    decoder: Decoder = None,
    device: Device = None,
    as_json: AsJSON = False,
) -> None:
    """Check every file of the store.

    Reads every byte of the manifest, the catalogue, the segments, the
    index and the adapters, also beside a writer. The exit code is 1 when something is wrong. Segment files that no
    document refers to (left by a killed ingest) are listed but do no harm.

    \b
    Examples:
      lloco verify
      lloco verify --repair
      lloco verify --json | jq '.problems[].path'
    """
    from lloco_engine.store import Store

    done: list[str] = []
    if repair:
        done = list(Store.repair(store))
        done += _compress_again(store, decoder, device)
    problems = Store.verify_path(store)
    harmful = [problem for problem in problems if problem.kind != "orphan"]
    if as_json:
        print_json({"ok": not harmful, "problems": [asdict(problem) for problem in problems], "repaired": done})
    else:
        for sentence in done:
            typer.echo(f"repaired: {safe(sentence)}")
        for problem in problems:
            typer.echo(_sentence(problem), err=problem.kind != "orphan")
        typer.echo(f"{len(harmful)} problem(s)" if harmful else "the store is sound")
    if harmful:
        raise typer.Exit(1)


Link = Annotated[bool, typer.Option("--link", help="Hard links instead of copies, where the file system can.")]


def backup(
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="A folder that is not there yet.")],
    store: StoreDir = Path("lloco-store"),
    link: Link = False,
    as_json: AsJSON = False,
) -> None:
    """Copy the store to DEST, whole and checked.

    Others may ask and ingest meanwhile: the copy is one state of the
    store. DEST appears when it is whole.

    \b
    Examples:
      lloco backup /backups/monday
      lloco backup --link work-before-the-change --store work
    """
    from lloco_engine.store.backup import copy_store

    with counted("copying", show=not as_json and sys.stderr.isatty()) as progress:
        copy_store(store, dest, link=link, progress=progress)
    _say_copied(store, dest, as_json)


def restore(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="What `lloco backup` made.")],
    store: StoreDir = Path("lloco-store"),
    link: Link = False,
    as_json: AsJSON = False,
) -> None:
    """Make a store of a backup.

    The store's folder must be missing or empty: move a damaged store
    away first. The backup stays as it is.

    \b
    Examples:
      lloco restore /backups/monday --store work
    """
    from lloco_engine.store.backup import copy_store

    with counted("copying", show=not as_json and sys.stderr.isatty()) as progress:
        copy_store(source, store, link=link, progress=progress)
    _say_copied(source, store, as_json)


def _say_copied(source: Path, dest: Path, as_json: bool) -> None:
    with stores.open_store(dest) as opened:
        documents = len(opened.documents())
    if as_json:
        print_json({"from": str(source), "to": str(dest), "documents": documents})
    else:
        typer.echo(safe(f"{documents} document(s) copied from {source} to {dest}"))


def _compress_again(store: Path, decoder: str | None, device: str | None) -> list[str]:
    """Make damaged segments again from the text that the store keeps; a sentence for each document."""
    with stores.open_store(store) as opened:
        broken = [info for info in opened.documents() if opened.missing_segments(info.doc_id, info.tenant)]
        documents = [
            Document(
                doc_id=info.doc_id,
                text=opened.document_text(info.doc_id, info.tenant),
                title=info.title,
                source=info.source,
                metadata=info.metadata,
                tenant=info.tenant,
                origin=info.origin,
            )
            for info in broken
        ]
    if not documents:
        return []
    done: list[str] = []
    with stores.open_engine(store, decoder=decoder, device=device) as engine:
        for tenant in sorted({document.tenant for document in documents}):
            report = engine.ingest([document for document in documents if document.tenant == tenant], tenant=tenant)
            done += [f"{doc_id} was compressed again" for doc_id in (*report.repaired, *report.replaced)]
            done += [f"{failure.source} could not be: {failure.reason}" for failure in report.failed]
    return done


def _sentence(problem: Problem) -> str:
    used = f" (documents: {', '.join(problem.doc_ids)})" if problem.doc_ids else ""
    return safe(f"{problem.kind}: {problem.path}: {problem.detail}{used}")


def stats(store: StoreDir = Path("lloco-store"), as_json: AsJSON = False) -> None:
    """Count what the store holds, and its bytes by part.

    Over all tenants; what several documents share counts once.

    \b
    Examples:
      lloco stats
      lloco stats --json | jq .bytes.total
    """
    with stores.open_store(store) as opened:
        figures = opened.stats()
    if as_json:
        print_json(figures)
    else:
        _print_facts(figures)


def info(store: StoreDir = Path("lloco-store"), as_json: AsJSON = False) -> None:
    """Show versions, device, models, and what the store holds.

    \b
    Examples:
      lloco info
      lloco info --store work --json
    """
    facts: dict[str, Any] = {"lloco": __version__, "libraries": _versions(), "models": _models()}
    try:
        with stores.open_store(store) as opened:
            facts["store"] = {
                "path": str(store),
                "memory": opened.manifest.memory,
                "manifest": opened.manifest.to_json(),
                "stats": opened.stats(),
            }
    except StoreNotFound:
        facts["store"] = None
    if as_json:
        print_json(facts)
        return
    _print_facts(facts)
    if facts["store"] is None:
        typer.echo(f"store: none at {store} yet")


def _print_facts(facts: dict[str, Any], indent: str = "") -> None:
    for name, value in facts.items():
        label = f"{indent}{safe(str(name)).replace('_', ' ')}:"
        if isinstance(value, dict):
            typer.echo(label)
            _print_facts(value, indent + "  ")
        elif value is not None:
            size = "bytes" in indent + name and isinstance(value, int)
            typer.echo(f"{label} {human_bytes(value) if size else safe(str(value))}")


def _versions() -> dict[str, str]:
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed"
    return found


def _models() -> dict[str, str]:
    from lloco_engine.models import cache_folder, embedder_folder, pick_device, pick_dtype

    device = pick_device()
    facts = {
        "device": str(device),
        "dtype": str(pick_dtype(device)).removeprefix("torch."),
        "cache": str(cache_folder()),
    }
    for name, place in (("embedded decoder", _decoder_place), ("embedded embedder", embedder_folder)):
        try:
            facts[name] = place()
        except ModelNotFound as error:
            facts[name] = f"missing: {error}"
    return facts


def _decoder_place() -> str:
    from lloco_engine.models import embedded_decoder_folder

    folder = embedded_decoder_folder()
    return str(folder) if folder.exists() else f"{folder} (made on first use)"
