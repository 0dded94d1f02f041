"""Eviction by KVzip's rule (Kim et al. 2025, arXiv 2505.23416): keep what repeating the text looks at, as it is.

A baseline: the importance is that of a repetition, with one budget over all heads, and nothing is fitted afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lloco_engine.compress.scorer import Observed, ScorerCompressor

if TYPE_CHECKING:
    from lloco_engine.decoder.spec import DecoderSpec

__all__ = ["KVzip"]


class KVzip(ScorerCompressor):
    """Keeps the positions that get the largest attention while the decoder repeats the chunk.

    Section 3 of the paper: importance is the maximum over the repetition's queries, of all query heads of a KV head;
    the budget is shared by all layers and heads (its "non-uniform" form).
    """

    name = "kvzip"
    budget = "decoder"

    def observer(self, decoder: DecoderSpec, token_ids: Sequence[int]) -> list[int]:
        """The request to repeat the text, and the repetition."""
        return [*decoder.template.repeat_ids(), *token_ids]

    def score(self, observed: Observed) -> torch.Tensor:
        """See `ScorerCompressor.score`."""
        blocks = (weights[..., observed.chunk].amax(dim=(1, 2)) for weights in observed.attention())
        return torch.stack(list(blocks)).amax(dim=0)
