"""A layer's ragged slots as blocks of equal width, read by torch's own products: on any device, with gradients.

The slots of one KV head of all segments are laid end to end and cut into blocks; the last block of a head is filled
up with slots that are never read, so a long head never pads the others to its length (docs/decisions/0002).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

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
    """

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor, *, owner: torch.Tensor, heads: int
    ) -> None:
        self.heads, self.keys, self.values, self.bias = heads, keys, values, bias
        self.owner = owner.to(keys.device)
        strange = torch.cat((torch.arange(heads), owner)) != torch.arange(heads)[:, None, None]
        # (R, 1, R + blocks), 0 where a head's live tokens and blocks are its own, else -inf
        self._owned = torch.zeros(strange.shape, dtype=keys.dtype).masked_fill_(strange, -torch.inf).to(keys.device)

    def attend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """See `LayerSlots.attend`."""
        rows, query_heads, tokens, dim = q.shape
        heads = keys.shape[1]
        if mask is not None and rows > 1 and mask.shape[0] > 1:
            mask = mask.repeat_interleave(heads, 0)
        # the query heads of one KV head side by side; those of one token read the same: they are rows of one product
        q, group = q.contiguous(), query_heads // heads
        one = (rows * heads, 1, -1, dim)
        asked = q.reshape(one if tokens == 1 else (rows * heads, group, tokens, dim))
        live, mass = read_part(asked, keys.reshape(one), values.reshape(one), mask, scale)
        # rows that share the slots ask side by side
        q, live, mass = (_fold(x.reshape(rows * heads, group * tokens, -1), self.heads) for x in (q, live, mass))
        reads, masses = read_part(q.index_select(0, self.owner)[:, None], self.keys, self.values, self.bias, scale)
        read = merge(torch.cat((live, reads[:, 0])), torch.cat((mass[..., 0], masses[:, 0])), self._owned)
        read = _unfold(read, rows * heads).reshape(rows, query_heads, tokens, dim)
        return read.transpose(1, 2).reshape(rows, tokens, -1)


def _fold(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(rows*heads, M, X) -> (heads, rows*M, X): the rows' queries side by side, for heads that all rows share."""
    return x.reshape(-1, heads, *x.shape[1:]).transpose(0, 1).reshape(heads, -1, x.shape[-1])


def _unfold(x: torch.Tensor, all_heads: int) -> torch.Tensor:
    """The inverse of `_fold`, for so many heads of all rows together."""
    heads, _, last = x.shape
    rows = all_heads // heads
    return x.reshape(heads, rows, -1, last).transpose(0, 1).reshape(all_heads, -1, last)


def lay_out(slots: Sequence[Sequence[Piece]], device: torch.device, dtype: torch.dtype) -> Blocks:
    """Blocks of a layer.

    Args:
        slots: for each of R heads its pieces, one of each segment.
        device, dtype: of the decoder.
    """
    counts = [sum(len(bias) for *_, bias in head) for head in slots]
    cut = _Cut.of(counts)
    laid = []
    least = torch.finfo(dtype).min / 2  # finite, so that a block of nothing else gives no NaN
    for which, filler in enumerate((0, 0, least)):
        some = next(piece for head in slots for piece in head)[which]
        pieces: list[torch.Tensor] = []
        for head, lacking in zip(slots, cut.short, strict=True):
            pieces += [piece[which] for piece in head]
            if lacking:
                pieces.append(some.new_full((lacking, *some.shape[1:]), filler))
        laid.append(torch.cat(pieces).to(device, dtype))
    keys, values = (flat.view(-1, 1, cut.width, flat.shape[1]) for flat in laid[:2])
    bias = laid[2].clamp_min(least).view(-1, 1, 1, cut.width)
    return Blocks(keys, values, bias, owner=torch.repeat_interleave(torch.tensor(cut.number)), heads=len(slots))


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
