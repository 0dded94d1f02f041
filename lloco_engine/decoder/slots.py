"""The contract of a layer's slots, however they are read: `padded` by torch, `cpu_kernel` by a kernel of our own.

Segments are compressed apart and placed at the same positions, so every one of them offers each query something: the
more there are, the more of its attention goes to those that have nothing to do with it. So a query (one token of one
query head) reads the ``focus`` segments in which the largest of its logits lie, and no other but those that tie with
the last of them: segments that begin with the same words do, and which comes first must not matter
(docs/decisions/0009).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch

from lloco_engine.decoder.rules import PLAIN, Rules

__all__ = ["TIE", "LayerSlots", "SegmentSlots"]

TIE = 1e-3  # largest logits that are no further apart count as equal: they may differ by rounding alone


class LayerSlots(ABC):
    """The slots of one layer, for each row of a batch its own, or for all rows the same."""

    @abstractmethod
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
        """Softmax attention over these slots and the live tokens together.

        Args:
            q: (B, H*G, T, D), any strides but a row's numbers side by side. keys, values: (B, H, S, D) of the live
                tokens, likewise. mask: additive (B or 1, 1, T, S), or None where all of them may be read.
            scale: factor of the logits.
            rules: of the layer; ``mask`` says which live tokens they let be read. Whoever reads plain layers alone
                raises `ValueError` at others.
            at: (B or 1, T) the new tokens' positions, where the layer has a window.

        Returns:
            (B, T, H*G*D).
        """


class SegmentSlots(Protocol):
    """The segments of a memory, made ready to be read layer by layer."""

    def layer(self, index: int, /) -> LayerSlots:
        """The slots of one layer."""
        ...
