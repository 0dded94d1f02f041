"""What all parts of a server share, and who asks it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from lloco_engine.engine import Engine
from lloco_engine.serve.background import Background
from lloco_engine.serve.errors import APIError
from lloco_engine.serve.keys import Caller
from lloco_engine.serve.limits import Admission, Limits
from lloco_engine.serve.metrics import Metrics
from lloco_engine.serve.records import Records
from lloco_engine.serve.uploads import Uploads

__all__ = ["Asker", "Door", "TheDoor", "Writer"]


@dataclass
class Door:
    """An engine, and what stands before it. ``ready`` says why it cannot answer, if it cannot."""

    engine: Engine
    limits: Limits
    admission: Admission
    metrics: Metrics
    records: Records
    uploads: Uploads
    background: Background
    ready: str = "the server starts"


async def _door(request: Request) -> Door:
    door: Door = request.app.state.door
    return door


async def _asker(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


async def _writer(request: Request) -> Caller:
    caller = await _asker(request)
    if caller.scope != "write":
        message = "this key only reads, and this request changes something; use a key made without --read-only"
        raise APIError(403, message, "insufficient_permissions")
    return caller


TheDoor = Annotated[Door, Depends(_door)]
Asker = Annotated[Caller, Depends(_asker)]  # who asks
Writer = Annotated[Caller, Depends(_writer)]  # who asks, and may change something
