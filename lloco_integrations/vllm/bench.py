"""``python -m lloco_integrations.vllm.bench``: what memories cost a running vLLM server, beside the text itself.

Prompts are random tokens of the sizes that a question has, since speed does not ask what they say; segments are the
store's, and as many tokens as they stand for take their place where they are in context. The prefix cache finds nothing
twice. Progress goes to stderr, and the last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lloco_engine import SegmentReader
from lloco_integrations.vllm.params import Memory, read_keys, sign, store_fingerprint

if TYPE_CHECKING:
    import httpx

__all__ = ["main"]

TEMPLATE, QUESTION = 24, 24  # tokens
_LOWEST, _HIGHEST = 1000, 20000  # ids that are drawn: letters and words in any tokenizer of these sizes


@dataclass(frozen=True)
class Timing:
    """Of one answer: seconds to its first token, to each further one on average, and how many there were."""

    first_s: float
    step_s: float
    tokens: int


class Bench:
    """Asks a server.

    Args:
        client: of the server.
        model: name of what it serves.
        store: folder of the store that it reads.
        keys: that it accepts.
        draw: of tokens and segments.
    """

    def __init__(
        self, client: httpx.Client, model: str, store: Path, keys: Sequence[bytes], draw: random.Random
    ) -> None:
        self._client, self._model, self._keys, self._draw = client, model, keys, draw
        reader = SegmentReader(store)
        self._store = store_fingerprint(reader.manifest)
        self.sizes = {
            path.stem: int(reader.read(path.stem).source_tokens) for path in sorted(store.glob("segments/*/*"))
        }

    def segments(self, many: int) -> list[str]:
        """So many of the store's, drawn."""
        return self._draw.sample(list(self.sizes), many)

    def plain(self, tokens: int = 0) -> dict[str, Any]:
        """A request without a memory; with so many tokens in context."""
        drawn = [self._draw.randint(_LOWEST, _HIGHEST) for _ in range(TEMPLATE + tokens + QUESTION)]
        return {"prompt": drawn, "cache_salt": f"{self._draw.getrandbits(64)}"}

    def in_context(self, segments: Sequence[str]) -> dict[str, Any]:
        """A request with as many tokens in context as segments stand for."""
        return self.plain(sum(self.sizes[one] for one in segments))

    def with_memory(self, segments: Sequence[str], focus: int = 2) -> dict[str, Any]:
        """A request that reads segments."""
        memory = Memory(self._store, tuple(segments), TEMPLATE, focus, expires=int(time.time()) + 600)
        return self.plain() | {"kv_transfer_params": sign(memory, self._keys)}

    def ask(self, request: dict[str, Any], tokens: int) -> Timing:
        """The times of one answer of so many tokens.

        Raises:
            RuntimeError: the server does not answer it.
        """
        fixed = {"model": self._model, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True}
        began, first, many = time.perf_counter(), 0.0, 0
        with self._client.stream("POST", "/v1/completions", json=request | fixed | {"return_token_ids": True}) as reply:
            for line in reply.iter_lines():
                if not line.startswith("data: {"):
                    if reply.status_code != 200:
                        raise RuntimeError(f"the server answers {reply.status_code}: {line}")
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(f"the server says {event['error']}")
                many += len(event["choices"][0].get("token_ids") or ()) if event["choices"] else 0
                first = first or time.perf_counter() - began
        if many != tokens:
            raise RuntimeError(f"the server made {many} tokens of {tokens}")
        whole = time.perf_counter() - began
        return Timing(first, (whole - first) / max(1, tokens - 1), many)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    import httpx

    chosen = _parser().parse_args(arguments)
    draw = random.Random(chosen.seed)
    with httpx.Client(base_url=chosen.url, timeout=600) as client:
        bench = Bench(client, chosen.model, chosen.store, read_keys(chosen.key_file), draw)
        if len(bench.sizes) < chosen.segments:
            raise SystemExit(
                f"the store at {chosen.store} must have {chosen.segments} segments, not {len(bench.sizes)}"
            )
        made: dict[str, Any] = {"segments": chosen.segments, "repeats": chosen.repeats}
        bench.ask(bench.plain(), 4)  # whatever is compiled is compiled now
        made |= _alone(bench, chosen)
        if chosen.users:
            made["users"] = chosen.users
            made |= _together(bench, chosen)
    print(json.dumps({name: round(value, 4) if isinstance(value, float) else value for name, value in made.items()}))
    return 0


def _alone(bench: Bench, chosen: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """One answer at a time: medians of repeats that take turns, so that what disturbs the machine disturbs all."""
    kinds: dict[str, Callable[[], dict[str, Any]]] = {
        "none": bench.plain,
        "one": lambda: bench.with_memory(one),
        "memory": lambda: bench.with_memory(some),
        "context": lambda: bench.in_context(some),
    }
    some = bench.segments(chosen.segments)
    one = some[:1]
    yield "source_tokens", float(sum(bench.sizes[segment] for segment in some))
    began = bench.ask(bench.with_memory(some), 2)
    yield "memory_first_cold_s", began.first_s
    found: dict[str, list[Timing]] = {name: [] for name in kinds}
    for _ in range(chosen.repeats):
        for name, make in kinds.items():
            found[name].append(bench.ask(make(), chosen.tokens))
            _say(f"{name}: first token {found[name][-1].first_s:.3f} s, a step {found[name][-1].step_s:.4f} s")
    first = {name: statistics.median(time.first_s for time in times) for name, times in found.items()}
    step = {name: statistics.median(time.step_s for time in times) for name, times in found.items()}
    for name in kinds:
        yield f"{name}_first_s", first[name]
        yield f"{name}_step_s", step[name]
    yield "first_to_none", first["memory"] / first["none"]
    yield "context_first_to_memory", first["context"] / first["memory"]
    yield "step_to_none", step["memory"] / step["none"]
    yield "one_step_to_none", step["one"] / step["none"]


def _together(bench: Bench, chosen: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """As many users as are asked for, each with segments of its own as far as the store has them, all at once."""
    read = [bench.segments(chosen.segments) for _ in range(chosen.users)]
    for name, make in (("memory", bench.with_memory), ("context", bench.in_context)):
        requests = [make(segments) for segments in read]
        began = time.perf_counter()
        with ThreadPoolExecutor(chosen.users) as threads:
            made = sum(timing.tokens for timing in threads.map(lambda one: bench.ask(one, chosen.long), requests))
        rate = made / (time.perf_counter() - began)
        _say(f"{chosen.users} users, {name}: {rate:.1f} tokens a second")
        yield f"{name}_tokens_per_s", rate


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lloco_integrations.vllm.bench", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server")
    parser.add_argument("--model", required=True, help="name that it serves the decoder under")
    parser.add_argument("--store", type=Path, required=True, metavar="DIR", help="the store that it reads")
    parser.add_argument("--key-file", metavar="FILE", help="else as the environment says")
    parser.add_argument("--segments", type=int, default=4, metavar="N", help="that an answer reads (4)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of each kind of answer (5)")
    parser.add_argument("--tokens", type=int, default=17, metavar="N", help="of each of these answers (17)")
    parser.add_argument("--users", type=int, default=16, metavar="N", help="at once; 0: not measured (16)")
    parser.add_argument("--long", type=int, default=64, metavar="N", help="tokens of each user's answer (64)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
