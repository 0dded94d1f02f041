"""Which segments each query reads: of many side by side, the few that it looks at most.

Segments are compressed apart and placed at the same positions, so every one of them offers each query something: the
more there are, the more of its attention goes to those that have nothing to do with it. So a query (one token of one
query head) reads the ``focus`` segments in which the largest of its logits lie, and no other but those that tie with
the last of them: segments that begin with the same words do, and which comes first must not matter
(docs/decisions/0009).

Here by torch's own products: on any device, with gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from lloco_engine.decoder.blocks import Piece
from lloco_engine.decoder.slots import LayerSlots

__all__ = ["TIE", "Focused"]

TIE = 1e-3  # largest logits that are no further apart count as equal: they may differ by rounding alone


class Focused(LayerSlots):
    """One layer's slots, of which each query reads some segments.

    Args:
        slots: for each of R heads its pieces, one of each segment.
        focus: for each of R heads, how many segments a query reads (0: all).
        prior: for each of R heads, what is added to the largest logit of each segment where they are compared (empty:
            0 for all).
        device, dtype: of the decoder.
    """

    def __init__(
        self,
        slots: Sequence[Sequence[Piece]],
        focus: Sequence[int],
        prior: Sequence[Sequence[float]],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        heads = zip(slots, focus, prior, strict=True)
        self._heads = [_Head(pieces, most, added, device, dtype) for pieces, most, added in heads]

    def attend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """See `LayerSlots.attend`."""
        rows, heads = keys.shape[:2]
        group = q.shape[1] // heads
        made = []
        for begin in range(0, len(self._heads), heads):  # once where all rows share the slots, else row by row
            of = slice(None) if len(self._heads) == heads else slice(begin // heads, begin // heads + 1)
            may = mask[of] if mask is not None and len(mask) > 1 else mask
            read = [
                self._heads[begin + head].attend(
                    q[of, head * group : (head + 1) * group], keys[of, head, None], values[of, head, None], may, scale
                )
                for head in range(heads)
            ]
            made.append(torch.cat(read, dim=1))
        return torch.cat(made).transpose(1, 2).reshape(rows, q.shape[2], -1)


class _Head:
    """One KV head's slots of all segments, one segment after another."""

    def __init__(
        self, pieces: Sequence[Piece], focus: int, prior: Sequence[float], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._sizes = torch.tensor([len(bias) for *_, bias in pieces], dtype=torch.int64)
        self._focus = focus if 0 < focus < len(pieces) else 0
        self._prior = torch.tensor(prior or [0.0] * len(pieces), device=device)
        self._parts = [torch.cat(parts).to(device, dtype) for parts in zip(*pieces, strict=True)]

    def attend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """Attention of a group's queries (B, G, T, D) over the slots and the live tokens (B, 1, S, D)."""
        if not self._parts:  # a row without segments
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
        own, read, _ = self._parts
        rows, group, tokens, _ = q.shape
        added = self._added(q, scale)
        live = q.new_zeros(()) if mask is None else mask
        added = torch.cat((added, live.expand(rows, group, tokens, keys.shape[2])), dim=-1)
        keys = torch.cat((own.expand(rows, 1, -1, -1), keys), dim=2).expand(-1, group, -1, -1)
        values = torch.cat((read.expand(rows, 1, -1, -1), values), dim=2).expand(-1, group, -1, -1)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=added, scale=scale)

    @torch.no_grad()
    def _added(self, q: torch.Tensor, scale: float) -> torch.Tensor:
        """(B, G, T, N) what is added to the slots' logits: their biases, and -inf where a segment is not read."""
        keys, _, bias = self._parts
        if not self._focus:
            return bias.expand(*q.shape[:3], -1)
        logits = torch.matmul(q * scale, keys.T) + bias
        largest = [part.amax(-1) if part.shape[-1] else None for part in torch.split(logits, self._sizes.tolist(), -1)]
        none = logits.new_full(logits.shape[:-1], -torch.inf)  # a segment that has no slot in this head
        scores = torch.stack([none if one is None else one for one in largest], dim=-1) + self._prior
        kept = scores >= scores.topk(self._focus, dim=-1).values[..., -1:] - TIE
        kept = kept.repeat_interleave(self._sizes.to(kept.device), dim=-1)
        return bias.expand(kept.shape).masked_fill(~kept, -torch.inf)
