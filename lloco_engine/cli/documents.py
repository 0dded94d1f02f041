"""``lloco ls``, ``show`` and ``rm``: what the store holds. None of them loads a decoder."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lloco_engine.cli import stores
from lloco_engine.cli.options import AsJSON, StoreDir, Tenant
from lloco_engine.cli.output import hit_json, human_bytes, print_json, print_table, safe
from lloco_engine.errors import NotInStore, SegmentUnavailable

if TYPE_CHECKING:
    from lloco_engine.store import DocumentInfo, Store
    from lloco_engine.types import Divergence

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command("ls")(list_documents)
    app.command("show")(show)
    app.command("rm")(remove)


def list_documents(
    store: StoreDir = Path("lloco-store"),
    tenant: Annotated[
        str | None, typer.Option("--tenant", metavar="NAME", help="Only this tenant's. Default: everyone's.")
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """List the documents of the store.

    \b
    Examples:
      lloco ls
      lloco ls --store work --tenant acme
      lloco ls --json | jq -r '.[].doc_id'
    """
    with stores.open_store(store) as opened:
        infos = opened.documents(tenant)
    if as_json:
        print_json([_info_json(info) for info in infos])
        return
    tenants = any(info.tenant for info in infos)
    columns = ["document", "title", "version>", "tokens>", "segments>", "slots>", "size>", "ingested"]
    print_table(
        ["tenant", *columns] if tenants else columns,
        [
            (
                *([info.tenant] if tenants else []),
                info.doc_id,
                info.title,
                info.version,
                info.source_tokens,
                info.segments,
                info.slots,
                human_bytes(info.bytes),
                info.ingested_at[:16].replace("T", " "),
            )
            for info in infos
        ],
    )


def show(
    doc_id: Annotated[str, typer.Argument(help="Its id, as `lloco ls` shows it.", show_default=False)],
    store: StoreDir = Path("lloco-store"),
    tenant: Tenant = "",
    text: Annotated[bool, typer.Option("--text", help="Print the document's text, and nothing else.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Show one document: its facts, its cost, its segments.

    \b
    Examples:
      lloco show report.pdf
      lloco show report.pdf --text > report.txt
      lloco show report.pdf --json
    """
    with stores.open_store(store) as opened:
        info = opened.document(doc_id, tenant)
        if text and not as_json:
            content = opened.document_text(doc_id, tenant)
            sys.stdout.write(safe(content) if sys.stdout.isatty() else content)  # echo would drop escape codes
            return
        hits = opened.chunks(doc_id, tenant)
        content = opened.document_text(doc_id, tenant) if text else ""
        divergences = [_divergence(opened, hit.segment_id) for hit in hits]
    if as_json:
        segments = [
            hit_json(hit) | {"text": hit.text, "divergence": None if one is None else asdict(one)}
            for hit, one in zip(hits, divergences, strict=True)
        ]
        print_json(_info_json(info) | {"chunks": segments} | ({"text": content} if text else {}))
        return
    facts = _info_json(info)
    for name, value in facts.items():
        if name != "metadata":
            shown = human_bytes(info.bytes) if name == "bytes" else f"{value:,}" if isinstance(value, int) else value
            typer.echo(f"{name.replace('_', ' '):>24}  {safe(str(shown))}")
    for name, value in info.metadata.items():
        typer.echo(f"{'metadata ' + safe(name):>24}  {safe(str(value))}")
    typer.echo()
    known = any(divergences)
    rows = [
        (
            hit.ordinal,
            hit.span.start,
            hit.span.end,
            hit.source_tokens,
            hit.slots,
            *([_told(one)] if known else []),
            " ".join(hit.text[:200].split())[:60],
        )
        for hit, one in zip(hits, divergences, strict=True)
    ]
    print_table(["segment>", "from>", "to>", "tokens>", "slots>", *(["divergence"] if known else []), "begins"], rows)


def _divergence(store: Store, segment_id: str) -> Divergence | None:
    """What is known of a segment's quality; of a damaged one, nothing: `lloco verify` names it."""
    try:
        return store.divergence(segment_id)
    except SegmentUnavailable:
        return None


def _told(divergence: Divergence | None) -> str:
    if divergence is None:
        return ""
    return f"{divergence.before:.3f} -> {divergence.after:.3f}" if divergence.steps else f"{divergence.after:.3f}"


def remove(
    doc_ids: Annotated[list[str], typer.Argument(help="Their ids, as `lloco ls` shows them.", show_default=False)],
    store: StoreDir = Path("lloco-store"),
    tenant: Tenant = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Remove documents and their memories.

    An id that is not there makes the exit code 1; the others are removed.

    \b
    Examples:
      lloco rm report.pdf
      lloco rm old-1.md old-2.md --yes
    """
    with stores.open_store(store) as opened:
        if not yes:
            if as_json or not sys.stdin.isatty():
                raise typer.BadParameter("without a terminal to ask on, removing needs --yes")
            typer.confirm(f"Remove {len(doc_ids)} document(s) from {store}?", abort=True, err=True)
        removed, missing = [], []
        with opened.writer() as writer:
            for doc_id in dict.fromkeys(doc_ids):
                try:
                    writer.delete_document(doc_id, tenant)
                    removed.append(doc_id)
                except NotInStore as error:
                    missing.append(doc_id)
                    typer.echo(f"error: {error}", err=True)
    if as_json:
        print_json({"removed": removed, "missing": missing})
    else:
        for doc_id in removed:
            typer.echo(f"removed {safe(doc_id)}")
    if missing:
        raise typer.Exit(1)


def _info_json(info: DocumentInfo) -> dict[str, object]:
    values = asdict(info)
    values["bytes_per_source_token"] = round(info.bytes / info.source_tokens, 1) if info.source_tokens else 0.0
    return values
