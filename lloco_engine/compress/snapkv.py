"""Eviction by SnapKV's rule (Li et al. 2024, arXiv 2404.14469): keep what the end of the text looks at, as it is.

A baseline. SnapKV observes the prompt's last tokens, which hold the question; offline there is no question yet, so the
last tokens of the chunk stand in, as they do where kvpress compresses a context before it is asked about.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lloco_engine.compress.scorer import Observed, ScorerCompressor

__all__ = ["SnapKV"]

_WATCHERS = 64  # tokens at the chunk's end that observe, at most; kvpress's default
_SHARE = 64  # of a short chunk's tokens, one in so many observes
_POOL = 5  # neighbouring positions that are averaged; kvpress's default


class SnapKV(ScorerCompressor):
    """Keeps, in every head alike, the last tokens and the positions they pay most attention to."""

    name = "snapkv"

    def score(self, observed: Observed) -> torch.Tensor:
        """See `ScorerCompressor.score`."""
        tokens = observed.queries.shape[1]
        # as few as fit any budget that is asked for in earnest, or nothing but them would be kept
        watchers = max(1, min(_WATCHERS, tokens // _SHARE))
        (weights,) = observed.attention(last=watchers)
        seen = weights[..., observed.chunk][..., : tokens - watchers].mean(dim=(1, 2))
        if tokens > watchers:  # else there is nothing to choose from
            seen = F.avg_pool1d(seen, _POOL, 1, _POOL // 2, count_include_pad=False)
        return F.pad(seen, (0, watchers), value=torch.inf)
