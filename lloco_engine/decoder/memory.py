"""Prefixes made ready for attention: the ragged heads of many segments, laid out in blocks of equal width.

The slots of one KV head of all segments are laid end to end and cut into blocks; the last block of a head is filled
up with slots that are never read. A layer whose heads hold nearly the same is one block per head, and a cache can hold
it before the live tokens; elsewhere heads are cut into several blocks, so a long head never pads the others to its
length (docs/decisions/0002).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lloco_engine.decoder.partial import merge, read_part
from lloco_engine.types import Prefix

__all__ = ["LayerMemory", "Lead", "Memory"]

Rotate = Callable[[torch.Tensor, int], torch.Tensor]

_WORTH = 512  # padding slots per layer above which heads are cut: reading them takes as long as the merging
_WIDTHS = (64, 512)  # of a block: the least and the most
_BLOCKS = 32  # of the longest head, about: more cost merging, fewer cost padding


class Lead(NamedTuple):
    """One layer's slots as a cache holds them before the live tokens, the heads filled up to the longest.

    keys, values : (B, H, width, D)
    bias         : (B, H, 1, width)
    """

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class LayerMemory:
    """One layer's slots. ``R`` is KV heads times rows, or KV heads alone where all rows share the prefix.

    keys   : (blocks, 1, width, D)
    values : (blocks, 1, width, D)
    bias   : (blocks, 1, 1, width), hugely negative where a block is filled up
    owner  : (blocks,) int64 index in R of each block
    owned  : (R, 1, R + blocks), 0 where a head's live tokens and blocks are its own, else -inf
    heads  : R
    """

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    owner: torch.Tensor
    owned: torch.Tensor
    heads: int

    def attend(self, q: torch.Tensor, read: torch.Tensor, mass: torch.Tensor, scale: float) -> torch.Tensor:
        """Softmax attention over these slots and the live tokens together.

        Args:
            q: (B*H, M, D). read, mass: the live tokens' part, (B*H, M, D) and (B*H, M). scale: factor of the logits.

        Returns:
            (B*H, M, D).
        """
        rows = q.shape[0] // self.heads
        if rows > 1:
            q, read, mass = _fold(q, rows), _fold(read, rows), _fold(mass[..., None], rows)[..., 0]
        reads, masses = read_part(q.index_select(0, self.owner)[:, None], self.keys, self.values, self.bias, scale)
        read = merge(torch.cat((read, reads[:, 0])), torch.cat((mass, masses[:, 0])), self.owned)
        return _unfold(read, rows) if rows > 1 else read


def _fold(x: torch.Tensor, rows: int) -> torch.Tensor:
    """(rows*heads, M, X) -> (heads, rows*M, X): the rows' queries side by side, for heads that all rows share."""
    heads, last = x.shape[0] // rows, x.shape[-1]
    return x.reshape(rows, heads, -1, last).transpose(0, 1).reshape(heads, -1, last)


def _unfold(x: torch.Tensor, rows: int) -> torch.Tensor:
    """The inverse of `_fold`."""
    heads, last = x.shape[0], x.shape[-1]
    return x.reshape(heads, rows, -1, last).transpose(0, 1).reshape(rows * heads, -1, last)


class Memory:
    """The prefixes of a batch of rows; a layer is read and laid out when the decoder first comes to it.

    Args:
        prefixes: one prefix per row, None where a row has none; a single entry is shared by all rows.
        device, dtype: of the decoder.
        rotate: turns keys (N, D) by a number of positions, for prefixes placed in sequence.
    """

    def __init__(
        self, prefixes: Sequence[Prefix | None], device: torch.device, dtype: torch.dtype, rotate: Rotate
    ) -> None:
        self._device, self._dtype = device, dtype
        rows = [list(zip(p.compact, p.offsets, strict=True)) if p is not None else [] for p in prefixes]
        shape = next(segment.lengths.shape for row in rows for segment, _ in row)
        self._layers, self._heads = shape
        # by row: the slots of every head of every layer, and for each segment these slots as views of its tensors
        none = torch.zeros(shape, dtype=torch.int64)
        self._counts = [sum((segment.lengths for segment, _ in row), none).flatten().tolist() for row in rows]
        self._slots: list[list[list[tuple[torch.Tensor, ...]]]] = [[], [], []]  # keys, values, bias
        for row in rows:
            sizes = [segment.lengths.flatten().tolist() for segment, _ in row]
            turned = [
                rotate(segment.keys, offset).to(segment.keys.device) if offset else segment.keys
                for segment, offset in row
            ]
            tensors = (turned, [segment.values for segment, _ in row], [segment.bias for segment, _ in row])
            for views, each in zip(self._slots, tensors, strict=True):
                views.append([torch.split(tensor, size) for tensor, size in zip(each, sizes, strict=True)])
        self._laid: dict[int, LayerMemory] = {}

    @classmethod
    def of(
        cls, prefixes: Sequence[Prefix | None], device: torch.device, dtype: torch.dtype, rotate: Rotate
    ) -> Memory | None:
        """The memory of a batch, or None when no row has compact KV. Rows with one prefix object share it."""
        if not any(prefix is not None and prefix.compact for prefix in prefixes):
            return None
        shared = all(prefix is prefixes[0] for prefix in prefixes)
        return cls(prefixes[:1] if shared else prefixes, device, dtype, rotate)

    def leads(self, rows: int) -> list[Lead | None]:
        """What a cache of ``rows`` rows can hold before the live tokens of each layer; None: read `layer` instead."""
        if rows != len(self._counts):  # shared by the rows, so it is held once
            return [None] * self._layers
        whole = [layer for layer in range(self._layers) if not self._blocks(layer).cut]
        laid = dict(zip(whole, self._lay_out(whole), strict=True))  # together: their many small pieces are two copies
        return [
            Lead(*(part.view(rows, self._heads, *part.shape[2:]) for part in laid[layer])) if layer in laid else None
            for layer in range(self._layers)
        ]

    def layer(self, index: int) -> LayerMemory:
        """The slots of one layer."""
        if index not in self._laid:
            blocks = self._blocks(index)
            ((keys, values, bias),) = self._lay_out([index])
            owner = torch.repeat_interleave(torch.tensor(blocks.number))
            heads = torch.arange(len(blocks.number))
            strange = torch.cat((heads, owner)) != heads[:, None, None]
            owned = torch.zeros(strange.shape, dtype=self._dtype).masked_fill_(strange, -torch.inf)
            self._laid[index] = LayerMemory(
                keys, values, bias, owner.to(self._device), owned.to(self._device), len(heads)
            )
        return self._laid[index]

    def _blocks(self, layer: int) -> _Blocks:
        heads = range(layer * self._heads, (layer + 1) * self._heads)
        return _Blocks.of([row[head] for row in self._counts for head in heads])

    def _lay_out(self, layers: Sequence[int]) -> list[list[torch.Tensor]]:
        """Keys, values and biases of each of some layers, as `LayerMemory` has them."""
        if not layers:
            return []
        blocks = [self._blocks(layer) for layer in layers]
        heads = [
            (row, layer * self._heads + head)
            for layer in layers
            for row in range(len(self._counts))
            for head in range(self._heads)
        ]
        short = [each for one in blocks for each in one.short]
        laid = []
        for views, filler in zip(self._slots, (0, 0, torch.finfo(self._dtype).min / 2), strict=True):
            # what fills a block up has a bias that is finite, so that a head of nothing else gives no NaN
            some = next(row for row in views if row)[0][0]
            fill = some.new_full((max(short), *some.shape[1:]), filler)
            pieces: list[torch.Tensor] = []
            for (row, head), lacking in zip(heads, short, strict=True):
                pieces += [segment[head] for segment in views[row]]
                if lacking:
                    pieces.append(fill[:lacking])
            flat = torch.cat(pieces).to(self._device, self._dtype)
            parts = torch.split(flat, [one.width * sum(one.number) for one in blocks])
            shape = (1,) if flat.dim() == 2 else (1, 1)  # a block of biases lies beside its queries, one row of them
            laid.append(
                [part.view(-1, *shape, one.width, *flat.shape[1:]) for part, one in zip(parts, blocks, strict=True)]
            )
        return [list(each) for each in zip(*laid, strict=True)]


class _Blocks(NamedTuple):
    """How a layer is cut: the width of its blocks, and by head in R how many it has and what the last one lacks."""

    width: int
    number: list[int]
    short: list[int]

    @property
    def cut(self) -> bool:
        """Whether a head has several blocks."""
        return sum(self.number) > len(self.number)

    @classmethod
    def of(cls, counts: Sequence[int]) -> _Blocks:
        """For heads of so many slots."""
        width, longest = _WIDTHS[0], max(1, *counts)
        if len(counts) * longest - sum(counts) <= _WORTH:
            width = longest
        while width < min(_WIDTHS[1], longest / _BLOCKS):
            width *= 2
        number = [max(1, -(-count // width)) for count in counts]
        return cls(width, number, [width * n - count for n, count in zip(number, counts, strict=True)])
