"""Files: uploaded, listed, read back and deleted, as the API has it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Form, Query, UploadFile
from fastapi.responses import FileResponse

from lloco_engine.serve.door import Asker, Door, TheDoor, Writer
from lloco_engine.serve.errors import APIError, not_found
from lloco_engine.serve.paging import Page, page_of
from lloco_engine.serve.records import FileRecord

__all__ = ["file_record", "router"]

router = APIRouter(prefix="/v1/files", tags=["files"])
_PURPOSES = ("assistants", "user_data")


@router.post("")
def upload(door: TheDoor, caller: Writer, file: UploadFile, purpose: Annotated[str, Form()]) -> dict[str, Any]:
    """Keep a file. It is searched once it is in a vector store."""
    if purpose not in _PURPOSES:
        message = f"a purpose must be one of {', '.join(_PURPOSES)}, not {purpose!r:.80}"
        raise APIError(400, message, "invalid_value", param="purpose")
    return _shown(door.uploads.add(file.filename or "", file.file, caller.tenant, purpose))


@router.get("")
def files(
    door: TheDoor, caller: Asker, page: Page, purpose: Annotated[str | None, Query(description="Only these.")] = None
) -> dict[str, Any]:
    """The uploaded files, newest first."""
    found = [one for one in door.records.files(caller.tenant) if purpose in (None, one.purpose)]
    return page_of([_shown(one) for one in found], page)


@router.get("/{file_id}")
def file(file_id: str, door: TheDoor, caller: Asker) -> dict[str, Any]:
    """One file."""
    return _shown(file_record(door, caller.tenant, file_id))


@router.get("/{file_id}/content", response_class=FileResponse)
def content(file_id: str, door: TheDoor, caller: Asker) -> FileResponse:
    """The bytes of a file, to be kept and not to be shown: a browser runs nothing of it."""
    path = door.uploads.path(file_record(door, caller.tenant, file_id))
    headers = {"Content-Disposition": "attachment", "Content-Security-Policy": "sandbox; default-src 'none'"}
    return FileResponse(path, media_type="application/octet-stream", headers=headers)


@router.delete("/{file_id}")
def delete(file_id: str, door: TheDoor, caller: Writer) -> dict[str, Any]:
    """Remove a file, and what was made of it from every vector store."""
    record = file_record(door, caller.tenant, file_id)
    for one in door.records.doom(caller.tenant, file=file_id):
        door.background.take_out(one)
    door.uploads.remove(record)
    return {"id": file_id, "object": "file", "deleted": True}


def file_record(door: Door, tenant: str, file_id: str) -> FileRecord:
    """What is known of a tenant's file; an `APIError` where there is none."""
    found = door.records.files(tenant, file_id)
    if not found:
        raise not_found("file", file_id, "GET /v1/files lists those that are", "file_id")
    return found[0]


def _shown(record: FileRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.bytes,
        "created_at": record.created,
        "filename": record.filename,
        "purpose": record.purpose,
        "status": "processed",
    }
