"""A prefix's ragged slots for the Triton kernel: any device Triton runs on, without gradients.

Slots lie as segments store them, one segment after another: nothing is filled up, so a layer whose heads differ in
length takes the memory of its slots and no more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import triton

from lloco_engine.decoder.gpu_kernel.kernel import read_segment
from lloco_engine.decoder.rules import PLAIN, Rules
from lloco_engine.decoder.slots import TIE, LayerSlots
from lloco_engine.types import Segment

__all__ = ["Ragged", "Segments"]

_EACH = 16  # queries of a program: the least that a matrix product takes
_AT_ONCE = 64  # slots that a program reads together
_QUERIES = 2048  # of one KV head that are read together: room is taken for a partial result of each segment


class Segments:
    """The segments of a memory on the decoder's device, as the kernel is told of them.

    Args:
        rows: the segments of each row.
        focus: of each row, how many of them a query reads (0: all).
        prior: of each row, one number a segment, or none: see `lloco_engine.decoder.slots`.
        device, dtype: of the decoder.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[Segment]],
        focus: Sequence[int],
        prior: Sequence[Sequence[float]],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        segments = [segment for row in rows for segment in row]
        lengths = np.stack([one.lengths.cpu().numpy() for one in segments])  # (segments, layers, heads)
        ends = lengths.reshape(-1).cumsum().reshape(lengths.shape)

        def told(array: np.ndarray | Sequence[int], kind: torch.dtype) -> torch.Tensor:
            return torch.as_tensor(np.ascontiguousarray(array), device=device).to(kind)

        self.begins = told((ends - lengths).swapaxes(0, 1), torch.int64)  # (layers, segments, heads)
        self.counts = told(lengths.swapaxes(0, 1), torch.int32)
        self.keys, self.values = (
            torch.cat([getattr(one, part).to(device, dtype) for one in segments]) for part in ("keys", "values")
        )
        self.bias = torch.cat([one.bias.to(device, torch.float32) for one in segments])
        many = np.array([len(row) for row in rows])
        self.many, self.of_row = told(many, torch.int32), told(many.cumsum() - many, torch.int32)
        self.rows, self.most = len(rows), max(1, int(many.max()))
        read = [chosen if 0 < chosen < len(row) else self.most for chosen, row in zip(focus, rows, strict=True)]
        self.read = max(read)  # by any query
        self.last = told([one - 1 for one in read], torch.int64)[:, None, None, None]  # rank of the last that is read
        self.chosen = min(read) < self.most
        added = np.zeros((len(rows), self.most), np.float32)
        for row, given in enumerate(prior):
            added[row, : len(given)] = given
        self.prior = told(added, torch.float32)[:, None, :, None]

    def layer(self, index: int) -> Ragged:
        """The slots of one layer."""
        return Ragged(self, index)


class Ragged(LayerSlots):
    """One layer's slots.

    Args:
        segments: what the layers share.
        index: of the layer.
    """

    def __init__(self, segments: Segments, index: int) -> None:
        self._segments = segments
        self._begins, self._counts = segments.begins[index], segments.counts[index]

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
        """See `LayerSlots.attend`."""
        if not rules.plain:
            raise ValueError("a layer that the kernel reads must have no softcap, sinks or window; read it by `padded`")
        rows, query_heads, tokens, dim = q.shape
        heads = keys.shape[1]
        group = query_heads // heads
        step = max(1, _QUERIES // group)
        parts = []
        for first in range(0, tokens, step):
            some = q[:, :, first : first + step].reshape(rows, heads, -1, dim)
            shown = None if mask is None else mask[:, :, first : first + step].repeat(1, 1, group, 1)
            read = self._attend(some, keys, values, shown, scale)
            parts.append(read.view(rows, query_heads, -1, dim))
        read = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        return read.transpose(1, 2).reshape(rows, tokens, -1).to(q.dtype)

    def _attend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """(B, H, M, D) of queries (B, H, M, D), float32."""
        out, mass = self._read(q, scale)
        logits = torch.matmul(q, keys.transpose(-1, -2)).float() * scale
        logits = logits if mask is None else logits + mask
        live = logits.logsumexp(-1)
        mass = torch.cat((mass, live[:, :, None]), 2)
        shares = torch.softmax(mass, 2)[..., None]  # of the segments, and of the live tokens
        of_live = torch.matmul(torch.exp(logits - live[..., None]).to(values.dtype), values).float()
        return (out * shares[:, :, :-1]).sum(2) + of_live * shares[:, :, -1]

    def _read(self, q: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """What each segment gives each query, (B, H, S, M, D), and the logarithm of its weight, (B, H, S, M)."""
        held, (rows, heads, queries, dim) = self._segments, q.shape
        out = q.new_empty((rows, heads, held.most, queries, dim), dtype=torch.float32)
        mass, largest = (q.new_empty(out.shape[:-1], dtype=torch.float32) for _ in range(2))
        grid = (triton.cdiv(queries, _EACH), rows * heads, held.most)
        read_segment[grid](
            q.contiguous(),
            held.keys,
            held.values,
            held.bias,
            self._begins,
            self._counts,
            held.of_row,
            held.many,
            out,
            mass,
            largest,
            scale,
            heads,
            queries,
            dim,
            held.most,
            int(held.rows == 1),
            EACH=_EACH,
            AT_ONCE=_AT_ONCE,
            WIDE=max(16, triton.next_power_of_2(dim)),
        )
        if held.chosen:
            scores = largest + held.prior
            best = scores.topk(held.read, dim=2).values
            last = best.gather(2, held.last.expand(rows, heads, 1, queries))
            mass = mass.masked_fill(scores < last - TIE, -math.inf)
        return out, mass
