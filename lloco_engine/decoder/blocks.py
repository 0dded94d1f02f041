"""A layer's ragged slots as blocks of equal width, read by torch's own products: on any device, with gradients.

The slots of one KV head of all segments are laid end to end and cut into blocks; the last block of a head is filled
up with slots that are never read, so a long head never pads the others to its length (docs/decisions/0002).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lloco_engine.decoder.focus import Focus
from lloco_engine.decoder.partial import merge, read_part
from lloco_engine.decoder.slots import LayerSlots

__all__ = ["Blocks", "Piece", "lay_out"]

Piece = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # keys and values (N, D) and biases (N,) of a head

_WORTH = 512  # padding slots per layer above which heads are cut: reading them takes as long as the merging
_WIDTHS = (64, 512)  # of a block: the least and the most
_BLOCKS = 32  # of the longest head, about: more cost merging, fewer cost padding


class Blocks(LayerSlots):
    """One layer's slots.

    Args:
        keys, values: (blocks, 1, width, D).
        bias: (blocks, 1, 1, width), hugely negative where a block is filled up.
        owner: (blocks,) int64 index in R of each block.
        heads: R.
        focus: where queries do not read every segment; then each block is of one.
    """

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        bias: torch.Tensor,
        *,
        owner: torch.Tensor,
        heads: int,
        focus: Focus | None = None,
    ) -> None:
        super().__init__(heads)
        self._focus = focus
        self.keys, self.values, self.bias = keys, values, bias
        self.owner = owner.to(keys.device)
        strange = torch.cat((torch.arange(heads), owner)) != torch.arange(heads)[:, None, None]
        # (R, 1, R + blocks), 0 where a head's live tokens and blocks are its own, else -inf
        self._owned = torch.zeros(strange.shape, dtype=keys.dtype).masked_fill_(strange, -torch.inf).to(keys.device)

    def _attend(self, q: torch.Tensor, read: torch.Tensor, mass: torch.Tensor, scale: float) -> torch.Tensor:
        asked = q.index_select(0, self.owner)
        reads, masses = (part[:, 0] for part in read_part(asked[:, None], self.keys, self.values, self.bias, scale))
        if self._focus is not None:
            ignored = self._focus.ignored(asked, self.keys[:, 0], self.bias[:, 0], scale)
            masses = masses.masked_fill(ignored, -torch.inf)
        return merge(torch.cat((read, reads)), torch.cat((mass, masses)), self._owned)


def lay_out(
    slots: Sequence[Sequence[Piece]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    limit: Sequence[int] = (),
    prior: Sequence[Sequence[float]] = (),
) -> Blocks:
    """Blocks of a layer.

    Args:
        slots: for each of R heads its pieces, one of each segment.
        device, dtype: of the decoder.
        limit, prior: for each of R heads how many segments a query reads (0: all), and the priors of its segments, as
            `Prefix` has them. Without, all are read.
    """
    focused = any(0 < most < len(head) for most, head in zip(limit, slots, strict=False))
    runs = [[piece] for head in slots for piece in head] if focused else slots  # no two of them share a block
    cut = _Cut.of([sum(len(bias) for *_, bias in run) for run in runs])
    laid = []
    least = torch.finfo(dtype).min / 2  # finite, so that a block of nothing else gives no NaN
    for which, filler in enumerate((0, 0, least)):
        some = next(piece for run in runs for piece in run)[which]
        pieces: list[torch.Tensor] = []
        for run, lacking in zip(runs, cut.short, strict=True):
            pieces += [piece[which] for piece in run]
            if lacking:
                pieces.append(some.new_full((lacking, *some.shape[1:]), filler))
        laid.append(torch.cat(pieces).to(device, dtype))
    keys, values = (flat.view(-1, 1, cut.width, flat.shape[1]) for flat in laid[:2])
    bias = laid[2].clamp_min(least).view(-1, 1, 1, cut.width)
    of_run = torch.repeat_interleave(torch.tensor(cut.number))
    if not focused:
        return Blocks(keys, values, bias, owner=of_run, heads=len(slots))
    most = max(map(len, slots))
    part = torch.tensor([most * number + at for number, head in enumerate(slots) for at in range(len(head))])[of_run]
    priors = torch.tensor([[*given, *[0.0] * (most - len(given))] for given in prior], device=device)
    limits = torch.tensor([one or most for one in limit], device=device)
    focus = Focus(part.to(device), limits, priors)
    return Blocks(keys, values, bias, owner=part // most, heads=len(slots), focus=focus)


class _Cut(NamedTuple):
    """How a layer is cut: the width of its blocks, and by head in R how many it has and what the last one lacks."""

    width: int
    number: list[int]
    short: list[int]

    @classmethod
    def of(cls, counts: Sequence[int]) -> _Cut:
        """For heads of so many slots."""
        width, longest = _WIDTHS[0], max(1, *counts)
        if len(counts) * longest - sum(counts) <= _WORTH:
            width = longest
        while width < min(_WIDTHS[1], longest / _BLOCKS):
            width *= 2
        number = [max(1, -(-count // width)) for count in counts]
        return cls(width, number, [width * n - count for n, count in zip(number, counts, strict=True)])
