"""Values fitted while the compacted decoder itself repeats the chunk, layer by layer.

Source: the least squares of Attention Matching (Zweiger et al. 2026, arXiv 2602.16284) with the asymmetric
reconstruction of Zhang et al. 2016 (arXiv 1505.06798): a layer is given what the layers before it make of their fitted
slots, and aims at what it gave with the whole cache, so that it mends what they left undone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lloco_engine.compress.least_squares import solve
from lloco_engine.compress.repetition import causal_attention
from lloco_engine.decoder.rules import Rules, with_sink

if TYPE_CHECKING:
    from lloco_engine.decoder.attention import Cache

__all__ = ["Rereading"]


class Rereading:
    """Reads the repetition with the kept slots, and fits the slots' values on the way.

    Args:
        cache: template prefix and chunk.
        first: tokens of the template prefix.
        goal: by layer, (1, query heads, T, D) what the repetition's first T tokens read with the whole cache.
        keep: (L, H, n) bool, the positions that stay.
        bias: by layer and head, (k,) float32 of its kept positions.
        scale: factor of the logits.
        rules: of each layer.
        ridge: pull of the values towards the originals, relative to the mean squared attention of a head's slots.
    """

    def __init__(
        self,
        cache: Cache,
        first: int,
        goal: Sequence[torch.Tensor],
        keep: torch.Tensor,
        bias: Sequence[torch.Tensor],
        *,
        scale: float,
        rules: Sequence[Rules],
        ridge: float,
    ) -> None:
        self._cache, self._goal, self._keep, self._bias = cache, goal, keep, bias
        self._chunk = slice(first, first + keep.shape[-1])
        self._scale, self._rules, self._ridge = scale, rules, ridge
        self.values: list[torch.Tensor] = []  # by layer and head, (k, D) float32

    def attend(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """An `Attention` of those T tokens; leaves the layer's fitted values in ``values``."""
        with torch.autocast(keys.device.type, enabled=False):
            # in float32, whatever the decoder's own precision: the fits square what they are given
            (_, query_heads, tokens, dim), heads = queries.shape, keys.shape[1]
            queries = queries.float() * self._scale
            own_keys, own_values = (part.float().repeat_interleave(query_heads // heads, 1) for part in (keys, values))
            rules, at = (
                self._rules[layer],
                torch.arange(self._chunk.stop, self._chunk.stop + tokens, device=keys.device),
            )
            own, lse = with_sink(rules, *causal_attention(queries, own_keys, own_values, 1.0, rules, at))
            rows, own, goal = (part.reshape(heads, -1, dim) for part in (queries, own, self._goal[layer].float()))
            lse = lse.reshape(heads, -1, 1)
            read = torch.stack([self._head(layer, h, rows[h], own[h], lse[h], goal[h]) for h in range(heads)])
            return read.view(1, query_heads, tokens, dim).transpose(1, 2).reshape(1, tokens, -1).to(keys.dtype)

    def _head(
        self, layer: int, head: int, queries: torch.Tensor, own: torch.Tensor, lse: torch.Tensor, goal: torch.Tensor
    ) -> torch.Tensor:
        """What a head's rows (R, D) read with its values fitted, (R, D).

        ``own`` (R, D) is what they read of the repetition, ``lse`` (R, 1) its log partition sum, and ``goal`` (R, D)
        what they are to read of everything.
        """
        chunk, kept = self._chunk, self._keep[layer, head]
        keys, values = (part[layer][0, head] for part in (self._cache.keys, self._cache.values))
        keys, values = (torch.cat((part[: chunk.start], part[chunk][kept])).float() for part in (keys, values))
        rules = self._rules[layer]
        logits = rules.cap(queries @ keys.T)
        logits[:, chunk.start :] += self._bias[layer * self._keep.shape[1] + head]
        if rules.sees is not None:
            places = torch.arange(chunk.stop, device=keys.device)
            places = torch.cat((places[: chunk.start], places[chunk][kept]))
            tokens = self._goal[layer].shape[2]
            at = torch.arange(chunk.stop, chunk.stop + tokens, device=keys.device).repeat(len(queries) // tokens)
            logits = logits.masked_fill(~rules.sees(at[:, None], places), torch.finfo(logits.dtype).min)
        # the share of every slot, and last of the repetition, in all that a row attends to
        shares = torch.softmax(torch.cat((logits, lse), dim=1), dim=1)
        slots = shares[:, chunk.start : -1]
        read = torch.addmm(shares[:, -1:] * own, shares[:, :-1], values)
        gram = slots.T @ slots
        gram.diagonal().add_((self._ridge * gram.diagonal().mean()).clamp_min(1e-9))
        change = solve(gram, slots.T @ (goal - read))
        self.values.append(values[chunk.start :] + change)
        return torch.addmm(read, slots, change)
