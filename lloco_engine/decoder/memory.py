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

from lloco_engine.types import Prefix, Segment

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
        placed = [list(zip(p.compact, p.offsets, strict=True)) if p is not None else [] for p in prefixes]
        self._layers_heads = next(tuple(s.lengths.shape) for row in placed for s, _ in row)
        self._rows = [[(s, offset, _starts(s.lengths)) for s, offset in row] for row in placed]
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
        heads_per_row = self._layers_heads[1]
        pieces: list[list[tuple[int, int, int]]] = []  # per owner: (segment number, first slot, last slot)
        flat = [entry for row in self._rows for entry in row]
        number = 0
        for row in self._rows:
            for head in range(heads_per_row):
                at = layer * heads_per_row + head
                pieces.append([(number + i, entry[2][at], entry[2][at + 1]) for i, entry in enumerate(row)])
            number += len(row)
        sizes = [sum(end - start for _, start, end in owned) for owned in pieces]
        longest = max(sizes)
        one_block = len(sizes) * longest - sum(sizes) <= _WORTH
        width = longest if one_block else _WIDTH
        blocks = [1 if one_block else max(1, -(-size // width)) for size in sizes]
        total, dim = sum(blocks), flat[0][0].keys.shape[1]
        keys = torch.zeros(total * width, dim, device=self._device, dtype=self._dtype)
        values = torch.zeros_like(keys)
        bias = torch.full((total * width,), -torch.inf, device=self._device, dtype=self._dtype)
        begin = 0
        for owned, size, count in zip(pieces, sizes, blocks, strict=True):
            if size:
                here = slice(begin, begin + size)
                keys[here] = self._joined([self._keys(flat[n], a, b) for n, a, b in owned])
                values[here] = self._joined([flat[n][0].values[a:b] for n, a, b in owned])
                bias[here] = self._joined([flat[n][0].bias[a:b] for n, a, b in owned])
            begin += count * width
        owner = None
        if not one_block:
            owner = torch.repeat_interleave(torch.tensor(blocks)).to(self._device)
        return LayerMemory(
            keys.view(total, width, dim).transpose(1, 2).contiguous(),
            values.view(total, width, dim),
            bias.view(total, 1, width),
            owner,
            len(sizes),
        )

    def _keys(self, entry: tuple[Segment, int, list[int]], start: int, end: int) -> torch.Tensor:
        segment, offset, _ = entry
        keys = segment.keys[start:end]
        return self._rotate(keys, offset) if offset else keys

    def _joined(self, parts: list[torch.Tensor]) -> torch.Tensor:
        parts = [part.to(self._device) for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _starts(lengths: torch.Tensor) -> list[int]:
    """First slot of each (layer, head) and, last, the number of slots."""
    return [0, *lengths.flatten().cumsum(0).tolist()]
