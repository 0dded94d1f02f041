"""The first reading of the repetition, which finds out what of the chunk matters.

Source: the reference queries of KVzip (Kim et al. 2025, arXiv 2505.23416): those of a decoder that repeats the text.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lloco_engine.decoder.rules import PLAIN, Rules, with_sink

if TYPE_CHECKING:
    from lloco_engine.decoder.attention import Cache

__all__ = ["Repetition", "Seen", "causal_attention", "spread"]

_ROWS = 1024  # query rows scored at once, which bounds memory at _ROWS * n floats; fewer wait for threads more often
_SPREAD = 0.15  # power of the mean attention in a position's importance; this and the next: docs/decisions/0003
_LENGTH = 0.35  # power of the value's length in it
_FUSED = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


@dataclass(frozen=True)
class Seen:
    """What the reference queries of one layer saw; ``M`` rows are kept for the masses, ``T`` tokens for the values.

    importance : (H, n) largest attention any reference query pays to a position, and more: docs/decisions/0003
    queries    : (H, M, D) scaled; lse : (H, M, 1) log partition sum over template prefix and chunk, infinite where a
                 query's window holds nothing of them
    at         : (M,) positions of the queries
    mass       : (H, M) share of that attention on the chunk
    read       : (1, query heads, T, D) attention output over template prefix, chunk and repetition
    """

    importance: torch.Tensor
    queries: torch.Tensor
    lse: torch.Tensor
    at: torch.Tensor
    mass: torch.Tensor
    read: torch.Tensor


class Repetition:
    """Attention of the repetition over the context and over itself, taking notes layer by layer."""

    def __init__(
        self, cache: Cache, first: int, scale: float, fit_rows: int, fit_tokens: int, rules: Sequence[Rules]
    ) -> None:
        self._context = cache.length  # template prefix and chunk: the first places are the first positions
        self._rules = rules
        self._first, self._scale, self._fit_rows, self._fit_tokens = first, scale, fit_rows, fit_tokens
        self.seen: list[Seen] = []

    def attend(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """An `Attention`; notes what the layer's queries see of the chunk, in the cache's own precision."""
        with torch.autocast(keys.device.type, enabled=False):
            return self._attend(self._rules[layer], queries.to(keys.dtype), keys, values)

    def _attend(self, rules: Rules, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        context, dim = self._context, keys.shape[-1]
        heads, tokens = queries.shape[1], queries.shape[2]
        group = heads // keys.shape[1]
        # apart, and then put together by their partition sums: the masses need the context's own sum
        own_keys, own_values = (x[:, :, context:].repeat_interleave(group, 1) for x in (keys, values))
        at = torch.arange(context, context + tokens, device=keys.device)
        own, own_lse = with_sink(rules, *causal_attention(queries, own_keys, own_values, self._scale, rules, at))
        rows = queries.reshape(heads // group, group * tokens, dim) * self._scale
        keys, values, own_lse = keys[0, :, :context], values[0, :, :context], own_lse.reshape(rows.shape[:2])
        at = at.repeat(group)
        output, lse, importance = self._read(rules, rows, at, keys, values, own_lse)
        share = torch.sigmoid(lse - own_lse).to(keys.dtype).reshape(1, heads, tokens, 1)
        read = torch.lerp(own, output.reshape(1, heads, tokens, dim), share)
        kept = spread(group, tokens, self._fit_rows, device=keys.device)
        rows, lse, at = rows[:, kept], lse[:, kept, None], at[kept]
        # of a query whose window holds nothing of the context: infinite, so that it weighs nothing in the fits
        lse = lse.masked_fill(lse < torch.finfo(keys.dtype).min / 2, torch.inf)
        fixed = _logits(rules, rows, at, keys[:, : self._first]) - lse.to(keys.dtype)
        mass = (1 - fixed.exp_().sum(dim=-1)).clamp_min_(0)
        self.seen.append(
            Seen(importance[:, self._first :], rows, lse, at, mass, read[:, :, : self._fit_tokens].contiguous())
        )
        return read.transpose(1, 2).reshape(1, tokens, -1)

    def _read(
        self,
        rules: Rules,
        queries: torch.Tensor,
        at: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        own_lse: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Attention of a layer's rows (H, R, D), which are at positions (R,), over the context (H, S, D).

        Returns:
            output (H, R, D), log partition sums (H, R) and the importance (H, S) of the attention over the context and
            the repetition's own tokens together; the log sums of these are ``own_lse`` (H, R).
        """
        largest, total = keys.new_zeros(2, *keys.shape[:2])
        output, lse = torch.empty_like(queries), own_lse.new_empty(own_lse.shape)
        # head by head: batched products of few heads leave cores idle
        for head, row in itertools.product(range(keys.shape[0]), range(0, queries.shape[1], _ROWS)):
            part = head, slice(row, row + _ROWS)
            logits = _logits(rules, queries[part], at[part[1]], keys[head])
            weights = torch.softmax(logits, dim=-1)
            lse[part] = logits.amax(dim=-1).float() - weights.amax(dim=-1).float().log()
            output[part] = weights @ values[head]
            weights *= torch.sigmoid(lse[part] - own_lse[part]).to(weights.dtype)[:, None]
            torch.maximum(largest[head], weights.amax(dim=0), out=largest[head])
            total[head] += weights.sum(dim=0)
        mean = total / queries.shape[1]
        return output, lse, largest * mean.pow_(_SPREAD) * values.norm(dim=-1).pow_(_LENGTH)


def _logits(rules: Rules, queries: torch.Tensor, at: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Logits (..., R, S) of scaled queries (..., R, D), which are at positions (R,), with keys at positions 0 to S."""
    logits = rules.cap(queries @ keys.transpose(-1, -2))
    hidden = rules.hidden(at[:, None], torch.arange(keys.shape[-2], device=keys.device))
    return logits if hidden is None else logits.masked_fill(hidden, torch.finfo(logits.dtype).min)


def spread(group: int, tokens: int, most: int, device: torch.device | None = None) -> torch.Tensor:
    """About ``most`` of a KV head's rows, of which each query head gives those of other tokens.

    Few queries ask for any one position: with the same tokens left out of all query heads, every second position would
    lose all of its own.

    Returns:
        (rows,) int64 numbers in ``group * tokens``, ascending.
    """
    step = -(-group * tokens // most)
    rows = [
        torch.arange(head * tokens + head * step // group, (head + 1) * tokens, step, device=device)
        for head in range(group)
    ]
    return torch.cat(rows)


def causal_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    rules: Rules = PLAIN,
    at: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of row i over the keys up to i, and the logarithm of its partition sums.

    Torch's public function keeps these sums to itself.

    Args:
        queries, keys, values: (1, H, R, D).
        scale: factor of the logits.
        rules: of the layer, sinks left to the caller.
        at: (R,) positions, where the layer has a window.

    Returns:
        output (1, H, R, D) and log partition sums (1, H, R) float32.
    """
    if _FUSED is not None and queries.device.type == "cpu" and rules.softcap is None and rules.sees is None:
        output, lse = _FUSED(queries, keys, values, 0.0, True, scale=scale)
        return output, lse
    outputs, sums = [], []
    for row in range(0, queries.shape[2], _ROWS):
        block = queries[:, :, row : row + _ROWS] * scale
        logits = rules.cap(block @ keys.transpose(2, 3)).float()
        place = torch.arange(row, row + block.shape[2], device=keys.device)[:, None]
        logits.masked_fill_(torch.arange(keys.shape[2], device=keys.device) > place, -torch.inf)
        if at is not None and (hidden := rules.hidden(at[row : row + _ROWS, None], at)) is not None:
            logits.masked_fill_(hidden, -torch.inf)
        sums.append(torch.logsumexp(logits, dim=-1))
        outputs.append(torch.exp(logits - sums[-1][..., None]).to(values.dtype) @ values)
    return torch.cat(outputs, dim=2), torch.cat(sums, dim=2)
