"""Compact KV by attention matching: the few slots that reproduce the attention of a chunk's whole KV cache.

Source: Attention Matching (Zweiger et al. 2026, arXiv 2602.16284) for the bias and the values, with the reference
queries of KVzip (Kim et al. 2025) and one budget over all heads together. No training; works for any decoder.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lloco_engine.compress.base import Compressor
from lloco_engine.errors import ConfigError
from lloco_engine.types import Segment

if TYPE_CHECKING:
    from lloco_engine.decoder.attention import Cache
    from lloco_engine.decoder.local import LocalDecoder

__all__ = ["AttentionMatching", "nnls"]

_LEAST_MASS = 1e-4  # a slot's mass is kept above 0, so that its logarithm, the bias, is finite
_PULL = 1e-2  # of the masses towards 1, relative to the mean squared attention
_ROWS = 256  # query rows scored at once, which bounds memory at _ROWS * n floats per KV head
_SPREAD = 0.15  # power of the mean attention in a position's importance; this and the next: docs/decisions/0003
_LENGTH = 0.35  # power of the value's length in it
_FUSED = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_BATCH = 2**25  # most floats of the fits' attention matrix, over the heads that are fitted together


@dataclass(frozen=True)
class _Seen:
    """What the reference queries of one layer saw; ``M`` rows are kept for the fits.

    importance : (H, n) largest attention any reference query pays to a position, and more: docs/decisions/0003
    queries    : (H, M, D) scaled; lse : (H, M, 1) log partition sum over template prefix and chunk
    output     : (H, M, D) attention output over both; mass : (H, M) share of that attention on the chunk
    """

    importance: torch.Tensor
    queries: torch.Tensor
    lse: torch.Tensor
    output: torch.Tensor
    mass: torch.Tensor


class AttentionMatching(Compressor):
    """Keeps the most important positions of every head, then fits a bias and a value to each.

    Args:
        ridge: pull of the values towards the originals, relative to the mean squared attention of the kept slots.
        fit_rows: most reference queries per KV head used in the fits.
        iterations: steps of the non-negative least squares.
        floor: share of an even split of the slots that every head gets, whatever the other heads need.
    """

    name = "attention_matching"

    def __init__(self, *, ridge: float = 1.0, fit_rows: int = 1024, iterations: int = 200, floor: float = 0.1) -> None:
        if not isinstance(ridge, int | float) or not ridge > 0:
            raise ConfigError(f"ridge must be a number above 0, not {ridge!r}")
        if fit_rows < 16 or iterations < 1:
            raise ConfigError(f"fit_rows must be at least 16 and iterations at least 1, not {fit_rows}, {iterations}")
        if not isinstance(floor, int | float) or not 0 <= floor <= 1:
            raise ConfigError(f"floor must be a number from 0 to 1, not {floor!r}")
        self._ridge, self._fit_rows, self._iterations, self._floor = ridge, fit_rows, iterations, floor

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return {
            "ridge": self._ridge,
            "fit_rows": self._fit_rows,
            "iterations": self._iterations,
            "floor": self._floor,
        }

    def longest_chunk(self, decoder: LocalDecoder) -> int:
        """Half the window: the chunk is read twice, once to be kept and once to be repeated."""
        return (decoder.shape.window - decoder.template_tokens - len(decoder.template.repeat_ids())) // 2

    @torch.inference_mode()
    def make(self, decoder: LocalDecoder, token_ids: Sequence[int], ratios: Sequence[float]) -> list[Segment]:
        """See `Compressor.compress`."""
        repeat = [*decoder.template.repeat_ids(), *token_ids]
        cache = decoder.prefill(token_ids, room=len(repeat))
        watch = _Watch(cache, decoder.template_tokens, decoder.runner.scale, self._fit_rows)
        # the queries only point at what matters, so half precision serves where the processor is quick at it
        with torch.autocast(decoder.runner.device.type, torch.bfloat16, enabled=_quicker_in_bf16(decoder)):
            decoder.follow(repeat, cache, watch.attend)
        chunk = slice(decoder.template_tokens, decoder.template_tokens + len(token_ids))
        importance = torch.stack([seen.importance for seen in watch.seen])
        return [self._fit(cache, watch.seen, select(importance, ratio, self._floor), chunk) for ratio in ratios]

    def _fit(self, cache: Cache, seen: list[_Seen], keep: torch.Tensor, chunk: slice) -> Segment:
        """Bias and values of the kept positions; heads of like size are fitted together, whatever their layer."""
        sizes = keep.sum(dim=-1)
        heads = keep.shape[1]
        keys, values, bias = ([torch.empty(0)] * sizes.numel() for _ in range(3))
        for batch in _batches(sizes.flatten().tolist(), seen[0].queries.shape[1]):
            where = [divmod(number, heads) for number in batch]
            # in float32, whatever the decoder's own precision: the fits square what they are given
            k = torch.stack([cache.keys[layer][0, head, chunk] for layer, head in where]).float()
            v = torch.stack([cache.values[layer][0, head, chunk] for layer, head in where]).float()
            fixed_k = torch.stack([cache.keys[layer][0, head, : chunk.start] for layer, head in where]).float()
            fixed_v = torch.stack([cache.values[layer][0, head, : chunk.start] for layer, head in where]).float()
            # a stable sort of "not kept" brings the kept positions to the front, in their order
            kept = torch.stack([keep[layer, head] for layer, head in where])
            size = kept.sum(dim=-1)
            index = torch.sort((~kept).to(torch.uint8), dim=-1, stable=True).indices[:, : int(size.max())]
            valid = torch.arange(index.shape[1], device=index.device)[None] < size[:, None]
            pick = index[..., None].expand(-1, -1, k.shape[-1])
            queries, lse, output, mass = (
                torch.stack([getattr(seen[layer], name)[head] for layer, head in where]).float()
                for name in ("queries", "lse", "output", "mass")
            )
            k, v = k.gather(1, pick), v.gather(1, pick)
            v, b = self._fit_heads(k, v, fixed_k, fixed_v, queries, lse, output, mass, valid)
            for i, number in enumerate(batch):
                n = int(size[i])
                keys[number], values[number], bias[number] = k[i, :n], v[i, :n], b[i, :n]
        return Segment(torch.cat(keys), torch.cat(values), torch.cat(bias).float(), sizes, keep.shape[-1])

    def _fit_heads(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        fixed_keys: torch.Tensor,
        fixed_values: torch.Tensor,
        queries: torch.Tensor,
        lse: torch.Tensor,
        output: torch.Tensor,
        mass: torch.Tensor,
        valid: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and biases of heads (B, k, D), ``valid`` (B, k), beside the whole template prefix (B, P, D)."""
        weights = torch.exp(torch.bmm(queries, keys.transpose(1, 2)) - lse) * valid[:, None]
        count = valid.sum(dim=-1, keepdim=True)
        # mass: w >= 0 such that the kept slots' weighted attention adds up to the chunk's, query by query
        gram = torch.bmm(weights.transpose(1, 2), weights)
        right = torch.bmm(weights.transpose(1, 2), mass[..., None])[..., 0]
        pull = _PULL * gram.diagonal(dim1=1, dim2=2).sum(-1, keepdim=True) / count + 1e-12  # towards w = 1
        gram.diagonal(dim1=1, dim2=2).add_(pull)
        w = torch.where(valid, nnls(gram, right + pull, self._iterations).clamp_min(_LEAST_MASS), 1.0)
        # values: ridge least squares of the full output on the re-weighted attention, towards the original values
        fixed = torch.exp(torch.bmm(queries, fixed_keys.transpose(1, 2)) - lse)
        weights = weights * w[:, None]
        total = weights.sum(-1, keepdim=True) + fixed.sum(-1, keepdim=True)
        weights, fixed = weights / total, fixed / total
        missing = output - torch.bmm(fixed, fixed_values) - torch.bmm(weights, values)
        gram = torch.bmm(weights.transpose(1, 2), weights)
        pull = (self._ridge * gram.diagonal(dim1=1, dim2=2).sum(-1, keepdim=True) / count).clamp_min(1e-9)
        gram.diagonal(dim1=1, dim2=2).add_(torch.where(valid, pull, 1.0))
        return values + _solve(gram, torch.bmm(weights.transpose(1, 2), missing)), w.log()


class _Watch:
    """Attention of the repetition over the context and over itself, taking notes layer by layer."""

    def __init__(self, cache: Cache, first: int, scale: float, fit_rows: int) -> None:
        self._context = cache.length  # template prefix and chunk
        self._first, self._scale, self._fit_rows = first, scale, fit_rows
        self.seen: list[_Seen] = []

    def attend(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """An `Attention`; notes what the layer's queries see of the chunk, in the cache's own precision."""
        with torch.autocast(keys.device.type, enabled=False):
            return self._attend(queries.to(keys.dtype), keys, values)

    def _attend(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        context, dim = self._context, keys.shape[-1]
        heads, tokens = queries.shape[1], queries.shape[2]
        group = heads // keys.shape[1]
        # apart, and then put together by their partition sums: the fits need the context's own output and sum
        own_keys, own_values = (x[:, :, context:].repeat_interleave(group, 1) for x in (keys, values))
        own, own_lse = causal_attention(queries, own_keys, own_values, self._scale)
        rows = queries.reshape(heads // group, group * tokens, dim) * self._scale
        own_lse = own_lse.reshape(rows.shape[:2])
        output, lse = self._note(rows, keys[0, :, :context], values[0, :, :context], own_lse, group)
        share = torch.sigmoid(lse - own_lse).to(keys.dtype).reshape(1, heads, tokens, 1)
        read = torch.lerp(own, output.reshape(1, heads, tokens, dim), share)
        return read.transpose(1, 2).reshape(1, tokens, -1)

    def _note(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, own_lse: torch.Tensor, group: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of a layer's rows (H, R, D) over the context (H, S, D), noted; gives its output and log sums.

        A position's importance is of the attention over the context and the repetition's own tokens together; the log
        sums of these are ``own_lse`` (H, R). It takes every row, the fits take some.
        """
        largest, total = keys.new_zeros(2, *keys.shape[:2])
        output, lse = torch.empty_like(queries), own_lse.new_empty(own_lse.shape)
        # head by head: batched products of few heads leave cores idle
        for head, row in itertools.product(range(keys.shape[0]), range(0, queries.shape[1], _ROWS)):
            part = head, slice(row, row + _ROWS)
            logits = queries[part] @ keys[head].T
            weights = torch.softmax(logits, dim=-1)
            lse[part] = logits.amax(dim=-1).float() - weights.amax(dim=-1).float().log()
            output[part] = weights @ values[head]
            weights *= torch.sigmoid(lse[part] - own_lse[part]).to(weights.dtype)[:, None]
            torch.maximum(largest[head], weights.amax(dim=0), out=largest[head])
            total[head] += weights.sum(dim=0)
        length = values.norm(dim=-1)
        importance = largest * (total / queries.shape[1]).pow_(_SPREAD) * length.pow_(_LENGTH)
        kept = spread(group, queries.shape[1] // group, self._fit_rows, device=keys.device)
        rows, sums_kept = queries[:, kept], lse[:, kept, None]
        fixed = torch.bmm(rows, keys[:, : self._first].transpose(1, 2)) - sums_kept.to(keys.dtype)
        mass = (1 - fixed.exp_().sum(dim=-1)).clamp_min_(0)
        self.seen.append(_Seen(importance[:, self._first :], rows, sums_kept, output[:, kept], mass))
        return output, lse


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
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of row i over the keys up to i, and the logarithm of its partition sums.

    Torch's public function keeps these sums to itself.

    Args:
        queries, keys, values: (1, H, R, D).
        scale: factor of the logits.

    Returns:
        output (1, H, R, D) and log partition sums (1, H, R) float32.
    """
    if _FUSED is not None and queries.device.type == "cpu":
        output, lse = _FUSED(queries, keys, values, 0.0, True, scale=scale)
        return output, lse
    outputs, sums = [], []
    for row in range(0, queries.shape[2], _ROWS):
        block = queries[:, :, row : row + _ROWS] * scale
        logits = (block @ keys.transpose(2, 3)).float()
        place = torch.arange(row, row + block.shape[2], device=keys.device)[:, None]
        logits.masked_fill_(torch.arange(keys.shape[2], device=keys.device) > place, -torch.inf)
        sums.append(torch.logsumexp(logits, dim=-1))
        outputs.append(torch.exp(logits - sums[-1][..., None]).to(values.dtype) @ values)
    return torch.cat(outputs, dim=2), torch.cat(sums, dim=2)


def _quicker_in_bf16(decoder: LocalDecoder) -> bool:
    """Whether a float32 decoder runs on a CPU that multiplies bfloat16 matrices in hardware."""
    on_cpu = decoder.runner.device.type == "cpu" and decoder.runner.dtype == torch.float32
    return on_cpu and bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def select(importance: torch.Tensor, ratio: float, floor: float) -> torch.Tensor:
    """Which positions stay: the best of each head up to a share of an even split, then the best of all heads together.

    Args:
        importance: (L, H, n). ratio: positions per kept slot. floor: that share.

    Returns:
        (L, H, n) bool, with about ``L * H * n / ratio`` true, at least one per head.
    """
    layers, heads, length = importance.shape
    budget = min(max(round(length / ratio * layers * heads), layers * heads), importance.numel())
    own = importance.topk(max(1, int(floor * length / ratio)), dim=-1).indices
    ranked = importance.scatter(2, own, torch.inf)
    keep = torch.zeros(importance.numel(), dtype=torch.bool, device=importance.device)
    keep[ranked.flatten().topk(budget).indices] = True
    return keep.view_as(importance)


def _batches(sizes: list[int], rows: int) -> Iterator[list[int]]:
    """Numbers of heads to fit together: sizes within a quarter of each other, so that little is padding."""
    batch: list[int] = []
    for number in sorted(range(len(sizes)), key=sizes.__getitem__):
        if batch and (sizes[number] > 1.25 * sizes[batch[0]] + 4 or (len(batch) + 1) * rows * sizes[number] > _BATCH):
            yield batch
            batch = []
        batch.append(number)
    yield batch


def nnls(gram: torch.Tensor, right: torch.Tensor, iterations: int) -> torch.Tensor:
    """Minimise x G x / 2 - r x over x >= 0, by accelerated projected gradient (Beck and Teboulle 2009).

    Args:
        gram: (B, k, k) symmetric positive. right: (B, k).

    Returns:
        (B, k).
    """
    vector = torch.ones_like(right)[..., None]
    for _ in range(12):  # power iteration for the largest eigenvalue
        vector = torch.bmm(gram, vector)
        vector = vector / vector.norm(dim=1, keepdim=True)
    step = 1 / (1.1 * torch.bmm(vector.transpose(1, 2), torch.bmm(gram, vector)))
    gram, right = gram * step, right[..., None] * step
    x = ahead = torch.ones_like(right)
    pace = 1.0
    for _ in range(iterations):
        new = torch.baddbmm(ahead + right, gram, ahead, alpha=-1).clamp_min_(0)
        quicker = (1 + (1 + 4 * pace * pace) ** 0.5) / 2
        ahead = torch.lerp(x, new, 1 + (pace - 1) / quicker)
        x, pace = new, quicker
    return x[..., 0]


def _solve(gram: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """x with G x = r for symmetric positive (B, k, k) and (B, k, D)."""
    if gram.device.type != "cpu":
        return torch.cholesky_solve(right, torch.linalg.cholesky(gram))
    # torch's batched factorisation on the CPU nests OpenMP teams inside MKL's own and can stall for minutes
    factors = [torch.linalg.cholesky(one) for one in gram]
    return torch.stack([torch.cholesky_solve(one, factor) for one, factor in zip(right, factors, strict=True)])
