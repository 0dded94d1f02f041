"""The contract of a layer's slots, however they are read: `blocks` by torch, `ragged` by a kernel of our own."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

__all__ = ["LayerSlots"]


class LayerSlots(ABC):
    """The slots of one layer, for each row of a batch its own, or for all rows the same."""

    @abstractmethod
    def attend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """Softmax attention over these slots and the live tokens together.

        Args:
            q: (B, H*G, T, D), any strides but a row's numbers side by side. keys, values: (B, H, S, D) of the live
                tokens, likewise. mask: additive (B or 1, 1, T, S), or None where all of them may be read.
            scale: factor of the logits.

        Returns:
            (B, T, H*G*D).
        """
