"""Eviction by SnapKV's rule (Li et al. 2024, arXiv 2404.14469): keep what the end of the text looks at, as it is.

A baseline. SnapKV observes the prompt's last tokens, which hold the question; offline there is no question yet, so the
last tokens of the chunk stand in, as they do where kvpress compresses a context before it is asked about.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from lloco_engine.compress.base import Compressor
from lloco_engine.compress.eviction import keep_slots, most_important_per_head
from lloco_engine.types import Segment

if TYPE_CHECKING:
    from lloco_engine.decoder.local import LocalDecoder

__all__ = ["SnapKV"]

_WATCHERS = 64  # tokens at the chunk's end that observe, at most; kvpress's default
_SHARE = 64  # of a short chunk's tokens, one in so many observes
_POOL = 5  # neighbouring positions that are averaged; kvpress's default


class SnapKV(Compressor):
    """Keeps, in every head alike, the last tokens and the positions they pay most attention to."""

    name = "snapkv"

    @property
    def settings(self) -> dict[str, Any]:
        """No settings."""
        return {}

    @torch.inference_mode()
    def make(self, decoder: LocalDecoder, token_ids: Sequence[int], ratios: Sequence[float]) -> list[Segment]:
        """See `Compressor.compress`."""
        first, tokens = decoder.template_tokens, len(token_ids)
        # as few as fit any budget that is asked for in earnest, or nothing but them would be kept
        watchers = max(1, min(_WATCHERS, tokens // _SHARE))
        cache = decoder.prefill(token_ids[:-watchers], room=watchers) if watchers < tokens else None
        if cache is None:  # a single token: there is nothing to choose from
            cache = decoder.prefill(token_ids)
            keep = torch.ones(decoder.shape.layers, decoder.shape.kv_heads, tokens, dtype=torch.bool)
            return [keep_slots(cache, first, keep) for _ in ratios]
        context = cache.length
        importance: list[torch.Tensor] = []

        def attend(layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            """An `Attention` of the watchers that notes the mean of what they look at."""
            heads, dim = keys.shape[1], keys.shape[-1]
            group = queries.shape[1] // heads
            grouped = (queries[0] * decoder.runner.scale).view(heads, group, watchers, dim)
            logits = grouped.flatten(1, 2) @ keys[0].transpose(1, 2)
            later = torch.ones(watchers, watchers, dtype=torch.bool, device=keys.device).triu_(1)
            logits[:, :, context:].view(heads, group, watchers, -1).masked_fill_(later, -torch.inf)
            weights = torch.softmax(logits, dim=-1)
            seen = F.avg_pool1d(weights[:, :, first:context].mean(dim=1), _POOL, 1, _POOL // 2, count_include_pad=False)
            importance.append(F.pad(seen, (0, watchers), value=torch.inf))
            read = (weights @ values[0]).view(1, heads * group, watchers, dim)
            return read.transpose(1, 2).reshape(1, watchers, -1)

        decoder.follow(token_ids[-watchers:], cache, attend)
        scores = torch.stack(importance)
        return [keep_slots(cache, first, most_important_per_head(scores, ratio)) for ratio in ratios]
