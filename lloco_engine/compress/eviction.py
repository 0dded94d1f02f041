"""What methods of eviction share: some positions of the KV cache are kept as they are, with bias 0."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lloco_engine.types import Segment

if TYPE_CHECKING:
    from lloco_engine.decoder.attention import Cache

__all__ = ["keep_slots", "most_important_per_head", "positions_of", "select"]


def most_important_per_head(importance: torch.Tensor, ratio: float) -> torch.Tensor:
    """Positions to keep, the same number in every head.

    Args:
        importance: (L, H, n).
        ratio: source tokens per slot.

    Returns:
        (L, H, n) bool; ``n / ratio`` positions of each head, at least one.
    """
    count = min(importance.shape[-1], max(1, round(importance.shape[-1] / ratio)))
    keep = torch.zeros_like(importance, dtype=torch.bool)
    return keep.scatter(2, importance.topk(count, dim=-1).indices, True)


def select(importance: torch.Tensor, ratio: float, floor: float = 0.0) -> torch.Tensor:
    """Which positions stay: the best of each head up to a share of an even split, then the best of all heads together.

    Args:
        importance: (L, H, n).
        ratio: positions per kept slot.
        floor: that share.

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


def keep_slots(cache: Cache, first: int, keep: torch.Tensor) -> Segment:
    """A segment of the kept positions of a chunk.

    Args:
        cache: of template prefix and chunk.
        first: the chunk's first place in it.
        keep: (L, H, n) bool.
    """
    chunk = slice(first, first + keep.shape[-1])
    keep = keep.to(cache.keys[0].device)
    keys = torch.cat([layer[0, :, chunk][kept] for layer, kept in zip(cache.keys, keep, strict=True)])
    values = torch.cat([layer[0, :, chunk][kept] for layer, kept in zip(cache.values, keep, strict=True)])
    bias = torch.zeros(len(keys), device=keys.device)
    return Segment(keys, values, bias, keep.sum(dim=-1), keep.shape[-1], positions_of(keep, first))


def positions_of(keep: torch.Tensor, first: int) -> torch.Tensor:
    """(N,) int32 positions of the kept ones (L, H, n) of a chunk that begins at position ``first``, head after head."""
    return (keep.nonzero()[:, 2] + first).to(torch.int32)
