"""``lloco bench --shape``: what memories save on a decoder of a real shape, in time, memory and users.

Weights and segments are random: speed needs no real ones. In context, the text is read from an empty cache on by
torch's causal kernel, and its keys stay in one cache; with LLoCO the question reads segments by each reader that the
device has. A decode step is the quicker of one that is launched and one that is replayed, for both. The most users are
as many as fit beside the weights, each with a document of their own; the figure is of a step run with so many.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lloco_engine import __version__
from lloco_engine.compress import registry
from lloco_engine.compress.refinement import refine
from lloco_engine.config import CompressConfig, PrefixConfig, RefineConfig
from lloco_engine.decoder import cpu_kernel, gpu_kernel
from lloco_engine.decoder.attention import Cache
from lloco_engine.decoder.local import LocalDecoder
from lloco_engine.decoder.memory import Memory
from lloco_engine.errors import ConfigError
from lloco_engine.eval.machine import circumstances
from lloco_engine.eval.partial import Partial
from lloco_engine.eval.shapes import CHUNK, SHAPES, document, random_decoder
from lloco_engine.eval.timing import seconds
from lloco_engine.types import Prefix, Segment

__all__ = ["ShapeConfig", "run"]

_LENGTHS = (4096, 16_384, 65_536, 131_072)  # tokens of the source
_RATIOS = (16.0, 30.0)
_QUESTION = 64  # tokens
_STEPS = 8  # of decoding that are measured, after two that set up
_FILLED = 0.9  # of what the weights leave of the device, given to users
_MOST = 256  # users
_COMPRESSOR = CompressConfig.name
_CPU_BYTES = 2 * 10**9  # for users, where it is not asked for: a CPU's memory is others' too

Cell = tuple[str, Callable[[], dict[str, Any]]]


@dataclass(frozen=True)
class ShapeConfig:
    """What is measured.

    Args:
        shape: of `lloco_engine.eval.shapes.SHAPES`.
        device: such as ``"cuda"``; None is the GPU if there is one.
        source_tokens: of the longest source.
        repeats: measurements of each kind; the median counts.
        seed: of all random numbers.

    Raises:
        ConfigError: there is no such shape or device.
    """

    shape: str
    device: str | None = None
    source_tokens: int = _LENGTHS[-1]
    repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ConfigError(f"shape must be one of {', '.join(SHAPES)}, not {self.shape!r}")
        if self.torch_device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device 'cuda' must be a GPU that torch can use, and it finds none: give --device cpu")

    @property
    def torch_device(self) -> torch.device:
        """The device."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of the sources."""
        return tuple(each for each in _LENGTHS if each <= self.source_tokens) or (self.source_tokens,)


def run(
    config: ShapeConfig, output: Path | None = None, progress: Callable[[str, int, int], None] | None = None
) -> dict[str, Any]:
    """Measure everything.

    Args:
        config: the settings.
        output: where the result will be written; what was measured is kept beside it, and not measured again.
        progress: is told what is done.

    Returns:
        the figures of each source, JSON-ready: seconds, bytes, users and tokens a second.
    """
    tell = progress or (lambda what, done, total: None)
    facts = [asdict(config), str(config.torch_device), __version__]
    kept = Partial(output, hashlib.sha256(json.dumps(facts).encode()).hexdigest())
    measured = _Measured(config)
    cells = measured.cells()
    for number, (name, measure) in enumerate(cells):
        tell(name, number, len(cells))
        if number in kept.done and "error" not in kept.done[number]:
            continue
        try:
            figures = measure()
        except torch.OutOfMemoryError as error:
            figures = {"error": str(error).splitlines()[0]}
        kept.add(number, figures)
        measured.free()
    made = {name: kept.done[number] for number, (name, _) in enumerate(cells)}
    tell("measured", len(cells), len(cells))
    kept.finish()
    return {"shape": config.shape, "over_in_context": _ratios(made), "measured": made} | {
        "config": asdict(config) | {"chunk_tokens": CHUNK, "question_tokens": _QUESTION, "focus": PrefixConfig().focus},
        **circumstances(config.torch_device, measured.dtype),
    }


class _Measured:
    """What each figure is measured on; the decoder is made when the first one asks for it."""

    def __init__(self, config: ShapeConfig) -> None:
        self._config, self._device = config, config.torch_device
        self.dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32

    @cached_property
    def _decoder(self) -> LocalDecoder:
        return random_decoder(self._config.shape, self._device, self.dtype, self._config.seed)

    def cells(self) -> list[Cell]:
        """What is measured, by name, one after the other."""
        made: list[Cell] = [("decoder", self._size)]
        for length in self._config.lengths:
            made.append((f"in_context.{length}", partial(self._in_context, length)))
            for ratio in _RATIOS:
                for name in self._readers():
                    made.append((f"{name}.{length}.{ratio:g}", partial(self._lloco, name, length, ratio)))
        return [*made, ("compress", self._compress)]

    def _readers(self) -> dict[str, cpu_kernel.Reader | None]:
        """What reads segments here, by name; None is torch, over heads that are filled up."""
        given = cpu_kernel.reader(self._device, self.dtype) or gpu_kernel.reader(self._device, self.dtype, always=True)
        return {"padded": None} | ({} if given is None else {"kernel": given})

    def free(self) -> None:
        """Give back what the last measurement held."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    # -- figures ----------------------------------------------------------------------------------------------

    def _size(self) -> dict[str, Any]:
        made = seconds(lambda: self._decoder)
        weights = list(self._decoder.runner.model.parameters())
        return {
            "build_s": made,
            "parameters": sum(each.numel() for each in weights),
            "bytes": sum(each.nbytes for each in weights),
        }

    @torch.inference_mode()
    def _in_context(self, length: int) -> dict[str, Any]:
        decoder, read = self._decoder, length + _QUESTION
        ids = [self._tokens(read)]

        def first() -> None:
            cache = decoder.new_cache(1, read)
            decoder.runner.logits(decoder.step(ids, 0, cache, None, None, wanted=1)[:, -1])

        ttft = self._median(first)
        self.free()
        each = (read + _STEPS + 2) * self._live_bytes
        users, many = self._most_users(each, lambda rows: self._step_s(self._filled(rows, read), None, 0))
        alone = self._step_s(self._filled(1, read), None, 0)
        return {"ttft_s": ttft, "step_s": alone, "bytes_a_user": each} | _served(users, many)

    @torch.inference_mode()
    def _lloco(self, name: str, length: int, ratio: float) -> dict[str, Any]:
        decoder, reader = self._decoder, self._readers()[name]
        prefix = document(decoder, length, ratio, PrefixConfig().focus, self._config.seed)
        asked, offset = [self._tokens(_QUESTION)], prefix.start - decoder.template_tokens
        live = decoder.template_tokens + _QUESTION

        def memory(rows: int) -> Memory:
            # rows that share a prefix would share its memory: each has its own, of the same numbers
            made = decoder.memory([replace(prefix) for _ in range(rows)])
            assert made is not None
            made.kernel = reader
            return made

        def first(read: Memory) -> None:
            cache = decoder.start_cache(1, _QUESTION, None)
            decoder.runner.logits(decoder.step(asked, offset, cache, read, None, wanted=1)[:, -1])

        there = memory(1)
        first(there)  # what is not compiled yet is
        placed, ttft = self._median(partial(first, there)), self._median(lambda: first(memory(1)))
        alone = self._step_s(self._filled(1, live), there, offset)
        del there
        self.free()
        each = (live + _STEPS + 2) * self._live_bytes + self._slot_bytes(prefix, padded=reader is None)
        users, many = self._most_users(each, lambda rows: self._step_s(self._filled(rows, live), memory(rows), offset))
        figures = {"ttft_s": ttft, "ttft_placed_s": placed, "step_s": alone, "slots": prefix.slots}
        return figures | {"bytes_a_user": each} | _served(users, many)

    def _compress(self) -> dict[str, Any]:
        decoder, ids, compressor, refined = (
            self._decoder,
            self._tokens(CHUNK),
            registry.get(_COMPRESSOR),
            RefineConfig(),
        )
        (segment,) = compressor.compress(decoder, ids, _RATIOS[:1])
        assert isinstance(segment, Segment)
        measured = {
            "prefill": self._median(lambda: decoder.prefill(ids)),
            "compress": self._median(lambda: compressor.compress(decoder, ids, _RATIOS[:1])),
            "refine": self._median(lambda: refine(decoder, ids, segment, refined)),
        }
        per = {f"{name}_s_per_1000_tokens": taken * 1000 / CHUNK for name, taken in measured.items()}
        return per | {"ratio": _RATIOS[0], "refine_steps": refined.steps}

    # -- how --------------------------------------------------------------------------------------------------

    def _tokens(self, count: int) -> list[int]:
        source = torch.Generator().manual_seed(self._config.seed)
        return torch.randint(self._decoder.shape.vocabulary, (count,), generator=source).tolist()

    @property
    def _live_bytes(self) -> int:
        """Of a live token."""
        shape = self._decoder.shape
        return 2 * shape.layers * shape.kv_heads * shape.head_dim * self.dtype.itemsize

    def _slot_bytes(self, prefix: Prefix, padded: bool) -> int:
        """Of a document's slots, where they are read."""
        dim = self._decoder.shape.head_dim
        lengths = torch.stack([each.lengths for each in prefix.compact]).sum(0)  # (layers, heads)
        if padded:  # with each slot's bias and segment
            slots = int(lengths.amax(1).sum()) * lengths.shape[1]
            return slots * (2 * dim * self.dtype.itemsize + self.dtype.itemsize + 8)
        on_cpu = self._device.type == "cpu"  # the kernel there reads half precision
        return int(lengths.sum()) * (2 * dim * (2 if on_cpu else self.dtype.itemsize) + 4)

    def _filled(self, rows: int, length: int) -> Cache:
        """A cache of random live tokens with room for the steps."""
        cache = self._decoder.new_cache(rows, length + _STEPS + 2)
        for held in (*cache.keys, *cache.values):
            held.normal_()
        cache.length = length
        return cache

    def _step_s(self, cache: Cache, memory: Memory | None, offset: int) -> float:
        """Seconds of a step of one token a row: the quicker way of two."""
        decoder, length = self._decoder, cache.length
        tokens = [1] * len(cache.keys[0])

        def launched(tokens: Sequence[int]) -> None:
            hidden = decoder.step([[each] for each in tokens], offset, cache, memory, None, wanted=1)
            decoder.runner.logits(hidden[:, -1])

        ways: list[Callable[[Sequence[int]], object]] = [launched]
        if decoder.replays:
            ways.append(decoder.stepper(cache, memory, None, offset))  # goes on with the cache, so it is the last
        quickest = []
        for way in ways:
            cache.length = length
            for _ in range(2):
                way(tokens)
            quickest.append(median(self._seconds(partial(way, tokens)) for _ in range(_STEPS)))
        return min(quickest)

    def _most_users(self, each: int, step_s: Callable[[int], float]) -> tuple[int, float]:
        """As many users as fit, each taking so many bytes, and the seconds of a step of all of them."""
        users = max(1, min(_MOST, int(self._room() // each)))
        while True:
            try:
                return users, step_s(users)
            except torch.OutOfMemoryError:
                if users == 1:
                    raise
            self.free()
            users = users * 4 // 5

    def _room(self) -> float:
        """Bytes there are for users."""
        if self._device.type == "cpu":
            return _CPU_BYTES
        weights = sum(each.nbytes for each in self._decoder.runner.model.parameters())
        return _FILLED * (torch.cuda.get_device_properties(self._device).total_memory - weights)

    def _median(self, work: Callable[[], object]) -> float:
        return median(self._seconds(work) for _ in range(self._config.repeats))

    def _seconds(self, work: Callable[[], object]) -> float:
        def done() -> None:
            work()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)

        return seconds(done)


def _served(users: int, step_s: float) -> dict[str, Any]:
    return {"users": users, "users_are_all_that_fit": users < _MOST, "tokens_per_s": users / step_s}


def _ratios(made: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What LLoCO saves: the time in context over its own, and its users over those in context."""
    ratios = {}
    for name, mine in made.items():
        kind, _, rest = name.partition(".")
        text = made.get(f"in_context.{rest.split('.')[0]}")
        if kind in ("padded", "kernel") and text is not None and not {"error"} & (mine.keys() | text.keys()):
            ratios[name] = {
                "first_token": text["ttft_s"] / mine["ttft_s"],
                "first_token_placed": text["ttft_s"] / mine["ttft_placed_s"],
                "decode_step": text["step_s"] / mine["step_s"],
                "users": mine["users"] / text["users"],
                "tokens_per_s": mine["tokens_per_s"] / text["tokens_per_s"],
            }
    return ratios
