"""What stands before vLLM's server: a memory that cannot be right gets 400 and a reason, and all else goes on."""

from __future__ import annotations

import json
import random
import time
from itertools import chain, islice
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from forgery_cases import forged, outdated
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.routing import Route
from vllm_server_cases import KEY, made_store

from lloco_engine import SegmentReader
from lloco_integrations.vllm.params import FIELD, Memory, sign, store_fingerprint
from lloco_integrations.vllm.refusals import Refusals


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return made_store(tmp_path_factory.mktemp("refusals"))[0]


@pytest.fixture
async def server(store, tmp_path):
    """A client of what vLLM's server is here: it says what it was sent."""

    async def said(request):
        return JSONResponse({"got": len(await request.body()), "gone": await request.is_disconnected()})

    key_file = tmp_path / "key"
    key_file.write_bytes(KEY)
    app = Starlette(routes=[Route("/v1/completions", said, methods=["POST"])], middleware=[Middleware(Refusals)])
    extra = {"store": str(store), "key_file": str(key_file)}
    app.state.vllm_config = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector_extra_config=extra))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://vllm") as client:
        yield client


def signed(store, **more: Any) -> dict[str, Any]:
    fingerprint = store_fingerprint(SegmentReader(store).manifest)
    told = {"template": 4, "expires": int(time.time()) + 60, "segments": ("1" * 32,)} | more
    return sign(Memory(fingerprint, **told), [KEY])[FIELD]


async def post(server: httpx.AsyncClient, memory: Any, **more: Any) -> httpx.Response:
    text = json.dumps({"kv_transfer_params": {FIELD: memory}} | more)
    return await server.post("/v1/completions", content=text)


async def test_a_memory_that_is_wrong_gets_400_and_the_reason(server, store):
    good, other = signed(store), signed(store, tenant="blue", segments=("2" * 32, "3" * 32))
    assert (await post(server, good)).status_code == 200
    for value in chain(outdated(good, KEY), islice(forged(good, other, random.Random(0)), 300)):
        refused = await post(server, value)
        assert refused.status_code == 400, value
        error = refused.json()["error"]
        assert error["message"] and (error["code"], error["param"]) == (400, "kv_transfer_params")
    assert "has expired" in (await post(server, outdated(good, KEY)[0])).json()["error"]["message"]
    assert (await post(server, good)).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"kv_transfer_params": 7}',
        b'{"kv_transfer_params": {}}',
        b'{"prompt": "lloco"}',
        b"\xff\x00",
    ],
)
async def test_what_says_nothing_of_a_memory_goes_on_as_it_came(server, body):
    assert (await server.post("/v1/completions", content=body)).json() == {"got": len(body), "gone": False}
    assert (await server.get("/v1/completions")).status_code == 405


async def test_a_body_of_many_pieces_arrives_whole_and_a_long_one_unread(server, store):
    def pieces(memory: Any, padding: int) -> Any:
        text = json.dumps({"kv_transfer_params": {FIELD: memory}, "prompt": "x" * padding}).encode()

        async def parts():
            for start in range(0, len(text), 100_000):
                yield text[start : start + 100_000]

        return len(text), parts()

    good, bad = signed(store), signed(store) | {"tenant": "blue"}
    for memory, padding, status in ((good, 1_000_000, 200), (bad, 1_000_000, 400), (good, 5_000_000, 200)):
        size, body = pieces(memory, padding)
        answer = await server.post("/v1/completions", content=body)
        assert answer.status_code == status
        assert status == 400 or answer.json() == {"got": size, "gone": False}
