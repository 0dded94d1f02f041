"""Refinement: a few steps, without labels, that bring a segment nearer to what the decoder makes of the whole chunk.

Keys, values and biases move by Adam towards the decoder's own next-token distributions with the whole chunk before it,
while it repeats stretches of the chunk. The decoder's weights take no part. Source: the context distillation of
Cartridges (Eyuboglu et al. 2025, arXiv 2506.06266), here begun at a segment that was fitted in closed form, where a few
steps do. How far a step goes is Polyak's rule (Loizou et al. 2021, arXiv 2002.10542): the least divergence is nothing,
so a step ends where that would be reached if it fell on as its slope says. Some tokens of the chunk are held out: no
step aims at them, and what is not better there is not kept.

Beside the decoder and the chunk's cache a step holds what its stretch leaves in every layer, or, from `_LONG` tokens
on, in one layer at a time and the states between them; and the logits of `_ROWS` tokens, four times over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

from lloco_engine.config import RefineConfig
from lloco_engine.decoder.attention import Cache
from lloco_engine.models import quicker_in_bf16
from lloco_engine.types import Divergence, Prefix, Segment

if TYPE_CHECKING:
    from lloco_engine.decoder.local import LocalDecoder

__all__ = ["measured", "refine"]

_BLOCKS, _BLOCK = 4, 16  # stretches of tokens held out, and the tokens of each, where the chunk has eight times as many
_LEAD = 16  # tokens read before each: the decoder must find out where in the chunk it is
_LONG = 512  # tokens of a pass from which on its layers are run a second time for the gradients
_FARTHEST = 5  # times its rates is as far as a step may go
_ROWS = 128  # tokens whose logits are held at once


def refine(
    decoder: LocalDecoder,
    token_ids: Sequence[int],
    segment: Segment,
    config: RefineConfig,
    cache: Cache | None = None,
    expected: torch.Tensor | None = None,
    rounded: Callable[[Segment], Segment] | None = None,
) -> Segment:
    """A chunk's segment after some steps, with its divergence; as it was, but for this, where they made it no better.

    Equal arguments give equal segments: what is read when hangs on the chunk alone.

    Args:
        decoder: reads with its base weights.
        token_ids: of the chunk that the segment stands for.
        segment: any tensors; keys rotated as `Segment` says.
        config: how many steps, and of which kind.
        cache: the template prefix and the chunk, with room for the instruction and the chunk again; what follows them
            is written over. None reads the chunk anew.
        expected: (n, E) states of the decoder where it foretells the chunk's tokens as it repeats it, with the whole
            chunk before it. None reads the repetition where they are needed.
        rounded: a segment as it will be read where it is kept (`lloco_engine.kinds.Format.rounded`): then every step
            moves what is read so, and the divergence is of that. None: as it is.

    Returns:
        a segment of the same heads and tokens. A chunk of fewer than eight tokens, of which none can be held out, has
        its segment left alone.
    """
    if not config.steps or len(token_ids) < 8:
        return segment
    with torch.inference_mode(False), torch.enable_grad():
        return _Run(decoder, list(token_ids), segment, config, cache, expected, rounded).refined(segment)


def measured(decoder: LocalDecoder, token_ids: Sequence[int], segment: Segment, cache: Cache | None = None) -> Segment:
    """A segment with its divergence, where it has none; arguments as `refine` has. Below eight tokens it stays so."""
    if segment.divergence is not None or len(token_ids) < 8:
        return segment
    with torch.inference_mode(False):
        there = _Run(decoder, list(token_ids), segment, RefineConfig(steps=0), cache).divergence()
    return replace(segment, divergence=Divergence(there, there, 0))


class _OnePass(Cache):
    """The template prefix, and room for one pass, in which a layer may be run again.

    Args:
        decoder: whose.
        tokens: of the pass.
    """

    def __init__(self, decoder: LocalDecoder, tokens: int) -> None:
        shape, runner, template = decoder.shape, decoder.runner, decoder.template_cache()
        room = template.length + tokens
        super().__init__(
            shape.layers, 1, shape.kv_heads, shape.head_dim, room, device=runner.device, dtype=runner.dtype
        )
        for own, read in zip((*self.keys, *self.values), (*template.keys, *template.values), strict=True):
            own[:, :, : template.length] = read[:, :, : template.length]
        self.length = template.length

    def end(self, tokens: int) -> None:
        """As `Cache.end`, but what comes next would be the same tokens again."""


@dataclass(frozen=True)
class _Stretch:
    """A part of the chunk as a pass reads it: ``ids`` after the instruction; ``counts`` (T,) bool, which are scored."""

    ids: list[int]
    counts: torch.Tensor


class _Run:
    """One segment's refinement; gradients are enabled around it."""

    def __init__(
        self,
        decoder: LocalDecoder,
        token_ids: list[int],
        segment: Segment,
        config: RefineConfig,
        cache: Cache | None,
        expected: torch.Tensor | None = None,
        rounded: Callable[[Segment], Segment] | None = None,
    ) -> None:
        self._rounded = rounded or (lambda segment: segment)
        self._decoder, self._ids, self._config = decoder, token_ids, config
        self._repeat = decoder.template.repeat_ids()
        self._start = decoder.template_tokens + len(token_ids)  # where the text after the chunk begins
        self._in_bf16 = quicker_in_bf16(decoder.runner.device, decoder.runner.dtype)
        digest = hashlib.sha256(",".join(map(str, token_ids)).encode("ascii")).digest()
        self._random = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        self._held = self._hold_out()
        self._cache = decoder.prefill(token_ids, room=len(self._repeat) + len(token_ids)) if cache is None else cache
        device = decoder.runner.device
        self._parts = {
            name: getattr(segment, name).detach().to(device, torch.float32, copy=True).requires_grad_()
            for name in ("keys", "values", "bias")
        }
        self._made = replace(segment, **self._parts)
        self._size = min(config.stretch or len(token_ids), len(token_ids))  # of a stretch
        aimed = ~self._held.to(device)
        self._whole = None if expected is None else expected[aimed]  # what is expected where that is the chunk

    def divergence(self) -> float:
        """Of the segment as it is now (`Divergence`)."""
        return self._divergence([(stretch, self._expected(stretch)) for stretch in self._measured()])

    def refined(self, fitted: Segment) -> Segment:
        """See `refine`."""
        config, steps = self._config, self._config.steps
        measured = [(stretch, self._expected(stretch)) for stretch in self._measured()]
        before = self._divergence(measured)
        rates = {"keys": config.keys, "values": config.values, "bias": config.biases}
        adam = torch.optim.Adam(
            [{"params": [part], "lr": rates[name]} for name, part in self._parts.items()], betas=(0.9, 0.95)
        )
        falling = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
        for step in range(steps):
            stretch = self._stretch()
            loss = self._loss(stretch, self._goal(stretch))
            for part, slope in zip(
                self._parts.values(), torch.autograd.grad(loss, [*self._parts.values()]), strict=True
            ):
                part.grad = slope
            former = [part.detach().clone() for part in self._parts.values()]
            adam.step()
            if config.pace:
                self._pace(former, config.pace * (1 - step / steps) * float(loss.detach()))
            falling.step()
        after = self._divergence(measured)
        if not after < before or not all(bool(part.detach().half().isfinite().all()) for part in self._parts.values()):
            return replace(fitted, divergence=Divergence(before, before, steps))
        kept = {name: part.detach() for name, part in self._parts.items()}
        return replace(fitted, **kept, divergence=Divergence(before, after, steps))

    @torch.no_grad()
    def _pace(self, former: Sequence[torch.Tensor], fall: float) -> None:
        """Have the step that was taken from ``former`` end where the loss falls by ``fall``, if its slope goes on."""
        parts = [*self._parts.values()]
        steps = [part - was for part, was in zip(parts, former, strict=True)]
        promised = -sum(float((step * part.grad).sum()) for step, part in zip(steps, parts, strict=True))
        share = min(_FARTHEST, fall / promised) if promised > 0 else 1.0
        for part, was, step in zip(parts, former, steps, strict=True):
            part.copy_(was + share * step)

    def _hold_out(self) -> torch.Tensor:
        """(n,) bool: the tokens that no step aims at, in blocks spread over the chunk."""
        count = len(self._ids)
        block = min(_BLOCK, count // 8)
        blocks = min(_BLOCKS, count // (8 * block))
        held = torch.zeros(count, dtype=torch.bool)
        self._blocks: list[slice] = []
        for number in range(blocks):
            first, last = number * count // blocks, (number + 1) * count // blocks - block
            begin = first + int(torch.randint(last - first + 1, (), generator=self._random))
            self._blocks.append(slice(begin, begin + block))
            held[self._blocks[-1]] = True
        return held

    def _measured(self) -> list[_Stretch]:
        """The blocks held out, each with what leads up to it."""
        made = []
        for block in self._blocks:
            begin = max(0, block.start - _LEAD)
            counts = torch.zeros(block.stop - begin, dtype=torch.bool)
            counts[block.start - begin :] = True
            made.append(_Stretch(self._ids[begin : block.stop], counts))
        return made

    def _stretch(self) -> _Stretch:
        """What the next step reads."""
        begin = int(torch.randint(len(self._ids) - self._size + 1, (), generator=self._random))
        here = slice(begin, begin + self._size)
        return _Stretch(self._ids[here], ~self._held[here])

    def _goal(self, stretch: _Stretch) -> torch.Tensor:
        """What a step aims at: where all steps read the whole chunk it is the same, and read once."""
        if self._size < len(self._ids):
            return self._expected(stretch)
        if self._whole is None:
            self._whole = self._expected(stretch)
        return self._whole

    def _passage(self, stretch: _Stretch) -> tuple[list[list[int]], torch.Tensor]:
        """What a pass is given, and (A,) int64 which of its states foretell the tokens that count."""
        foretell = stretch.counts.nonzero()[:, 0] + len(self._repeat) - 1
        return [[*self._repeat, *stretch.ids]], foretell.to(self._decoder.runner.device)

    def _expected(self, stretch: _Stretch) -> torch.Tensor:
        """(A, E) states of the decoder with the whole chunk before it, where it foretells the tokens that count."""
        inputs, foretell = self._passage(stretch)
        with torch.inference_mode():
            self._cache.length = self._start
            hidden = self._decoder.step(inputs, 0, self._cache, None, None)[0].index_select(0, foretell)
        return hidden.clone()  # what is made in inference mode takes no part in gradients

    def _read(self, stretch: _Stretch) -> torch.Tensor:
        """The same with the segment in the chunk's place, as it is now."""
        inputs, foretell = self._passage(stretch)
        decoder, tokens = self._decoder, len(inputs[0])
        memory = decoder.memory([Prefix((self._rounded(self._made),), (0,), self._start)])
        if memory is not None and torch.is_grad_enabled():
            for layer in range(decoder.shape.layers):
                memory.layer(layer)  # laid out once, before any layer runs: one that runs again finds it so
        cache = _OnePass(decoder, tokens)
        hidden = decoder.step(
            inputs,
            self._start - cache.length,
            cache,
            memory,
            None,
            recompute=torch.is_grad_enabled() and tokens >= _LONG,
            in_bf16=self._in_bf16,
        )
        return hidden[0].index_select(0, foretell)

    def _loss(self, stretch: _Stretch, expected: torch.Tensor) -> torch.Tensor:
        """Mean divergence (nats) over the tokens that count."""
        read = self._read(stretch)
        blocks = list(zip(torch.split(expected, _ROWS), torch.split(read, _ROWS), strict=True))
        if len(blocks) == 1 or not torch.is_grad_enabled():
            parts = [self._sum(*block) for block in blocks]
        else:
            parts = [checkpoint(self._sum, *block, use_reentrant=False) for block in blocks]
        return torch.stack(parts).sum() / len(expected)

    def _sum(self, expected: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """Summed divergence of states (A, E) that were read from those that are expected."""
        runner = self._decoder.runner
        with torch.no_grad():
            goal = torch.log_softmax(runner.logits(expected), dim=-1)
        made = torch.log_softmax(runner.logits(read), dim=-1)
        return torch.nn.functional.kl_div(made, goal, reduction="sum", log_target=True)

    @torch.no_grad()
    def _divergence(self, measured: Sequence[tuple[_Stretch, torch.Tensor]]) -> float:
        """Mean divergence (nats) over the tokens held out."""
        sums = [self._loss(stretch, expected) * len(expected) for stretch, expected in measured]
        return float(torch.stack(sums).sum()) / sum(len(expected) for _, expected in measured)
