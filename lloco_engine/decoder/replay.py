"""Decode steps that are captured once as a CUDA graph and replayed.

A step of one token is a thousand small operations. A GPU runs each in microseconds, and waits longer for the next to be
launched; a graph launches them all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

import torch

from lloco_engine.decoder.attention import Cache

__all__ = ["PlacedCache", "Replay"]

_GIVE_BACK = 16  # graphs after which the memory of those that are gone is given back: it is not used again for others
_captured = count(1)


class PlacedCache(Cache):
    """A cache whose next tokens come one by one, and whose length the device alone knows.

    So every step is the same operations on the same memory: all there is room for is read, what is not filled masked.

    Args:
        cache: whose keys and values it goes on with; that one is not to be used any more.
    """

    def __init__(self, cache: Cache) -> None:
        some = cache.keys[0]
        rows, heads, _, dim = some.shape
        super().__init__(0, rows, heads, dim, cache.capacity, device=some.device, dtype=some.dtype)
        self.keys, self.values, self.pad, self.pad_from = cache.keys, cache.values, cache.pad, cache.pad_from
        for held in (*self.keys, *self.values):
            held[:, :, cache.length :] = 0  # whatever lies there: not everything times 0 is 0
        self.place = torch.tensor([cache.length], device=some.device)  # of the next token
        self._places = torch.arange(self.capacity, device=some.device)

    def begin(self, tokens: int) -> torch.Tensor:
        """The mask of the next token, (B or 1, 1, 1, S), S the capacity."""
        hidden = (self._places > self.place)[None]
        if self.pad is not None:
            hidden = hidden | self.unused(self.pad, self._places)
        dtype = self.keys[0].dtype
        mask = torch.zeros(hidden.shape, device=hidden.device, dtype=dtype)
        return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None]

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put (B, H, 1, D) of one layer in their place; returns all there is room for, (B, H, S, D)."""
        self.keys[layer].index_copy_(2, self.place, keys)
        self.values[layer].index_copy_(2, self.place, values)
        return self.keys[layer], self.values[layer]

    def end(self, tokens: int) -> None:
        """All layers have appended."""
        self.place += tokens


class Replay:
    """Steps of one token a row after a cache: the first runs as it is, the second is captured, and then replayed.

    Args:
        run: one step: token ids (B, 1) on the device and the cache in, logits (B, vocabulary) out; the same operations
            every time.
        cache: what the steps append to; nothing else may from now on.
        held: what ``run`` reads and others may let go of: a graph knows addresses alone.
    """

    def __init__(
        self, run: Callable[[torch.Tensor, PlacedCache], torch.Tensor], cache: Cache, held: object = None
    ) -> None:
        self._run, self._cache, self._held = run, PlacedCache(cache), held
        self._room = cache.capacity - cache.length
        self._tokens = torch.zeros(len(cache.keys[0]), 1, dtype=torch.int64, device=self._cache.place.device)
        self._warm = False  # what a first run sets up cannot be captured
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = torch.empty(0)

    def __call__(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits (B, vocabulary) after one token more in each row; the next call overwrites them."""
        self._room -= 1
        if self._room < 0:
            raise ValueError(f"the cache holds {self._cache.capacity} tokens, and one more was given")
        self._tokens.copy_(torch.tensor(tokens)[:, None])
        if not self._warm:
            self._warm = True
            return self._run(self._tokens, self._cache)
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()
        return self._logits

    def _capture(self) -> torch.cuda.CUDAGraph:
        """The graph of a step, which is not run; `_logits` is where it leaves its result."""
        if next(_captured) % _GIVE_BACK == 0:
            torch.cuda.empty_cache()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self._tokens.device)  # type: ignore[no-untyped-call]
        ours = torch.cuda.current_stream(self._tokens.device)
        stream.wait_stream(ours)
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")  # other threads may be using the device
            try:
                self._logits = self._run(self._tokens, self._cache)
            finally:
                graph.capture_end()
        ours.wait_stream(stream)
        return graph
