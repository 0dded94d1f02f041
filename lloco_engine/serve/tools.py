"""Tools for agents, by the Model Context Protocol: search, ask, list; and, where that is allowed, add and delete."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import uvicorn
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.transport_security import TransportSecuritySettings
from mcp_types import ToolAnnotations
from pydantic import Field

from lloco_engine import __version__
from lloco_engine.engine import Engine
from lloco_engine.errors import LLoCOError
from lloco_engine.serve import logs
from lloco_engine.serve.answers import source, usage
from lloco_engine.serve.errors import api_error_of
from lloco_engine.serve.gate import App, Gate
from lloco_engine.serve.keys import Caller, KeyFile
from lloco_engine.serve.limits import Limits
from lloco_engine.serve.metrics import Metrics
from lloco_engine.serve.running import ServerThatSays, uvicorn_config
from lloco_engine.types import Document

__all__ = ["http_app", "make_server", "run_http", "run_stdio"]

_T = TypeVar("_T")
_READS = ToolAnnotations(read_only_hint=True, open_world_hint=False)
_ADDS = ToolAnnotations(read_only_hint=False, destructive_hint=True, idempotent_hint=True, open_world_hint=False)
_log = logging.getLogger("lloco.serve")

Question = Annotated[str, Field(description="In the words of the documents where you know them.", max_length=32_000)]
TopK = Annotated[int, Field(ge=1, le=50, description="How many segments of the documents to read.")]
Filters = Annotated[
    dict[str, Any] | None,
    Field(
        description='Which documents: {"year": 2024}, {"year": {"$gte": 2020}}, {"$or": [...]}, keys as in metadata.'
    ),
]


def make_server(engine: Engine, *, tenant: str = "", write: bool = False) -> MCPServer:
    """A server of tools on an engine. They only read, unless ``write`` is set.

    Args:
        engine: open.
        tenant: whose documents; over HTTP the key says whose.
        write: add the tools that add and delete documents.
    """
    server: MCPServer = MCPServer(
        "lloco",
        title="LLoCO",
        version=__version__,
        instructions="Documents that were compressed into memories. `ask` answers from them with sources; `search` "
        "finds passages, word for word; cite what `document` and `page` say.",
    )

    def caller(context: Context) -> Caller:
        request = context.request_context.request
        return Caller(tenant, "write" if write else "read") if request is None else request.state.caller

    @server.tool(annotations=_READS)
    async def search(context: Context, question: Question, top_k: TopK = 4, filters: Filters = None) -> dict[str, Any]:
        """Find the passages of the documents that fit a question, best first, word for word."""
        who = caller(context).tenant
        hits = await _done(lambda: engine.retrieve(question, tenant=who, filters=filters, top_k=top_k))
        return {"sources": [source(hit) for hit in hits]}

    @server.tool(annotations=_READS)
    async def ask(
        context: Context,
        question: Question,
        top_k: TopK = 4,
        filters: Filters = None,
        max_tokens: Annotated[int, Field(ge=1, description="Of the longest answer.")] = 256,
    ) -> dict[str, Any]:
        """Answer a question from the documents, with the passages that the answer stands on."""
        who = caller(context).tenant
        wanted = {"tenant": who, "filters": filters, "top_k": top_k, "max_new_tokens": max_tokens}
        answer = await _done(lambda: engine.ask(question, **wanted))
        short = [{name: value for name, value in source(hit).items() if name != "text"} for hit in answer.hits]
        return {
            "answer": answer.text,
            "sources": short,
            "warnings": list(answer.warnings),
            "usage": usage(answer.usage),
        }

    @server.tool(annotations=_READS)
    async def list_documents(context: Context) -> dict[str, Any]:
        """What documents there are: their ids, titles, sizes and metadata."""
        who = caller(context).tenant
        found = await _done(lambda: engine.documents(who))
        shown = [
            {
                "id": one.doc_id,
                "title": one.title,
                "source": one.source,
                "tokens": one.source_tokens,
                "pages": one.pages,
            }
            | {"metadata": dict(one.metadata)}
            for one in found
        ]
        return {"documents": shown}

    if write:
        _add_writing(server, engine, caller)
    return server


def _add_writing(server: MCPServer, engine: Engine, caller: Callable[[Context], Caller]) -> None:
    def writer(context: Context) -> str:
        who = caller(context)
        if who.scope != "write":
            raise ToolError("this key only reads; use one of `lloco keys add` without --read-only")
        return who.tenant

    @server.tool(annotations=_ADDS)
    async def add_document(
        context: Context,
        id: Annotated[str, Field(description="Another text under the same id replaces the former.")],
        text: str,
        title: str = "",
    ) -> dict[str, Any]:
        """Compress a document into the store; this takes seconds to minutes."""
        who = writer(context)
        report = await _done(lambda: engine.ingest(Document(id, text, title, source=id), tenant=who))
        if report.failed:
            raise ToolError(report.failed[0].reason)
        return {"id": id, "segments": report.segments, "tokens": report.source_tokens}

    @server.tool(annotations=_ADDS)
    async def delete_document(context: Context, id: str) -> dict[str, Any]:
        """Remove a document from the store."""
        who = writer(context)
        await _done(lambda: engine.delete(id, who))
        return {"id": id, "deleted": True}


async def _done(work: Callable[[], _T]) -> _T:
    """The result of some work in a thread; what the engine refuses is told to the agent."""
    try:
        return await asyncio.to_thread(work)
    except LLoCOError as error:
        refused = api_error_of(error)
        if refused.status_code >= 500:
            _log.error("the engine refused", exc_info=error)
        raise ToolError(str(refused.detail)) from error


def http_app(server: MCPServer, *, keys: KeyFile | None, tenant: str, limits: Limits | None = None) -> App:
    """The tools at ``/mcp``, behind the same gate as the API."""
    own = TransportSecuritySettings(enable_dns_rebinding_protection=False)  # the gate checks host, origin and key
    app = server.streamable_http_app(stateless_http=True, json_response=True, transport_security=own)
    return Gate(app, keys=keys, tenant=tenant, limits=limits or Limits(), metrics=Metrics())


def _load(engine: Engine, say: Callable[[str], None]) -> None:
    began = time.perf_counter()
    say("loading the decoder and the search embedder ...")
    _ = engine.embedder.dim, engine.decoder
    say(f"loaded in {time.perf_counter() - began:.1f} s")


def run_stdio(engine: Engine, *, tenant: str, write: bool, say: Callable[[str], None]) -> None:
    """Serve an agent that started this process, over its standard input and output."""
    _load(engine, say)
    say("waiting for an agent on standard input")
    make_server(engine, tenant=tenant, write=write).run("stdio")


def run_http(
    engine: Engine,
    *,
    host: str,
    port: int,
    keys: KeyFile | None,
    tenant: str,
    write: bool,
    say: Callable[[str], None],
) -> None:
    """Serve agents at an address until the process is told to stop; arguments are those of `running.run`."""
    logs.install()
    _load(engine, say)
    app = http_app(make_server(engine, tenant=tenant, write=write), keys=keys, tenant=tenant)
    config: uvicorn.Config = uvicorn_config(app, host, port)
    ServerThatSays(config, say, "{address}/mcp (streamable HTTP)").run()
