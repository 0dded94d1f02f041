"""Vector stores: each is a group of documents. Those that came otherwise are there too, under their own ids."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from lloco_engine.adapters.loading import DEFAULT
from lloco_engine.adapters.routing import GROUP
from lloco_engine.errors import ConfigError, NotInStore
from lloco_engine.metadata import plain_metadata
from lloco_engine.serve.answers import file_of
from lloco_engine.serve.door import Asker, Door, TheDoor, Writer
from lloco_engine.serve.errors import APIError, not_found
from lloco_engine.serve.files import file_record
from lloco_engine.serve.groups import group_of, named_in
from lloco_engine.serve.paging import Page, page_of
from lloco_engine.serve.records import Attachment, VectorStore
from lloco_engine.serve.schema import STRICT
from lloco_engine.store import DocumentInfo

__all__ = ["find_store", "router"]

router = APIRouter(prefix="/v1/vector_stores", tags=["vector stores"])
_RESERVED = (GROUP, "doc_id", "source", "title", "text", "tenant")
Attributes = Annotated[
    dict[str, str | float | bool | int] | None,
    Field(description="Become metadata of the documents, which filters see.", max_length=16),
]
Labels = Annotated[dict[str, str] | None, Field(description="Kept with it, and not read.", max_length=16)]
_KEPT: Any = Field(None, description="How chunks are cut is the store's own: only {'type': 'auto'} is taken.")


class _Auto(BaseModel):
    model_config = STRICT

    type: Annotated[str, Field(pattern="^auto$")]


class NewStore(BaseModel):
    """A vector store to be made."""

    model_config = STRICT

    name: Annotated[str | None, Field(max_length=512)] = None
    file_ids: Annotated[list[str] | None, Field(max_length=500, description="Files to attach at once.")] = None
    metadata: Labels = None
    description: Annotated[str | None, Field(max_length=512, description="A label, which is not read.")] = None
    chunking_strategy: _Auto | None = _KEPT
    expires_after: Annotated[None, Field(description="Documents stay until they are deleted.")] = None


class ChangedStore(BaseModel):
    """What is to be changed of a vector store."""

    model_config = STRICT

    name: Annotated[str | None, Field(max_length=512)] = None
    metadata: Labels = None
    expires_after: Annotated[None, Field(description="Documents stay until they are deleted.")] = None


class NewFile(BaseModel):
    """A file to be put into a vector store."""

    model_config = STRICT

    file_id: str
    attributes: Attributes = None
    chunking_strategy: _Auto | None = _KEPT


class NewBatch(BaseModel):
    """Files to be put into a vector store together."""

    model_config = STRICT

    file_ids: Annotated[list[str] | None, Field(min_length=1, max_length=500)] = None
    files: Annotated[list[NewFile] | None, Field(min_length=1, max_length=500)] = None
    attributes: Attributes = None
    chunking_strategy: _Auto | None = _KEPT


@router.post("")
def create(body: NewStore, door: TheDoor, caller: Writer) -> dict[str, Any]:
    """Make a vector store: a group of documents with an id of its own."""
    files = list(dict.fromkeys(body.file_ids or ()))
    for file_id in files:
        file_record(door, caller.tenant, file_id)
    made = VectorStore(
        caller.tenant, f"vs_{secrets.token_hex(12)}", body.name or "", body.metadata or {}, int(time.time())
    )
    door.records.put_store(made)
    if files:
        _attach(door, made, {file_id: {} for file_id in files})
    return _store(door, made)


@router.get("")
def stores(door: TheDoor, caller: Asker, page: Page) -> dict[str, Any]:
    """All vector stores, newest first; ``default`` and those of groups that were ingested otherwise come last."""
    documents = door.engine.documents(caller.tenant)
    shown = [_store(door, one, documents) for one in _all(door, caller.tenant, documents)]
    return page_of(shown, page)


@router.get("/{store_id}")
def store(store_id: str, door: TheDoor, caller: Asker) -> dict[str, Any]:
    """One vector store."""
    return _store(door, find_store(door, caller.tenant, store_id))


@router.post("/{store_id}")
def change(store_id: str, body: ChangedStore, door: TheDoor, caller: Writer) -> dict[str, Any]:
    """Give a vector store another name or other labels."""
    known = find_store(door, caller.tenant, store_id)
    made = replace(
        known,
        name=known.name if body.name is None else body.name,
        metadata=known.metadata if body.metadata is None else body.metadata,
    )
    door.records.put_store(made)
    return _store(door, made)


@router.delete("/{store_id}")
def delete(store_id: str, door: TheDoor, caller: Writer) -> dict[str, Any]:
    """Remove a vector store and all of its documents; uploaded files stay. ``default`` is emptied, and stays too."""
    find_store(door, caller.tenant, store_id)
    for one in door.records.doom(caller.tenant, store=store_id):
        door.background.take_out(one)
    if left := [one.doc_id for one in _documents(door, caller.tenant, store_id)]:
        door.engine.delete_all(left, caller.tenant)
    door.records.remove_store(caller.tenant, store_id)
    return {"id": store_id, "object": "vector_store.deleted", "deleted": True}


# -- files in vector stores -------------------------------------------------------------------------------------


@router.post("/{store_id}/files")
def attach(store_id: str, body: NewFile, door: TheDoor, caller: Writer) -> dict[str, Any]:
    """Put a file into a vector store; it is compressed behind the answers, and ``status`` says how far it is."""
    known = find_store(door, caller.tenant, store_id)
    file_record(door, caller.tenant, body.file_id)
    _attach(door, known, {body.file_id: _attributes(body.attributes)})
    return _file(door, _attachment(door, caller.tenant, store_id, body.file_id))


@router.get("/{store_id}/files")
def files(store_id: str, door: TheDoor, caller: Asker, page: Page, filter: str | None = None) -> dict[str, Any]:
    """The files of a vector store, and its documents that came otherwise."""
    find_store(door, caller.tenant, store_id)
    shown = [_file(door, one) for one in door.records.attachments(caller.tenant, store=store_id)]
    others = [one for one in _documents(door, caller.tenant, store_id) if file_of(one.doc_id)[0] is None]
    shown += [_document(one, store_id) for one in others]
    return page_of([one for one in shown if filter in (None, one["status"])], page)


@router.get("/{store_id}/files/{file_id:path}")
def file(store_id: str, file_id: str, door: TheDoor, caller: Asker) -> dict[str, Any]:
    """One file of a vector store."""
    find_store(door, caller.tenant, store_id)
    if other := _other(door, caller.tenant, store_id, file_id):
        return _document(other, store_id)
    return _file(door, _attachment(door, caller.tenant, store_id, file_id))


@router.delete("/{store_id}/files/{file_id:path}")
def detach(store_id: str, file_id: str, door: TheDoor, caller: Writer) -> dict[str, Any]:
    """Take a file out of a vector store; the uploaded file stays."""
    find_store(door, caller.tenant, store_id)
    if _other(door, caller.tenant, store_id, file_id):
        door.engine.delete(file_id, caller.tenant)
    else:
        doomed = door.records.doom(caller.tenant, store=store_id, file=file_id)
        if not doomed:
            _attachment(door, caller.tenant, store_id, file_id)  # raises
        for one in doomed:
            door.background.take_out(one)
    return {"id": file_id, "object": "vector_store.file.deleted", "deleted": True}


# -- batches ----------------------------------------------------------------------------------------------------


@router.post("/{store_id}/file_batches")
def batch(store_id: str, body: NewBatch, door: TheDoor, caller: Writer) -> dict[str, Any]:
    """Put several files into a vector store; what is attached together is asked about together."""
    known = find_store(door, caller.tenant, store_id)
    if (body.file_ids is None) == (body.files is None):
        raise APIError(400, "a batch has either file_ids or files; give one of them", "invalid_value", param="file_ids")
    if body.files is not None and body.attributes is not None:
        raise APIError(
            400, "attributes stand in each of files; leave those beside out", "invalid_value", param="attributes"
        )
    wanted = {one.file_id: _attributes(one.attributes) for one in body.files or ()}
    wanted |= {file_id: _attributes(body.attributes) for file_id in body.file_ids or ()}
    for file_id in wanted:
        file_record(door, caller.tenant, file_id)
    batch_id = f"vsfb_{secrets.token_hex(12)}"
    _attach(door, known, wanted, batch_id)
    return _batch(door, caller.tenant, store_id, batch_id)


@router.get("/{store_id}/file_batches/{batch_id}")
def batch_status(store_id: str, batch_id: str, door: TheDoor, caller: Asker) -> dict[str, Any]:
    """How far a batch is."""
    return _batch(door, caller.tenant, store_id, batch_id)


@router.post("/{store_id}/file_batches/{batch_id}/cancel")
def cancel(store_id: str, batch_id: str, door: TheDoor, caller: Writer) -> dict[str, Any]:
    """Leave the rest of a batch; what is done stays."""
    _batch(door, caller.tenant, store_id, batch_id)
    for one in door.records.attachments(caller.tenant, store=store_id, batch=batch_id, status="in_progress"):
        door.records.settle(one.number, "cancelled")
    return _batch(door, caller.tenant, store_id, batch_id)


@router.get("/{store_id}/file_batches/{batch_id}/files")
def batch_files(store_id: str, batch_id: str, door: TheDoor, caller: Asker, page: Page) -> dict[str, Any]:
    """The files of a batch."""
    _batch(door, caller.tenant, store_id, batch_id)
    found = door.records.attachments(caller.tenant, store=store_id, batch=batch_id)
    return page_of([_file(door, one) for one in found], page)


def _batch(door: Door, tenant: str, store_id: str, batch_id: str) -> dict[str, Any]:
    found = door.records.attachments(tenant, store=store_id, batch=batch_id) if batch_id else []
    if not found:
        raise not_found("batch", batch_id, "a batch whose files were deleted is gone too", "batch_id")
    counts = _counts(found)
    status = "in_progress" if counts["in_progress"] else "cancelled" if counts["cancelled"] else "completed"
    return {
        "id": batch_id,
        "object": "vector_store.files_batch",
        "created_at": min(one.created for one in found),
        "vector_store_id": store_id,
        "status": status,
        "file_counts": counts,
    }


# -- what they are made of --------------------------------------------------------------------------------------


def find_store(door: Door, tenant: str, store_id: str) -> VectorStore:
    """A tenant's vector store; an `APIError` where there is none."""
    known = {one.id: one for one in door.records.stores(tenant)}
    if store_id in known:
        return known[store_id]
    if store_id == DEFAULT or _documents(door, tenant, store_id):
        return VectorStore(tenant, store_id, group_of(store_id), {}, 0)
    raise not_found("vector store", store_id, "GET /v1/vector_stores lists those that are", "vector_store_id")


def _all(door: Door, tenant: str, documents: list[DocumentInfo]) -> list[VectorStore]:
    named = door.records.stores(tenant)
    groups = dict.fromkeys([DEFAULT, *sorted({named_in(one.metadata) for one in documents})])
    known = {one.id for one in named}
    return [*named, *(VectorStore(tenant, group, group_of(group), {}, 0) for group in groups if group not in known)]


def _documents(door: Door, tenant: str, store_id: str) -> list[DocumentInfo]:
    return [one for one in door.engine.documents(tenant) if named_in(one.metadata) == store_id]


def _other(door: Door, tenant: str, store_id: str, doc_id: str) -> DocumentInfo | None:
    """A document of a vector store that was made of no uploaded file."""
    if file_of(doc_id)[0] is not None or doc_id.startswith("file-"):
        return None
    return next((one for one in _documents(door, tenant, store_id) if one.doc_id == doc_id), None)


def _attributes(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Attributes as metadata.

    Raises:
        APIError: one has a name that every document has, or a value of no fitting type.
    """
    if clash := next((key for key in given or {} if key in _RESERVED), None):
        message = f"attributes must not use the names {', '.join(_RESERVED)}, and {clash!r} is one of them"
        raise APIError(400, message, "invalid_value", param="attributes")
    try:
        return plain_metadata(given or {})
    except ConfigError as error:
        raise APIError(400, str(error), "invalid_value", param="attributes") from error


def _attach(door: Door, known: VectorStore, files: Mapping[str, Mapping[str, Any]], batch_id: str = "") -> None:
    if not door.records.attach(known.tenant, known.id, files, batch_id):
        message = "a file must not be in the vector store already, and one of these is; take it out first"
        raise APIError(409, message, "conflict", param="file_id")
    door.background.wake()


def _attachment(door: Door, tenant: str, store_id: str, file_id: str) -> Attachment:
    found = door.records.attachments(tenant, store=store_id, file=file_id)
    if not found:
        raise not_found("file", file_id, "GET /v1/vector_stores/{id}/files lists those that are", "file_id")
    return found[0]


def _counts(found: list[Attachment], others: int = 0) -> dict[str, int]:
    names = ("in_progress", "completed", "failed", "cancelled")
    counts = {name: sum(one.status == name for one in found) for name in names}
    counts["completed"] += others
    return counts | {"total": len(found) + others}


def _store(door: Door, known: VectorStore, documents: list[DocumentInfo] | None = None) -> dict[str, Any]:
    documents = door.engine.documents(known.tenant) if documents is None else documents
    own = [one for one in documents if named_in(one.metadata) == known.id]
    found = door.records.attachments(known.tenant, store=known.id)
    counts = _counts(found, sum(file_of(one.doc_id)[0] is None for one in own))
    return {
        "id": known.id,
        "object": "vector_store",
        "created_at": known.created,
        "last_active_at": max([known.created, *(one.created for one in found)]),
        "name": known.name,
        "metadata": dict(known.metadata),
        "usage_bytes": sum(one.bytes for one in own),
        "file_counts": counts,
        "status": "in_progress" if counts["in_progress"] else "completed",
        "expires_after": None,
        "expires_at": None,
    }


def _file(door: Door, one: Attachment) -> dict[str, Any]:
    documents = door.background.documents_of(one) if one.status == "completed" else []
    step = door.background.step(one)
    return {
        "id": one.file,
        "object": "vector_store.file",
        "created_at": one.created,
        "vector_store_id": one.store,
        "status": one.status,
        "usage_bytes": sum(_bytes(door, name, one.tenant) for name in documents),
        "last_error": {"code": one.code, "message": one.error} if one.error else None,
        "attributes": dict(one.attributes),
        "chunking_strategy": {"type": "other"},
        "lloco": {
            "document": documents[0] if documents else None,
            "documents": documents,
            "segments_done": step.done,
            "segments_total": step.total,
        },
    }


def _bytes(door: Door, doc_id: str, tenant: str) -> int:
    try:
        return door.engine.store.document(doc_id, tenant).bytes
    except NotInStore:  # deleted in between
        return 0


def _document(info: DocumentInfo, store_id: str) -> dict[str, Any]:
    """A document that was ingested otherwise, as a file of its group."""
    return {
        "id": info.doc_id,
        "object": "vector_store.file",
        "created_at": 0,
        "vector_store_id": store_id,
        "status": "completed",
        "usage_bytes": info.bytes,
        "last_error": None,
        "attributes": {
            key: value for key, value in info.metadata.items() if isinstance(value, str | int | float | bool)
        },
        "chunking_strategy": {"type": "other"},
        "lloco": {
            "document": info.doc_id,
            "documents": [info.doc_id],
            "segments_done": info.segments,
            "segments_total": info.segments,
        },
    }
