"""Attention over keys that lie apart: each part is read by itself, and then the parts are put together.

A part gives what it read, softmax over its own keys alone, and its mass: the logarithm of the sum of its
exponentiated logits. The masses are the logits of a softmax over the parts.
"""

from __future__ import annotations

import torch

__all__ = ["merge", "read_part"]

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def read_part(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over one part of the keys.

    Args:
        q: (N, G, M, D); keys, values: (N, 1, S, D), which all of G read.
        mask: additive, (N or 1, 1, M or 1, S), or None; every query has some finite logit.
        scale: factor of the logits.

    Returns:
        what was read, (N, G, M, D), and the mass, (N, G, M).
    """
    if q.device.type == "cpu" and q.dtype == torch.float32 and not torch.is_grad_enabled():
        # the kernel behind scaled_dot_product_attention, which keeps the mass to itself
        if q.shape[1] > 1:
            keys, values = (x.expand(-1, q.shape[1], -1, -1) for x in (keys, values))
        read, mass = _fused(q, keys, values, attn_mask=mask, scale=scale)
        return read, mass
    logits = torch.matmul(q * scale, keys.transpose(-1, -2))
    if mask is not None:
        logits = logits + mask
    mass = torch.logsumexp(logits, dim=-1)
    return torch.matmul(torch.exp(logits - mass[..., None]), values), mass


def merge(reads: torch.Tensor, masses: torch.Tensor, owned: torch.Tensor) -> torch.Tensor:
    """Put parts together.

    Args:
        reads: (P, M, D) what each part read. masses: (P, M).
        owned: (R, 1, P), 0 where a part is one of R's, else -inf.

    Returns:
        (R, M, D).
    """
    weights = torch.softmax(masses.T + owned, dim=-1)  # (R, M, P)
    return torch.bmm(weights.transpose(0, 1), reads.transpose(0, 1)).transpose(0, 1)
