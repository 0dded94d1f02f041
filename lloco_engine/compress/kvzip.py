"""Eviction by KVzip's rule (Kim et al. 2025, arXiv 2505.23416): keep what repeating the text looks at, as it is.

A baseline: the importance is that of a repetition, with one budget over all heads, and nothing is fitted afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lloco_engine.compress.attention_matching import select
from lloco_engine.compress.base import Compressor
from lloco_engine.compress.eviction import keep_slots
from lloco_engine.types import Segment

if TYPE_CHECKING:
    from lloco_engine.decoder.local import LocalDecoder

__all__ = ["KVzip"]

_ROWS = 256  # query rows scored at once


class KVzip(Compressor):
    """Keeps the positions that get the largest attention while the decoder repeats the chunk.

    Section 3 of the paper: importance is the maximum over the repetition's queries, of all query heads of a KV head;
    the budget is shared by all layers and heads (its "non-uniform" form).
    """

    name = "kvzip"

    @property
    def settings(self) -> dict[str, Any]:
        """No settings."""
        return {}

    def longest_chunk(self, decoder: LocalDecoder) -> int:
        """Half the window: the chunk is read twice, once to be kept and once to be repeated."""
        return (decoder.shape.window - decoder.template_tokens - len(decoder.template.repeat_ids())) // 2

    @torch.inference_mode()
    def make(self, decoder: LocalDecoder, token_ids: Sequence[int], ratios: Sequence[float]) -> list[Segment]:
        """See `Compressor.compress`."""
        repeat = [*decoder.template.repeat_ids(), *token_ids]
        cache = decoder.prefill(token_ids, room=len(repeat))
        first, context = decoder.template_tokens, cache.length
        importance: list[torch.Tensor] = []

        def attend(layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            """An `Attention` that notes what the repetition looks at; blocks of rows bound the memory."""
            heads, dim = keys.shape[1], keys.shape[-1]
            group, tokens = queries.shape[1] // heads, queries.shape[2]
            grouped = (queries[0] * decoder.runner.scale).view(heads, group, tokens, dim)
            seen = keys.new_zeros(heads, context - first)
            read = torch.empty_like(grouped)
            for row in range(0, tokens, _ROWS):
                stop = min(row + _ROWS, tokens)
                live = context + stop
                logits = grouped[:, :, row:stop].reshape(heads, -1, dim) @ keys[0, :, :live].transpose(1, 2)
                later = torch.ones(stop - row, stop - row, dtype=torch.bool, device=keys.device).triu_(1)
                logits[:, :, context + row :].view(heads, group, stop - row, -1).masked_fill_(later, -torch.inf)
                weights = torch.softmax(logits, dim=-1)
                torch.maximum(seen, weights[:, :, first:context].amax(dim=1), out=seen)
                read[:, :, row:stop] = (weights @ values[0, :, :live]).view(heads, group, stop - row, dim)
            importance.append(seen)
            return read.view(1, heads * group, tokens, dim).transpose(1, 2).reshape(1, tokens, -1)

        decoder.follow(repeat, cache, attend)
        scores = torch.stack(importance)
        return [keep_slots(cache, first, select(scores, ratio, floor=0.0)) for ratio in ratios]
