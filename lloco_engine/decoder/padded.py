"""A layer's ragged slots, the heads filled up to the longest, read by torch: on any device, with gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from lloco_engine.decoder.attention import masked
from lloco_engine.decoder.rules import PLAIN, Rules, attend_by
from lloco_engine.decoder.slots import TIE, LayerSlots
from lloco_engine.errors import SegmentUnavailable
from lloco_engine.types import Segment

__all__ = ["Choice", "Padded", "Segments"]


class Segments:
    """The segments of a memory on the decoder's device: moved there whole, and laid out layer by layer.

    Args:
        rows: the segments of each row.
        focus: of each row, how many of them a query reads (0: all).
        prior: of each row, one number a segment that is added to its largest logit where they are compared, or none.
        device, dtype: of the decoder.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[Segment]],
        focus: Sequence[int],
        prior: Sequence[Sequence[float]],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        segments = [segment for row in rows for segment in row]
        lengths = np.stack([one.lengths.cpu().numpy() for one in segments])  # (segments, layers, heads)
        of_row = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        slots = np.zeros((lengths.shape[1], len(rows), lengths.shape[2]), np.int64)  # of each layer, row and head
        begins = np.empty_like(lengths)  # of each segment's slots among those of its head
        for segment, row in enumerate(of_row):
            begins[segment] = slots[:, row]
            slots[:, row] += lengths[segment]
        self._widths = slots.max((1, 2)).clip(1)  # of each layer
        ends = (self._widths * slots[0].size).cumsum()
        self._begins = np.concatenate(([0], ends))
        # where each head of a layer begins, rows one after another
        heads = self._begins[:-1, None] + self._widths[:, None] * np.arange(slots[0].size)
        begins += heads.reshape(slots.shape)[:, of_row].swapaxes(0, 1)
        # slots are stored segment after segment, and in each layer after layer and head after head
        sizes = lengths.reshape(-1)
        moved = np.repeat(begins.reshape(-1) - (sizes.cumsum() - sizes), sizes)
        place = torch.from_numpy(np.arange(len(moved)) + moved).to(device)
        number = np.concatenate([np.arange(len(row)) for row in rows])
        owner = torch.from_numpy(np.repeat(number, lengths.sum((1, 2)))).to(device)

        def laid(flat: torch.Tensor, filler: float) -> torch.Tensor:
            return flat.new_full((int(ends[-1]), *flat.shape[1:]), filler).index_copy_(0, place, flat)

        def joined(part: str) -> torch.Tensor:
            return torch.cat([getattr(one, part).to(device, dtype) for one in segments])

        self._keys, self._values = laid(joined("keys"), 0), laid(joined("values"), 0)
        self._bias, self._owner = laid(joined("bias"), -math.inf), laid(owner, 0)
        self._positions = None
        if all(one.positions is not None for one in segments):
            given = [one.positions for one in segments if one.positions is not None]
            self._positions = laid(torch.cat([one.to(device, torch.int64) for one in given]), 0)
        self._shape = slots.shape[1:]
        self._choice = Choice.of(rows, focus, prior, device)

    def layer(self, index: int) -> Padded:
        """The slots of one layer."""
        here = slice(int(self._begins[index]), int(self._begins[index + 1]))
        shape = (*self._shape, int(self._widths[index]))
        keys, values = (flat[here].view(*shape, -1) for flat in (self._keys, self._values))
        places = None if self._positions is None else self._positions[here].view(shape)
        return Padded(keys, values, self._bias[here].view(shape), self._owner[here].view(shape), self._choice, places)


class Choice:
    """Which segments the queries of each row read.

    Args:
        focus: (R,) int64, how many; the number of segments where all of them are read.
        most: the largest of these.
        prior: (R, segments) float32, added to each segment's largest logit.
    """

    def __init__(self, focus: torch.Tensor, most: int, prior: torch.Tensor) -> None:
        self._rank = (focus - 1)[:, None, None, None]  # of the last that is read
        self._most, self._prior = most, prior[:, None, None]

    @classmethod
    def of(
        cls,
        rows: Sequence[Sequence[Segment]],
        focus: Sequence[int],
        prior: Sequence[Sequence[float]],
        device: torch.device,
    ) -> Choice | None:
        """As `Segments` is told of it; None where every query reads all there is."""
        some = [0 < most < len(row) for most, row in zip(focus, rows, strict=True)]
        if not any(some):
            return None
        segments = max(map(len, rows))
        counts = [most if chosen else segments for most, chosen in zip(focus, some, strict=True)]
        added = torch.zeros(len(rows), segments)
        for row, given in enumerate(prior):
            added[row, : len(given)] = torch.tensor(given)
        return cls(torch.tensor(counts, device=device), max(counts), added.to(device))

    def unread(self, logits: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        """Which slots a query does not read: (B, H, M, N) bool, of their logits (B, H, M, N) float32.

        ``owner`` (B or 1, H, N) is the segment of each slot.
        """
        owner = owner[:, :, None].expand(logits.shape)
        none = logits.new_full((*logits.shape[:-1], self._prior.shape[-1]), -torch.inf)  # segments without a slot here
        scores = none.scatter_reduce_(-1, owner, logits, "amax") + self._prior
        best = scores.topk(self._most, dim=-1).values
        last = best.gather(-1, self._rank.expand(*best.shape[:-1], 1))
        return (scores < last - TIE).gather(-1, owner)


class Padded(LayerSlots):
    """One layer's slots: few operations, each over all heads, since a GPU waits for their number and not their size.

    Args:
        keys, values: (R, H, N, D), R the rows of a batch, or 1 where they share the slots.
        bias: (R, H, N), -inf where a head is filled up.
        owner: (R, H, N) int64, the segment of each slot.
        choice: which segments are read, or None for all.
        positions: (R, H, N) int64, each slot's position, or None where they are not known.
    """

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        bias: torch.Tensor,
        owner: torch.Tensor,
        choice: Choice | None,
        positions: torch.Tensor | None = None,
    ) -> None:
        self.keys, self.values, self.bias = keys, values, bias
        self._owner, self._choice, self._positions = owner, choice, positions

    def _hidden(self, rules: Rules, at: torch.Tensor | None) -> torch.Tensor | None:
        """(B or 1, H, T, N) bool: slots that lie outside a token's window; None without one."""
        if rules.sees is None or at is None:
            return None
        if self._positions is None:
            last = at.max()
            if bool(rules.sees(last, torch.zeros_like(last))):  # it reads all there is, wherever that is
                return None
            raise SegmentUnavailable(
                "a segment must say at which position each of its slots is, where a decoder has layers that read a "
                f"window of positions and a prompt goes on to position {int(last)}, and one of these does not, as none "
                "of former releases does: ingest its document into a new store, or ask for fewer or shorter texts"
            )
        return rules.hidden(at[:, None, :, None], self._positions[:, :, None])

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        rules: Rules = PLAIN,
        at: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `LayerSlots.attend`.

        Raises:
            SegmentUnavailable: the layer has a window, and the segments do not say where their slots are.
        """
        hidden = self._hidden(rules, at)
        rows, query_heads, tokens, dim = q.shape
        heads = keys.shape[1]
        group = query_heads // heads
        # the query heads of one KV head side by side: they read the same
        q = q.reshape(rows, heads, group * tokens, dim)
        hidden = None if hidden is None else hidden.repeat(1, 1, group, 1)
        added = self._added(rules, q, scale, hidden).expand(rows, heads, group * tokens, -1)
        live = q.new_zeros(()) if mask is None else mask.repeat(1, 1, group, 1)
        added = torch.cat((added, live.expand(rows, heads, group * tokens, keys.shape[2])), dim=-1)
        keys = torch.cat((self.keys.expand(rows, -1, -1, -1), keys), dim=2)
        values = torch.cat((self.values.expand(rows, -1, -1, -1), values), dim=2)
        plain = rules.plain
        read = masked(q, keys, values, added, scale) if plain else attend_by(rules, q, keys, values, added, scale)
        return read.reshape(rows, query_heads, tokens, dim).transpose(1, 2).reshape(rows, tokens, -1)

    def _added(self, rules: Rules, q: torch.Tensor, scale: float, hidden: torch.Tensor | None) -> torch.Tensor:
        """(B or 1, H, M or 1, N) what is added to the slots' logits: their biases, -inf where a slot is not read."""
        bias = self.bias[:, :, None]
        if hidden is not None:
            bias = torch.where(hidden, -torch.inf, bias)
        if self._choice is None:
            return bias
        with torch.no_grad():  # a choice has no slope; the biases have
            # in float32, whatever the decoder's own precision: which logit is largest must not hang on rounding
            logits = rules.cap(torch.matmul(q.float() * scale, self.keys.float().transpose(-1, -2))) + bias
            unread = self._choice.unread(logits, self._owner)
        return bias.masked_fill(unread, -torch.inf)
