"""kill -9 of a vLLM server, and of the gateway in front of it: who was being answered is told, and never gets a shorter
answer for a whole one; what is started again answers as before."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve_cases import until, user
from vllm_server_cases import has_vllm, served_as_printed

from lloco_engine import Engine
from lloco_engine.demo import questions

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not has_vllm(), reason="needs vLLM: make vllm-test")]

QUESTION = questions()[0].question


@contextmanager
def gateway(store: Path, url: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``lloco serve`` in front of a vLLM server, and its address."""
    command = [sys.executable, "-m", "lloco_engine", "serve", "--store", str(store), "--port", "0"]
    command += ["--decoder", f"vllm:{url}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        try:
            while not said or "listening on" not in said[-1]:
                said.append(process.stderr.readline())
                assert said[-1], f"the gateway ended: {''.join(said)}"
            yield process, said[-1].split()[2]
        finally:
            process.kill()


def body(**more: Any) -> dict[str, Any]:
    return {"model": "lloco", "messages": user(QUESTION), "max_tokens": 12} | more


def ask(address: str) -> httpx.Response:
    return httpx.post(f"{address}/v1/chat/completions", json=body(), timeout=120)


def answer(address: str) -> str:
    response = ask(address)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


@contextmanager
def streamed(address: str) -> Iterator[Iterator[dict[str, Any]]]:
    """The events of a long answer, of which the first pieces have come."""
    long = body(stream=True, max_tokens=600, min_new_tokens=600)

    def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
        for line in lines:
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))  # [DONE] is none, and must not come

    with httpx.stream("POST", f"{address}/v1/chat/completions", json=long, timeout=120) as response:
        made = events(response.iter_lines())
        for _ in range(4):
            assert next(made)["choices"][0]["finish_reason"] is None
        yield made


def test_who_is_killed_is_missed_and_comes_back(store, key_file, tmp_path, monkeypatch):
    monkeypatch.setenv("LLOCO_VLLM_KEY_FILE", str(key_file))
    with Engine.open(store) as engine:
        wanted = engine.ask(QUESTION, max_new_tokens=12).text
    with ExitStack() as stack:
        server = stack.enter_context(served_as_printed(store, key_file, tmp_path))
        process, address = stack.enter_context(gateway(store, server.url))
        assert answer(address) == wanted

        with streamed(address) as events:
            server.kill()
            rest = list(events)
        assert rest.pop()["error"]["code"] == "decoder_unavailable"
        assert all(one["choices"][0]["finish_reason"] is None for one in rest)
        for _ in range(3):
            refused = ask(address)
            assert refused.status_code == 503 and refused.headers["Retry-After"]
            assert refused.json()["error"]["code"] == "decoder_unavailable"

        again = stack.enter_context(served_as_printed(store, key_file, tmp_path, int(server.url.rsplit(":", 1)[1])))
        assert again.url == server.url and answer(address) == wanted, "the gateway did not find the server again"

        with streamed(address) as events:
            process.send_signal(signal.SIGKILL)
            with pytest.raises(httpx.TransportError):
                list(events)
        until(lambda: again.metric("vllm:num_requests_running") == 0, 60)
        _, other = stack.enter_context(gateway(store, again.url))
        assert answer(other) == wanted
