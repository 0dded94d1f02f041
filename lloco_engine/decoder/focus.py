"""Which segments each query reads: of many side by side, the few that it looks at most.

Segments are compressed apart and placed at the same positions, so every one of them offers each query something: the
more there are, the more of its attention goes to those that have nothing to do with it. So a query (one token of one
query head) reads the ``focus`` segments in which the largest of its logits lie, and no other but those that tie with
the last of them: segments that begin with the same words do, and which comes first must not matter.
"""

from __future__ import annotations

import torch

__all__ = ["TIE", "Focus"]

TIE = 1e-3  # largest logits that are no further apart count as equal: they may differ by rounding alone


class Focus:
    """The choice among a layer's blocks, each of one segment.

    Args:
        parts: (P,) int64, of each block its head times S plus its segment.
        limit: (R,) int64, how many segments a head's queries read; at least 1.
        prior: (R, S) float32, added to the largest logit of each segment where they are compared, and nowhere else.
    """

    def __init__(self, parts: torch.Tensor, limit: torch.Tensor, prior: torch.Tensor) -> None:
        self._parts, self._limit, self._prior = parts, limit, prior

    @torch.no_grad()
    def ignored(self, q: torch.Tensor, keys: torch.Tensor, bias: torch.Tensor, scale: float) -> torch.Tensor:
        """Which blocks are not read.

        Args:
            q: (P, M, D), of each block its head's. keys: (P, width, D). bias: (P, 1, width). scale: of the logits.

        Returns:
            (P, M) bool.
        """
        largest = (torch.bmm(q * scale, keys.transpose(1, 2)) + bias).amax(-1).float()  # (P, M)
        heads, segments = self._prior.shape
        tops = largest.new_full((heads * segments, largest.shape[1]), -torch.inf)
        tops.scatter_reduce_(0, self._parts[:, None].expand_as(largest), largest, "amax")
        scores = tops.view(heads, segments, -1) + self._prior[..., None]
        last = (self._limit - 1).clamp_max(segments - 1)[:, None, None].expand(-1, 1, scores.shape[-1])
        kept = scores >= scores.sort(dim=1, descending=True).values.gather(1, last) - TIE
        return ~kept.view(heads * segments, -1)[self._parts]
