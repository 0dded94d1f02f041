"""What a store holds of who asks, and what it costs."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from lloco_engine.readers import SUFFIXES
from lloco_engine.serve.answers import file_of
from lloco_engine.serve.door import Asker, TheDoor, Writer
from lloco_engine.serve.groups import named_in
from lloco_engine.store import DocumentInfo

__all__ = ["router"]

router = APIRouter(prefix="/lloco", tags=["documents"])


@router.get("/documents")
def documents(door: TheDoor, caller: Asker) -> dict[str, Any]:
    """Every document, with what it costs."""
    return {"object": "list", "data": [_document(one) for one in door.engine.documents(caller.tenant)]}


@router.get("/documents/{doc_id:path}/text")
def text(
    doc_id: str,
    door: TheDoor,
    caller: Asker,
    start: Annotated[int, Query(ge=0, description="First character.")] = 0,
    end: Annotated[int | None, Query(ge=0, description="Character after the last; by default all.")] = None,
) -> dict[str, Any]:
    """A document's text, or a part of it."""
    whole = door.engine.store.document_text(doc_id, caller.tenant)
    last = len(whole) if end is None else min(end, len(whole))
    first = min(start, last)
    title = door.engine.store.document(doc_id, caller.tenant).title
    shown = {"start": first, "end": last, "length": len(whole), "text": whole[first:last]}
    return {"document": doc_id, "title": title, **shown}


@router.delete("/documents/{doc_id:path}")
def delete(doc_id: str, door: TheDoor, caller: Writer) -> dict[str, Any]:
    """Take a document out. The uploaded file that it was made of stays; when all of it is out, its vector store has it
    no more."""
    door.engine.delete(doc_id, caller.tenant)
    file, store = file_of(doc_id)
    if file is not None and store is not None:
        for one in door.records.attachments(caller.tenant, store=store, file=file):
            if one.status == "completed" and not door.background.documents_of(one):
                for doomed in door.records.doom(caller.tenant, store=store, file=file):
                    door.background.take_out(doomed)
    return {"id": doc_id, "object": "document.deleted", "deleted": True}


@router.get("/store")
def store(door: TheDoor, caller: Asker) -> dict[str, Any]:
    """Totals, and what a token costs."""
    engine = door.engine
    found = engine.documents(caller.tenant)
    totals = {
        "segments": sum(one.segments for one in found),
        "tokens": sum(one.source_tokens for one in found),
        "slots": sum(one.slots for one in found),
        "bytes": sum(one.bytes for one in found),
    }
    uploads = door.records.files(caller.tenant)
    return {
        "documents": len(found),
        **totals,
        "tokens_per_slot": totals["tokens"] / totals["slots"] if totals["slots"] else 0.0,
        "bytes_per_token": totals["bytes"] / totals["tokens"] if totals["tokens"] else 0.0,
        "compress_s": sum(one.compress_s for one in found),
        "decoder": str(engine.manifest.decoder).rpartition("/")[2],
        "window": engine.decoder.shape.window,
        "ratio": engine.manifest.ratio,
        "compressor": engine.manifest.compressor,
        "uploads": {"files": len(uploads), "bytes": sum(one.bytes for one in uploads)},
        "in_progress": door.records.to_do(caller.tenant),
        "read_only": caller.scope != "write",
        "tenant": caller.tenant,
        "suffixes": list(SUFFIXES),
        "max_upload_bytes": door.limits.upload_bytes,
    }


def _document(info: DocumentInfo) -> dict[str, Any]:
    file, _ = file_of(info.doc_id)
    return {
        "id": info.doc_id,
        "title": info.title,
        "source": info.source,
        "file_id": file,
        "vector_store_id": named_in(info.metadata),
        "tokens": info.source_tokens,
        "segments": info.segments,
        "slots": info.slots,
        "bytes": info.bytes,
        "characters": info.chars,
        "pages": info.pages,
        "compress_s": info.compress_s,
        "added": info.ingested_at,
        "metadata": dict(info.metadata),
    }
