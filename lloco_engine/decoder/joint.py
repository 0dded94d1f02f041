"""One pass for the next tokens of several streams: their rows go through each linear layer together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch

from lloco_engine.decoder import cpu_kernel
from lloco_engine.decoder.attention import Cache, attend
from lloco_engine.decoder.runner import Runner

if TYPE_CHECKING:
    from lloco_engine.decoder.batching import Stream
    from lloco_engine.decoder.cpu_kernel.joint import Joint

__all__ = ["JointPass"]


class JointPass(Cache):
    """What a runner takes for the cache: rows of one token each, which go to the caches of their streams.

    Attention is each stream's own. Where the compiled kernel reads segments, one call of it serves all streams in a
    layer; else torch reads them one after another.

    Args:
        runner: runs the pass.
    """

    def __init__(self, runner: Runner) -> None:
        shape = runner.shape
        super().__init__(0, 0, shape.kv_heads, shape.head_dim, 0, device=runner.device, dtype=runner.dtype)
        self._runner = runner
        self._joint: Joint | None = None
        self._streams: Sequence[Stream] = ()
        self._rows: list[tuple[int, int]] = []  # of each stream, the first and the one behind the last
        self._masks: list[torch.Tensor | None] = []
        self._at: list[tuple[torch.Tensor, torch.Tensor] | None] = []
        self._reader: cpu_kernel.Reader | None = None

    def run(self, streams: Sequence[Stream]) -> list[torch.Tensor]:
        """Logits (T, vocabulary) of each stream after its tokens, which its cache then holds; all of one adapter."""
        counts = [len(one.tokens) for one in streams]
        self._streams, self._rows = streams, list(pairwise(accumulate(counts, initial=0)))
        self._masks = [one.cache.begin(count) for one, count in zip(streams, counts, strict=True)]
        self._at = [None] * len(streams)
        some = any(one.memory is not None for one in streams)
        self._reader = cpu_kernel.reader(self._runner.device, self._runner.dtype) if some else None
        self.length = max(one.cache.length for one in streams)
        device = self._runner.device
        tokens = torch.tensor([[token] for one in streams for token in one.tokens], device=device)
        places = [[one.cache.length + one.offset + at] for one in streams for at in range(len(one.tokens))]
        try:
            if self._reader is not None:
                self._begin_kernel(counts)
            hidden = self._runner.forward(
                tokens, torch.tensor(places, device=device), self, attention=self.attend, wanted=1
            )
            logits = self._runner.logits(hidden[:, -1])
        finally:
            self._streams, self._masks, self._at = (), [], []
            if self._joint is not None:
                self._joint.end()
        for one, count in zip(streams, counts, strict=True):
            one.cache.end(count)
        return list(torch.split(logits, counts))

    def _begin_kernel(self, counts: Sequence[int]) -> None:
        if self._joint is None:
            self._joint = cpu_kernel.joint_reader(self._runner.shape.kv_heads, self._runner.shape.head_dim)
        segments = [None if one.memory is None else one.memory.segments(self._reader) for one in self._streams]
        self._joint.begin([one.cache for one in self._streams], segments, counts)

    # -- what a runner does with a cache --------------------------------------------------------------------------

    def note(self, positions: torch.Tensor) -> torch.Tensor:
        """See `Cache.note`; what is returned is not used, as `attend` knows."""
        for number, (one, (begin, end)) in enumerate(zip(self._streams, self._rows, strict=True)):
            own = positions[begin:end, 0][None]
            self._at[number] = own, one.cache.note(own)
        return positions

    def begin(self, tokens: int) -> None:
        """See `Cache.begin`: masks are the streams' own."""

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Cache.append`: `attend` does it."""
        return keys, values

    def end(self, tokens: int) -> None:
        """See `Cache.end`: `run` does it, once nothing can fail any more."""

    def attend(self, layer: int, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """See `lloco_engine.decoder.runner.Attention`, of one token a row."""
        runner = self._runner
        rules = runner.rules[layer]
        if self._reader is not None and self._joint is not None and rules.plain:
            return self._joint.attend(layer, q, keys, values, runner.scale)
        read = []
        for one, (begin, end), mask, at in zip(self._streams, self._rows, self._masks, self._at, strict=True):
            mine = [part[begin:end].transpose(0, 2) for part in (q, keys, values)]
            live = one.cache.append(layer, mine[1], mine[2])
            slots = None if one.memory is None else one.memory.layer(layer, rules.plain)
            read.append(attend(mine[0], *live, mask, slots, runner.scale, rules, at)[0])
        return torch.cat(read)[:, None]
