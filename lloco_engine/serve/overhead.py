"""What HTTP adds to the first token: the engine's own and the server's, measured in turn in one run.

``python -m lloco_engine.serve.overhead STORE QUESTION`` prints medians in milliseconds as JSON.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from lloco_engine.engine import Engine
from lloco_engine.errors import LLoCOError
from lloco_engine.serve.running import serving, take_turns

__all__ = ["measure"]

_TOKENS = 4
_CLIENT = """
import json, sys, time, urllib.request
address, question, tokens = sys.argv[1:]
said = [{"role": "user", "content": question}]
body = {"model": "lloco", "messages": said, "stream": True, "max_tokens": int(tokens)}
request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
for _ in sys.stdin:
    began, took = time.perf_counter(), 0.0
    with urllib.request.urlopen(request, timeout=600) as answer:
        for line in answer:
            if not took and b'"delta": {"content"' in line:
                took = time.perf_counter() - began
    print(took, flush=True)
"""


def measure(engine: Engine, question: str, rounds: int = 50) -> dict[str, float]:
    """Milliseconds to the first piece of text, by the engine and through HTTP, one after the other in each round.

    Args:
        engine: open; its store must have no server.
        question: asked each time, so that all is warm.
        rounds: how often.

    Returns:
        medians of both, and the median of the differences within a round.
    """
    with serving(engine) as address, _client(address, question) as ask:
        _engine(engine, question), ask()  # warm
        both = [(_engine(engine, question), ask()) for _ in range(rounds)]
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


@contextmanager
def _client(address: str, question: str) -> Iterator[Callable[[], float]]:
    """What asks once and gives the seconds: a process of its own, as clients are."""
    arguments = [sys.executable, "-c", _CLIENT, f"{address}/v1/chat/completions", question, str(_TOKENS)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as made:
        asks, told = made.stdin, made.stdout
        if asks is None or told is None:
            raise LLoCOError("the client has no pipes")

        def ask() -> float:
            asks.write("\n")
            asks.flush()
            return float(told.readline())

        try:
            yield ask
        finally:
            asks.close()


def main(arguments: Sequence[str]) -> None:
    """Measure a store."""
    if len(arguments) != 2:
        sys.exit("usage: python -m lloco_engine.serve.overhead STORE QUESTION")
    take_turns()  # as `lloco serve` has it
    with Engine.open(arguments[0], create=False) as engine:
        print(json.dumps(measure(engine, arguments[1])))


if __name__ == "__main__":
    main(sys.argv[1:])
