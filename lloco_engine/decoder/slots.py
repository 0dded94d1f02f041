"""The contract of a layer's slots, however they are laid out: `blocks` for torch, `ragged` for a kernel of our own."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

__all__ = ["LayerSlots"]


class LayerSlots(ABC):
    """The slots of one layer. ``R`` is KV heads times rows, or KV heads alone where all rows share the prefix.

    Args:
        heads: R.
    """

    def __init__(self, heads: int) -> None:
        self.heads = heads

    def attend(self, q: torch.Tensor, read: torch.Tensor, mass: torch.Tensor, scale: float) -> torch.Tensor:
        """Softmax attention over these slots and the live tokens together.

        Args:
            q: (B*H, M, D). read, mass: the live tokens' part, (B*H, M, D) and (B*H, M). scale: factor of the logits.

        Returns:
            (B*H, M, D).
        """
        rows = q.shape[0] // self.heads
        if rows == 1:
            return self._attend(q, read, mass, scale)
        q, read, mass = _fold(q, rows), _fold(read, rows), _fold(mass[..., None], rows)[..., 0]
        return _unfold(self._attend(q, read, mass, scale), rows)

    def step(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor | None:
        """The same for a single token of every row, with the live tokens not read yet: all of them may be read.

        Args:
            q: (B, H*G, 1, D). keys, values: (B, H, S, D) of the live tokens. scale: factor of the logits.

        Returns:
            (B*H, G, D), or None where this way of reading does not serve: `attend` does.
        """
        return None

    @abstractmethod
    def _attend(self, q: torch.Tensor, read: torch.Tensor, mass: torch.Tensor, scale: float) -> torch.Tensor:
        """`attend` of R heads, which have slots of their own."""


def _fold(x: torch.Tensor, rows: int) -> torch.Tensor:
    """(rows*heads, M, X) -> (heads, rows*M, X): the rows' queries side by side, for heads that all rows share."""
    heads, last = x.shape[0] // rows, x.shape[-1]
    return x.reshape(rows, heads, -1, last).transpose(0, 1).reshape(heads, -1, last)


def _unfold(x: torch.Tensor, rows: int) -> torch.Tensor:
    """The inverse of `_fold`."""
    heads, last = x.shape[0], x.shape[-1]
    return x.reshape(heads, rows, -1, last).transpose(0, 1).reshape(rows * heads, -1, last)
