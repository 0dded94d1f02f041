"""Prefixes made ready for attention: the ragged heads of many segments, laid out in blocks of equal width.

The slots of one KV head of all segments are laid end to end and cut into blocks; the last block of a head is filled
up with slots of bias -inf. One block per head is the cheapest to attend over (no merging of partial softmaxes), but
costs memory traffic where heads differ much in length; then heads are cut into several narrow blocks, so a long head
never pads the others to its length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lloco_engine.types import Prefix

__all__ = ["LayerMemory", "Memory"]

Rotate = Callable[[torch.Tensor, int], torch.Tensor]

_WIDTH = 128  # slots of a block where heads are cut
_WORTH = 1024  # padding slots per layer above which heads are cut; reckoned, docs/decisions/0002


@dataclass(frozen=True)
class LayerMemory:
    """One layer's slots. ``R`` is KV heads times rows, or KV heads alone where all rows share the prefix.

    keys   : (blocks, D, width)
    values : (blocks, width, D)
    bias   : (blocks, 1, width), -inf where a block is filled up
    owner  : (blocks,) int64 index in R of each block, or None when block i belongs to i
    heads  : R
    """

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    owner: torch.Tensor | None
    heads: int

    def attend(self, queries: torch.Tensor, scores: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Softmax attention over these slots and the live tokens together.

        Args:
            queries: (B*H, M, D), scaled. scores: (B*H, M, S) logits of the live tokens. values: (B*H, S, D) of them.

        Returns:
            (B*H, M, D).
        """
        rows = queries.shape[0] // self.heads
        if rows > 1:
            queries = _fold(queries, rows)
        if self.owner is None:
            logits = torch.baddbmm(self.bias, queries, self.keys)
            width = logits.shape[-1]
            if rows > 1:
                logits = _unfold(logits, rows)
            weights = torch.softmax(torch.cat((logits, scores), dim=-1), dim=-1)
            here = weights[..., :width]
            read = torch.bmm(_fold(here, rows) if rows > 1 else here, self.values)
            if rows > 1:
                read = _unfold(read, rows)
            return torch.baddbmm(read, weights[..., width:], values)
        return self._merge(queries, scores, values, rows)

    def _merge(self, queries: torch.Tensor, scores: torch.Tensor, values: torch.Tensor, rows: int) -> torch.Tensor:
        """The same over several blocks per head: partial sums at a common maximum, added up by owner."""
        owner = self.owner
        assert owner is not None
        logits = torch.baddbmm(self.bias, queries.index_select(0, owner), self.keys)
        top = scores.detach().amax(dim=-1)
        if rows > 1:
            top = _fold(top[..., None], rows)[..., 0]
        block_top = logits.detach().amax(dim=-1)
        top = top.scatter_reduce(0, owner[:, None].expand_as(block_top), block_top, "amax")
        part = torch.exp(logits - top.index_select(0, owner)[..., None])
        live_top = _unfold(top[..., None], rows) if rows > 1 else top[..., None]
        live = torch.exp(scores - live_top)
        total, read = live.sum(dim=-1, keepdim=True), torch.bmm(live, values)
        if rows > 1:
            total, read = _fold(total, rows), _fold(read, rows)
        total = total.index_add(0, owner, part.sum(dim=-1, keepdim=True))
        read = read.index_add(0, owner, torch.bmm(part, self.values)) / total
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
        self._device, self._dtype, self._rotate = device, dtype, rotate
        rows = [list(zip(p.compact, p.offsets, strict=True)) if p is not None else [] for p in prefixes]
        entries = [entry for row in rows for entry in row]
        self._count = len(rows)
        self._row = torch.tensor([number for number, row in enumerate(rows) for _ in row])  # of each segment
        self._offsets = [offset for _, offset in entries]
        self._lengths = torch.stack([segment.lengths for segment, _ in entries], dim=1)  # (L, segments, H)
        # a layer's slots of all heads lie together in a segment: one slice each, taken for all layers at once
        sizes = [segment.lengths.sum(dim=-1).tolist() for segment, _ in entries]
        self._slots = [
            list(
                zip(
                    *(getattr(segment, name).split(each) for (segment, _), each in zip(entries, sizes, strict=True)),
                    strict=True,
                )
            )
            for name in ("keys", "values", "bias")
        ]
        self._layers: dict[int, LayerMemory] = {}

    @classmethod
    def of(
        cls, prefixes: Sequence[Prefix | None], device: torch.device, dtype: torch.dtype, rotate: Rotate
    ) -> Memory | None:
        """The memory of a batch, or None when no row has compact KV. Rows with one prefix object share it."""
        if not any(prefix is not None and prefix.compact for prefix in prefixes):
            return None
        shared = all(prefix is prefixes[0] for prefix in prefixes)
        return cls(prefixes[:1] if shared else prefixes, device, dtype, rotate)

    def layer(self, index: int) -> LayerMemory:
        """The slots of one layer."""
        if index not in self._layers:
            self._layers[index] = self._lay_out(index)
        return self._layers[index]

    def _lay_out(self, layer: int) -> LayerMemory:
        sizes = self._lengths[layer]  # (segments, H)
        heads = self._count * sizes.shape[1]
        owners = self._row[:, None] * sizes.shape[1] + torch.arange(sizes.shape[1])
        counts = torch.zeros(heads, dtype=torch.int64).index_add_(0, owners.flatten(), sizes.flatten())
        longest, slots = int(counts.max()), int(counts.sum())
        one_block = heads * longest - slots <= _WORTH
        width = longest if one_block else _WIDTH
        blocks = torch.ones_like(counts) if one_block else (-(-counts // width)).clamp_min(1)
        index = self._places(sizes, owners, counts, blocks, width)
        keys, values, bias = (
            torch.cat(self._parts(name, layer)).index_select(0, index).to(self._device, self._dtype)
            for name in range(3)
        )
        total = int(blocks.sum())
        owner = None if one_block else torch.repeat_interleave(blocks).to(self._device)
        return LayerMemory(
            keys.view(total, width, -1).transpose(1, 2).contiguous(),
            values.view(total, width, -1),
            bias.view(total, 1, width),
            owner,
            heads,
        )

    @staticmethod
    def _places(
        sizes: torch.Tensor, owners: torch.Tensor, counts: torch.Tensor, blocks: torch.Tensor, width: int
    ) -> torch.Tensor:
        """Which slot of the layer, as they lie by segment and head, fills which place of the blocks.

        Args:
            sizes, owners: (segments, H) slots of each piece, and the head in R that reads it.
            counts, blocks: (R,) slots and blocks of each head; width: slots of a block.

        Returns:
            (blocks * width,) numbers of slots; a place that is filled up has the number after the last slot's.
        """
        slots = int(counts.sum())
        pieces = sizes.flatten()
        order = torch.argsort(owners.flatten(), stable=True)
        taken, first = pieces[order], (pieces.cumsum(0) - pieces)[order]
        here = torch.arange(slots)
        source = here + torch.repeat_interleave(first - (taken.cumsum(0) - taken), taken)
        moved = (blocks.cumsum(0) - blocks) * width - (counts.cumsum(0) - counts)
        index = torch.full((int(blocks.sum()) * width,), slots)
        index[here + torch.repeat_interleave(moved, counts)] = source
        return index

    def _parts(self, name: int, layer: int) -> list[torch.Tensor]:
        """One layer's keys (0), values (1) or biases (2) of every segment, and what fills a block up."""
        parts = list(self._slots[name][layer])
        if name == 0:
            parts = [
                self._rotate(keys, offset).to(keys.device) if offset else keys
                for keys, offset in zip(parts, self._offsets, strict=True)
            ]
        return [*parts, parts[0].new_full((1, *parts[0].shape[1:]), -torch.inf if name == 2 else 0)]
