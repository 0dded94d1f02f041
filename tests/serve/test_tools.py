"""Tools for agents, by the official client: in the process, over HTTP, and as a program that an agent starts."""

from __future__ import annotations

import os
import sys

import httpx
import pytest
import serve_cases
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from serve_cases import CRANES, PUMPS, QUESTION

from lloco_engine import Engine
from lloco_engine.serve.keys import KeyFile
from lloco_engine.serve.tools import http_app, make_server


async def test_tools_read_only_and_answer_as_the_engine_does(engine):
    own = engine.ask(QUESTION, top_k=2, max_new_tokens=6)
    async with Client(make_server(engine)) as client:
        tools = (await client.list_tools()).tools
        assert {tool.name for tool in tools} == {"search", "ask", "list_documents"}
        assert all(tool.annotations.read_only_hint for tool in tools)
        told = (await client.call_tool("ask", {"question": QUESTION, "top_k": 2, "max_tokens": 6})).structured_content
        assert told["answer"] == own.text
        assert [one["document"] for one in told["sources"]] == [hit.doc_id for hit in own.hits]
        found = (await client.call_tool("search", {"question": "crane", "filters": {"year": 2024}})).structured_content
        assert {one["document"] for one in found["sources"]} == {CRANES.doc_id}
        assert all(one["quote"] in CRANES.text for one in found["sources"])
        listed = (await client.call_tool("list_documents", {})).structured_content["documents"]
        assert [one["id"] for one in listed] == [CRANES.doc_id, PUMPS.doc_id]


@pytest.mark.parametrize(
    ("tool", "arguments", "says"),
    [
        ("ask", {"question": " "}, "must not be empty"),
        ("search", {"question": "a", "top_k": 0}, "top_k"),
        ("search", {"question": "a", "filters": {"a": {"$near": 1}}}, "near"),
        ("delete_document", {"id": "pumps.md"}, "delete_document"),
    ],
)
async def test_what_cannot_be_done_is_told(engine, tool, arguments, says):
    async with Client(make_server(engine)) as client:
        told = await client.call_tool(tool, arguments)
        assert told.is_error and says in told.content[0].text


async def test_documents_are_added_and_deleted_where_that_is_allowed(empty_store):
    with empty_store() as engine:
        async with Client(make_server(engine, tenant="acme", write=True)) as client:
            added = await client.call_tool(
                "add_document", {"id": "weir.md", "text": "The weir is white.", "title": "W"}
            )
            assert added.structured_content["segments"] == 1
            assert [one.doc_id for one in engine.documents("acme")] == ["weir.md"]
            assert (await client.call_tool("add_document", {"id": "b", "text": " "})).is_error
            assert (await client.call_tool("delete_document", {"id": "weir.md"})).structured_content["deleted"]
            assert (await client.call_tool("delete_document", {"id": "weir.md"})).is_error


async def test_over_http_each_key_has_its_own_tenant(empty_store, keys_file, listen):
    keys = KeyFile(keys_file)
    reads, _ = keys.add("", "read")
    other, _ = keys.add("other")
    with empty_store() as engine:
        engine.ingest(serve_cases.DOCUMENTS)
        address = listen(http_app(make_server(engine, write=True), keys=keys, tenant=""))
        assert httpx.post(f"{address}/mcp", json={}).status_code == 401

        async def documents(key: str) -> list[str]:
            headers = {"Authorization": f"Bearer {key}"}
            async with (
                httpx.AsyncClient(headers=headers) as http,
                Client(streamable_http_client(f"{address}/mcp", http_client=http)) as client,
            ):
                assert (await client.call_tool("delete_document", {"id": "pumps.md"})).is_error
                told = await client.call_tool("list_documents", {})
                return [one["id"] for one in told.structured_content["documents"]]

        assert await documents(reads) == [CRANES.doc_id, PUMPS.doc_id]
        assert await documents(other) == ["secret.md"]
        assert [one.doc_id for one in engine.documents("")] == [CRANES.doc_id, PUMPS.doc_id]


async def test_an_agent_starts_the_program(tmp_path, tiny_folder):
    from lloco_engine.testing import HashingEmbedder

    code = (
        "import sys; from lloco_engine.testing import HashingEmbedder; from lloco_engine import Engine;"
        "from lloco_engine.serve.tools import run_stdio;"
        f"engine = Engine.open({str(tmp_path / 'store')!r}, decoder={str(tiny_folder)!r}, embedder=HashingEmbedder());"
        "run_stdio(engine, tenant='', write=False, say=lambda text: print(text, file=sys.stderr))"
    )
    with Engine.open(tmp_path / "store", decoder=str(tiny_folder), embedder=HashingEmbedder()) as engine:
        engine.ingest(PUMPS)
        own = engine.ask(QUESTION, max_new_tokens=4).text
    started = StdioServerParameters(command=sys.executable, args=["-c", code], env=dict(os.environ))
    async with Client(started, read_timeout_seconds=60) as client:
        told = await client.call_tool("ask", {"question": QUESTION, "max_tokens": 4})
        assert told.structured_content["answer"] == own
