"""``lloco ingest``: compress documents into the store."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lloco_engine.adapters.registry import check_group
from lloco_engine.adapters.routing import GROUP
from lloco_engine.cli import stores
from lloco_engine.cli.options import (
    AsJSON,
    Cluster,
    CompressorName,
    CompressorSettings,
    Decoder,
    Device,
    Embedder,
    RayCommand,
    StoreDir,
    Tenant,
    parse_limits,
    parse_metadata,
    parse_settings,
)
from lloco_engine.cli.output import human_bytes, print_json, print_table, safe
from lloco_engine.cli.refine import steps_of
from lloco_engine.config import ReadConfig, RefineConfig
from lloco_engine.flags import Options, with_options
from lloco_engine.types import IngestReport, MetadataValue

if TYPE_CHECKING:
    from lloco_engine.engine import Progress

__all__ = ["register"]


class OnDisk(StrEnum):
    """Number types of segments on disk."""

    float16 = "float16"
    int8 = "int8"
    int4 = "int4"


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command(cls=RayCommand)(with_options(ingest))


def new_store(
    store: StoreDir = Path("lloco-store"),
    decoder: Decoder = None,
    embedder: Embedder = None,
    compressor: CompressorName = None,
    settings: CompressorSettings = None,
    ratio: Annotated[
        float | None, typer.Option(min=1, help="Source tokens per slot; 16 for a new store.", show_default=False)
    ] = None,
    segment_tokens: Annotated[
        int | None, typer.Option(min=16, help="Largest segment; 1536 for a new store.", show_default=False)
    ] = None,
    refine: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help=f"Steps of refinement for each segment, for a new store; auto: {RefineConfig.steps}. Default: 0.",
            show_default=False,
        ),
    ] = None,
    max_divergence: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            min=0,
            help="Give a segment that diverges further from its text more slots, for a new store. Default: none is.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[OnDisk | None, typer.Option(help="Numbers of segments on disk; float16 for a new store.")] = None,
) -> dict[str, Any]:
    """A store, and what it is made with if it is new, as `lloco_engine.cli.stores.open_engine` takes it."""
    own = parse_settings(settings or []) | _refinement(refine, store)
    if max_divergence is not None:
        own["max_divergence"] = max_divergence
    return {
        "store": store,
        "decoder": decoder,
        "embedder": embedder,
        "compressor": compressor,
        "settings": own,
        "ratio": ratio,
        "segment_tokens": segment_tokens,
        "dtype": dtype and dtype.value,
    }


def labels(
    meta: Annotated[
        list[str] | None, typer.Option("--meta", metavar="KEY=VALUE", help="Metadata for every document; repeatable.")
    ] = None,
    group: Annotated[
        str | None, typer.Option("--group", metavar="NAME", help="Group of every document, whose adapter will answer.")
    ] = None,
) -> dict[str, MetadataValue]:
    """Metadata that every document gets."""
    return parse_metadata(meta or []) | ({} if group is None else {GROUP: check_group(group)})


def limits(
    limit: Annotated[
        list[str] | None,
        typer.Option(
            "--limit",
            metavar="NAME=NUMBER",
            help="A limit for each file: max_bytes, max_text, max_unpacked, max_pages, max_nesting, max_seconds or "
            "max_memory; repeatable.",
        ),
    ] = None,
) -> ReadConfig | None:
    """What a file may ask of the readers; None: what it may by default."""
    return parse_limits(limit) if limit else None


def ingest(
    *,
    paths: Annotated[list[Path], typer.Argument(help="Files and folders.", show_default=False)],
    made: Annotated[dict[str, Any], Options(new_store)],
    tenant: Tenant = "",
    metadata: Annotated[dict[str, MetadataValue], Options(labels)],
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove documents whose files have vanished from the folders.")
    ] = False,
    read: Annotated[ReadConfig | None, Options(limits)],
    device: Device = None,
    cluster: Cluster,
    as_json: AsJSON = False,
) -> None:
    """Compress documents into the store.

    Reads .txt, .md, .html, .pdf, .jsonl, .csv, .tsv and .epub files, .docx,
    .pptx and .xlsx with the extra 'documents', and folders of them. A
    document that is already there unchanged costs nothing; a run that was
    cut off goes on where it stopped. What cannot be used is named with the
    rule it breaks, the rest is ingested, and the exit code is 1.

    A file that was moved or renamed stays the document that it was. What was
    read before from these folders and is no longer there is named, and removed
    with --prune: never documents of other folders. A folder that is missing is
    a failure, and one that holds nothing is not pruned.

    Exit codes: 0 all was ingested, 1 something failed or was refused,
    2 wrong usage, 130 interrupted.

    \b
    Examples:
      lloco ingest docs/
      lloco ingest docs/ --prune
      lloco ingest docs/ notes/ --prune --json
      lloco ingest a.pdf b.md --store work --meta year=2024 --meta team=pumps
      lloco ingest corpus.jsonl --ratio 8 --json
      lloco ingest docs/ --compressor autocompressor --decoder princeton-nlp/AutoCompressor-Llama-2-7b-6k
      lloco ingest contracts/ --group law
      lloco ingest docs/ --store fine --refine auto --max-divergence 0.3
      lloco ingest docs/ --ray
      lloco ingest docs/ --ray auto --ray-gpus 1
    """
    with stores.open_engine(create=True, device=device, **made) as engine:
        try:
            with _progress(paths, show=not as_json and sys.stderr.isatty()) as progress:
                report = engine.ingest(
                    paths,
                    tenant=tenant,
                    metadata=metadata,
                    prune=prune,
                    read=read,
                    cluster=cluster,
                    progress=progress,
                )
        except KeyboardInterrupt:
            typer.echo("Documents finished so far are in the store; the same command goes on from here.", err=True)
            raise
    if as_json:
        print_json(report.as_dict())
    else:
        _print_report(report)
    if report.failed:
        raise typer.Exit(1)


def _refinement(steps: str | None, store: Path) -> dict[str, Any]:
    """The compressor's settings for ``--refine``; a store that is there keeps its own, but for the number of steps."""
    there = (store / "manifest.json").exists()
    if steps is None or (steps == "auto" and there):
        return {}
    if there:
        return {"refine": steps_of(steps)}
    return RefineConfig(steps=steps_of(steps)).settings


def _print_report(report: IngestReport) -> None:
    rows: list[tuple[str, object]] = [
        ("added", len(report.added)),
        ("replaced", len(report.replaced)),
        ("unchanged", len(report.unchanged)),
        ("repaired", len(report.repaired)),
        ("moved", len(report.moved)),
        ("vanished", len(report.vanished)),
        ("pruned", len(report.pruned)),
        ("failed", len(report.failed)),
        ("segments written", report.segments),
        ("source tokens", report.source_tokens),
        ("slots", report.slots),
        ("bytes written", human_bytes(report.bytes_written)),
        ("compressing", f"{report.compress_s:.1f} s"),
        ("in all", f"{report.seconds:.1f} s"),
    ]
    if report.compress_s > 0:
        rows.insert(-1, ("rate", f"{report.source_tokens / report.compress_s:.0f} tokens/s"))
    print_table(["documents", "count>"], rows)
    if report.skipped:
        left_out = ", ".join(f"{count} {safe(reason)}" for reason, count in sorted(report.skipped.items()))
        typer.echo(f"skipped in folders: {left_out}", err=True)
    elif not any((report.added, report.replaced, report.unchanged, report.repaired, report.moved, report.failed)):
        typer.echo("note: there was nothing to ingest", err=True)
    for doc_id in report.moved:
        typer.echo(f"moved: {safe(doc_id)}")
    for doc_id in report.pruned:
        typer.echo(f"pruned: {safe(doc_id)}")
    left = [doc_id for doc_id in report.vanished if doc_id not in set(report.pruned)]
    for doc_id in left:
        typer.echo(f"vanished: {safe(doc_id)}", err=True)
    if left:
        typer.echo(f"note: {len(left)} vanished document(s) are still in the store; --prune removes them", err=True)
    for failure in report.failed:
        typer.echo(f"failed: {safe(failure.source)}: {safe(failure.reason)}", err=True)


@contextmanager
def _progress(paths: Sequence[Path], *, show: bool) -> Iterator[Callable[[Progress], None] | None]:
    """A bar on stderr, with the rate and the time left; what it yields is given to the engine."""
    if not show:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from lloco_engine.readers import size_of_files

    columns = (
        TextColumn("{task.fields[name]}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=size_of_files(paths) or None, name="reading", rate="")

        def report(progress: Any) -> None:
            bar.update(
                task,
                completed=progress.bytes_done,
                name=safe(progress.document)[-40:],
                rate=f"{progress.tokens_per_s:,.0f} tokens/s",
            )

        yield report
