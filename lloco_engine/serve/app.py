"""The server as one ASGI application: its parts put together around an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Response
from fastapi.security import HTTPBearer
from filelock import FileLock, Timeout

from lloco_engine import __version__
from lloco_engine.config import ReadConfig
from lloco_engine.engine import Engine
from lloco_engine.errors import StoreError
from lloco_engine.serve import chat, comparing, errors, files, inventory, search, static, vector_stores
from lloco_engine.serve.background import Background
from lloco_engine.serve.door import Door, TheDoor
from lloco_engine.serve.errors import APIError
from lloco_engine.serve.gate import Gate
from lloco_engine.serve.keys import KeyFile
from lloco_engine.serve.limits import Admission, Limits
from lloco_engine.serve.metrics import CONTENT_TYPE, Metrics
from lloco_engine.serve.records import Records
from lloco_engine.serve.uploads import Uploads

__all__ = ["create_app"]

App = Callable[[Any, Any, Any], Any]
_health = APIRouter(tags=["operation"])


@_health.get("/healthz")
async def alive() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@_health.get("/readyz")
async def ready(door: TheDoor) -> dict[str, str]:
    """Store and decoder are there; 503 until they are, and while the server stops."""
    if door.ready:
        raise APIError(503, door.ready, "not_ready", headers={"Retry-After": "1"})
    return {"status": "ok"}


@_health.get("/metrics", response_class=Response)
def metrics(door: TheDoor) -> Response:
    """Figures of the whole server, as Prometheus reads them."""
    door.metrics.cached(*door.engine.store.held_segments())
    return Response(door.metrics.text(), media_type=CONTENT_TYPE)


_PARTS = (
    chat.router,
    comparing.router,
    files.router,
    search.router,
    vector_stores.router,
    inventory.router,
    _health,
    static.router,
)


def create_app(engine: Engine, *, keys: KeyFile | None = None, tenant: str = "", limits: Limits | None = None) -> App:
    """An ASGI application that answers from an engine.

    Args:
        engine: open; whoever opened it closes it, after the application.
        keys: who may ask; None where nobody needs a key: then it must listen on a loopback address alone.
        tenant: whose documents are served without keys.
        limits: of requests.

    Raises:
        StoreError: another server has the store, or its folder cannot be written to.
    """
    limits = limits or Limits()
    figures = Metrics()
    folder = engine.store.path / "serve"
    held = FileLock(folder / "lock", thread_local=False)  # a server may stop in another thread than it began in
    try:
        folder.mkdir(exist_ok=True)
        held.acquire(timeout=0)
    except Timeout:
        raise StoreError(f"a store has one server at a time, and another serves {engine.store.path}; stop it") from None
    except OSError as error:
        raise StoreError(f"a server keeps uploads in {folder}, and cannot write there: {error.strerror}") from error
    records = Records(folder / "records.sqlite")
    uploads = Uploads(folder / "files", records)
    read = ReadConfig(max_bytes=limits.upload_bytes)
    background = Background(engine, records, uploads, figures, read)
    door = Door(engine, limits, Admission(limits, figures.load), figures, records, uploads, background)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        background.start()
        door.ready = ""
        yield
        door.ready = "the server stops"
        await asyncio.to_thread(background.stop)
        records.close()
        held.release()

    app = FastAPI(
        title="LLoCO",
        version=__version__,
        description="Answers from documents that were compressed into memories, in the form of the OpenAI API.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        dependencies=[Depends(HTTPBearer(auto_error=False))],
    )
    app.state.door = door
    errors.install(app)
    for part in _PARTS:
        app.include_router(part)
    return Gate(app, keys=keys, tenant=tenant, limits=limits, metrics=figures)
