"""Trials: many at once beside writers, requests made from the description of the API, and kill -9."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from serve_cases import QUESTION, until, user

from lloco_engine import Document
from lloco_engine.serve.app import create_app
from lloco_engine.serve.keys import KeyFile
from lloco_engine.serve.limits import Limits

# -- requests made from the description -------------------------------------------------------------------------


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "derandomize": True}
LENGTHS = ("max_tokens", "max_completion_tokens", "max_new_tokens", "reasoning_tokens", "min_new_tokens")


def check(case) -> None:
    """No request that the description allows, or almost does, is a fault of the server's."""
    if isinstance(case.body, dict):  # an answer's length is not what is tried
        case.body |= {name: 8 for name in LENGTHS if isinstance(case.body.get(name), int) and case.body[name] > 8}
    answer = case.call(timeout=60)
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error["message"] and error["type"] and error["code"]


@pytest.mark.parametrize("examples", [1, pytest.param(40, marks=pytest.mark.slow)])
def test_requests_made_from_the_description_find_no_fault(address, examples):
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    tried = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in GenerationMode:
            limits = settings(max_examples=examples, phases=(Phase.generate,), **QUIET)
            limits(given(case=operation.as_strategy(generation_mode=mode))(check))()
        tried += 1
    assert tried > 25


# -- many at once -----------------------------------------------------------------------------------------------


def _resident() -> int:
    """Bytes that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
async def test_five_hundred_requests_of_four_tenants_beside_writers(empty_store, keys_file, listen):
    """None is lost, none is another tenant's, and memory does not grow after the first hundred."""
    keys, names = KeyFile(keys_file), ("north", "east", "south", "west")
    given = {name: keys.add(name)[0] for name in names}
    with empty_store() as engine:
        for name in names:
            engine.ingest(Document("own.md", f"The pump of {name} stands in hall {len(name)} of {name}.", tenant=name))
        own = {
            name: engine.ask(QUESTION, tenant=name, whole_document="own.md", max_new_tokens=6).text for name in names
        }
        address = listen(create_app(engine, keys=keys, limits=Limits(concurrent=8, queue=64)))
        statuses: Counter[int] = Counter()
        grown: list[int] = []
        writing = True

        async def ask(http: httpx.AsyncClient, number: int, places: asyncio.Semaphore) -> None:
            name = names[number % 4]
            body = {"model": "lloco", "messages": user(QUESTION), "max_tokens": 6, "stream": number % 3 == 0}
            body |= {"whole_document": "own.md"} if number % 2 else {"top_k": 3}
            async with places:
                answer = await http.post(
                    f"{address}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {given[name]}"}
                )
            statuses[answer.status_code] += 1
            if number in (100, 499):
                gc.collect()
                grown.append(_resident())
            if body["stream"]:
                parts = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
                text = "".join(part["choices"][0]["delta"].get("content") or "" for part in parts)
                told = parts[-1]["lloco"]
            else:
                text, told = answer.json()["choices"][0]["message"]["content"], answer.json()["lloco"]
            if number % 2:
                assert text == own[name]
            assert told["sources"]
            for source in told["sources"]:
                assert name in source["text"], "another tenant's document was read"

        async def write(http: httpx.AsyncClient, name: str) -> int:
            done, headers = 0, {"Authorization": f"Bearer {given[name]}"}
            while writing:
                sent = {"file": (f"{done}.md", f"Note {done} of {name} about a pump.".encode())}
                made = await http.post(
                    f"{address}/v1/files", files=sent, data={"purpose": "assistants"}, headers=headers
                )
                file = made.json()["id"]
                await http.post(f"{address}/v1/vector_stores/default/files", json={"file_id": file}, headers=headers)
                await asyncio.sleep(0.1)
                gone = await http.delete(f"{address}/v1/files/{file}", headers=headers)
                assert gone.status_code == 200, gone.text
                done += 1
            return done

        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=64)) as http:
            writers = [asyncio.create_task(write(http, name)) for name in names]
            places = asyncio.Semaphore(32)
            await asyncio.gather(*(ask(http, number, places) for number in range(500)))
            writing = False
            written = await asyncio.gather(*writers)
        assert statuses == {200: 500}
        assert all(written)
        until(lambda: [one.doc_id for one in engine.documents()] == ["own.md"] * 4)
        print(f"\n500 answers, {sum(written)} files beside them, {grown[1] - grown[0]:,} bytes grown")
        assert grown[1] - grown[0] < 60_000_000


# -- kill -9 ----------------------------------------------------------------------------------------------------

SERVE = """
import sys, time
from lloco_engine import Engine
from lloco_engine.config import ChunkConfig, CompressConfig
from lloco_engine.serve.running import run
from lloco_engine.testing import HashingEmbedder
engine = Engine.open(sys.argv[1], decoder=sys.argv[2], embedder=HashingEmbedder(),
    chunk=ChunkConfig(segment_tokens=64, window_tokens=24, window_overlap=4),
    compress=CompressConfig("uncompressed", 1))
compress = engine.compressor.compress
def slow(*args, **options):
    time.sleep(float(sys.argv[3]))
    return compress(*args, **options)
engine.compressor.compress = slow
run(engine, host="127.0.0.1", port=0, keys=None, say=lambda text: print(text, flush=True))
"""


@contextmanager
def process(store: Path, decoder: Path, pause: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server as a process of its own, and its address."""
    arguments = [sys.executable, "-c", SERVE, str(store), str(decoder), str(pause)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as made:
        try:
            line = next(line for line in made.stdout if "listening on" in line)
            yield made, line.split()[2]
        finally:
            made.kill()


@pytest.mark.slow
def test_a_kill_in_mid_upload_and_in_mid_ingest_loses_nothing_that_was_acknowledged(tmp_path, tiny_folder):
    text = " ".join(f"The sluice number {number} was painted white." for number in range(80)).encode()
    store = tmp_path / "store"
    with process(store, tiny_folder, 0.1) as (server, address):
        sent = {"file": ("sluices.md", text)}
        file = httpx.post(f"{address}/v1/files", files=sent, data={"purpose": "assistants"}).json()["id"]
        attached = f"{address}/v1/vector_stores/default/files"
        assert httpx.post(attached, json={"file_id": file}).json()["status"] == "in_progress"
        until(lambda: httpx.get(f"{attached}/{file}").json()["lloco"]["segments_done"] >= 2)
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as half:
            half.sendall(
                b"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000\r\n"
                b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\nContent-Disposition: form-data; "
                b'name="file"; filename="half.md"\r\n\r\n' + b"x" * 5000
            )
            server.send_signal(signal.SIGKILL)
            server.wait()
    with process(store, tiny_folder, 0.0) as (server, address):
        attached = f"{address}/v1/vector_stores/default/files/{file}"
        assert [one["id"] for one in httpx.get(f"{address}/v1/files").json()["data"]] == [file]
        assert httpx.get(f"{address}/v1/files/{file}/content").content == text
        until(lambda: httpx.get(attached).json()["status"] == "completed", 60)
        document = httpx.get(attached).json()["lloco"]["document"]
        assert httpx.get(f"{address}/lloco/documents/{document}/text").json()["text"].encode() == text
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) in (0, -signal.SIGTERM)
    assert [path.name for path in (store / "serve" / "files").iterdir()] == [file]
