"""Least squares from their normal equations, for many heads at once."""

from __future__ import annotations

import torch

__all__ = ["nnls", "solve"]


def nnls(gram: torch.Tensor, right: torch.Tensor, iterations: int) -> torch.Tensor:
    """Minimise x G x / 2 - r x over x >= 0, by accelerated projected gradient (Beck and Teboulle 2009).

    In units in which the diagonal of G is 1: attention has heavy tails, and unscaled that takes three times the steps.

    Args:
        gram: (B, k, k) symmetric positive. right: (B, k).

    Returns:
        (B, k).
    """
    unit = gram.diagonal(dim1=1, dim2=2).rsqrt()
    gram, right = gram * unit[:, :, None] * unit[:, None], right * unit
    vector = torch.ones_like(right)[..., None]
    for _ in range(12):  # power iteration for the largest eigenvalue
        vector = torch.bmm(gram, vector)
        vector = vector / vector.norm(dim=1, keepdim=True)
    step = 1 / (1.1 * torch.bmm(vector.transpose(1, 2), torch.bmm(gram, vector)))
    gram, right = gram * step, right[..., None] * step
    x = ahead = (1 / unit)[..., None]  # from 1 in the units of the caller
    pace = 1.0
    for _ in range(iterations):
        new = torch.baddbmm(ahead + right, gram, ahead, alpha=-1).clamp_min_(0)
        quicker = (1 + (1 + 4 * pace * pace) ** 0.5) / 2
        ahead = torch.lerp(x, new, 1 + (pace - 1) / quicker)
        x, pace = new, quicker
    return x[..., 0] * unit


def solve(gram: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """x with G x = r for symmetric positive (k, k) and (k, D)."""
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram))
