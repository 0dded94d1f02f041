"""What HTTP adds to the first token: the engine's own and the server's, measured in turn in one process.

``python -m lloco_engine.serve.overhead STORE QUESTION`` prints medians in milliseconds as JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence

import uvicorn

from lloco_engine.engine import Engine
from lloco_engine.serve.app import create_app
from lloco_engine.serve.running import uvicorn_config

__all__ = ["measure"]

_TOKENS = 4


def measure(engine: Engine, question: str, rounds: int = 50) -> dict[str, float]:
    """Milliseconds to the first piece of text, by the engine and through HTTP, one after the other in each round.

    Args:
        engine: open; its store must have no server.
        question: asked each time, so that all is warm.
        rounds: how often.

    Returns:
        medians of both, and the median of the differences within a round.
    """
    server = uvicorn.Server(uvicorn_config(create_app(engine), "127.0.0.1", 0))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        _engine(engine, question), _http(port, question)  # warm
        both = [(_engine(engine, question), _http(port, question)) for _ in range(rounds)]
    finally:
        server.should_exit = True
        thread.join()
    own, served = zip(*both, strict=True)
    difference = statistics.median(after - before for before, after in both)
    made = {"engine_ms": statistics.median(own), "http_ms": statistics.median(served), "difference_ms": difference}
    return {name: round(value * 1000, 2) for name, value in made.items()} | {"rounds": rounds}


def _engine(engine: Engine, question: str) -> float:
    began = time.perf_counter()
    with engine.stream(question, max_new_tokens=_TOKENS) as stream:
        next(iter(stream), None)
        took = time.perf_counter() - began
        for _ in stream:
            pass
    return took


def _http(port: int, question: str) -> float:
    body = {
        "model": "lloco",
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "max_tokens": _TOKENS,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    began, took = time.perf_counter(), 0.0
    with urllib.request.urlopen(request, timeout=600) as answer:
        for line in answer:
            if not took and b'"delta": {"content"' in line:
                took = time.perf_counter() - began
    return took


def main(arguments: Sequence[str]) -> None:
    """Measure a store."""
    if len(arguments) != 2:
        sys.exit("usage: python -m lloco_engine.serve.overhead STORE QUESTION")
    with Engine.open(arguments[0], create=False) as engine:
        print(json.dumps(measure(engine, arguments[1])))


if __name__ == "__main__":
    main(sys.argv[1:])
