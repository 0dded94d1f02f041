"""Methods of eviction: a score for every position in, a segment of the best out, as they are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from lloco_engine.compress.base import Compressor
from lloco_engine.compress.eviction import keep_slots, most_important_per_head, select
from lloco_engine.decoder.attention import attend, causal_mask
from lloco_engine.decoder.rules import PLAIN, Rules
from lloco_engine.types import Segment

if TYPE_CHECKING:
    from lloco_engine.decoder.local import LocalDecoder
    from lloco_engine.decoder.spec import DecoderSpec

__all__ = ["Observed", "ScorerCompressor"]

_ROWS = 256  # query rows whose attention is held at once


@dataclass(frozen=True)
class Observed:
    """What one layer saw while the decoder read a chunk. ``n`` tokens of it, ``H`` KV heads, ``G`` query heads to each.

    queries : (H * G, T, D) of the text that observes, rotary embedding applied: of `ScorerCompressor.observer`, or,
              where it gives none, of the chunk itself
    keys, values : (H, S, D) of the template prefix, the chunk and what observes, rotary embedding applied
    chunk   : where the chunk lies among the S; ``keys[:, chunk]`` is (H, n, D)
    scale   : factor of the attention logits
    layer   : number of the layer
    rules   : what else it does to its logits: softcap, sinks, a window of positions (those of the S are 0, 1, ...)
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    chunk: slice
    scale: float
    layer: int
    rules: Rules = PLAIN

    def attention(self, last: int | None = None) -> Iterator[torch.Tensor]:
        """Attention weights of the observing queries over everything before them and themselves, block by block.

        Args:
            last: only of so many queries, the last.

        Yields:
            (H, G, rows, S) softmax weights, a few rows at a time, which bounds the memory; with a sink they add up to
            less than 1.
        """
        heads, seen = self.keys.shape[:2]
        queries = self.queries[:, -last:] if last else self.queries
        queries = queries.view(heads, -1, *queries.shape[1:]) * self.scale  # (H, G, T, D)
        tokens = queries.shape[2]
        place = torch.arange(seen, device=queries.device)
        for row in range(0, tokens, _ROWS):
            block = queries[:, :, row : row + _ROWS]
            logits = (block.flatten(1, 2) @ self.keys.transpose(1, 2)).view(heads, -1, block.shape[2], seen)
            own = torch.arange(seen - tokens + row, seen - tokens + row + block.shape[2], device=queries.device)
            logits = self.rules.cap(logits).masked_fill_(place > own[:, None], -torch.inf)
            if (hidden := self.rules.hidden(own[:, None], place)) is not None:
                logits = logits.masked_fill_(hidden, -torch.inf)
            if (sinks := self.rules.sinks) is None:
                yield torch.softmax(logits, dim=-1)
            else:
                sink = sinks.to(logits.dtype).view(heads, -1, 1, 1).expand(-1, -1, block.shape[2], 1)
                yield torch.softmax(torch.cat((logits, sink), dim=-1), dim=-1)[..., :-1]


class ScorerCompressor(Compressor):
    """A compressor that keeps the positions with the highest scores, with bias 0.

    A leaf implements `score`; ``budget`` says whether every head keeps as many (``"head"``) or all heads of all layers
    share the slots out by score (``"decoder"``). To watch a text that comes after the chunk, it implements `observer`.
    """

    budget: ClassVar[Literal["head", "decoder"]] = "head"

    @abstractmethod
    def score(self, observed: Observed) -> torch.Tensor:
        """How much every position of the chunk is worth in one layer: (H, n), the higher the better."""

    def observer(self, decoder: DecoderSpec, token_ids: Sequence[int]) -> list[int]:
        """Token ids of a text that is read after the chunk and observes it; empty: the chunk observes itself."""
        return []

    def longest_chunk(self, decoder: DecoderSpec) -> int:
        """The window less the template prefix; with an observer that repeats the chunk, half of that."""
        room = decoder.shape.window - decoder.template_tokens
        after, more = (len(self.observer(decoder, [0] * count)) for count in (1, 2))
        each = more - after  # tokens that observe, for each of the chunk
        return (room - (after - each)) // (1 + each)

    @torch.inference_mode()
    def make(self, decoder: LocalDecoder, token_ids: Sequence[int], ratios: Sequence[float]) -> list[Segment]:
        """See `Compressor.compress`."""
        first, after = decoder.template_tokens, self.observer(decoder, token_ids)
        chunk = slice(first, first + len(token_ids))
        text = [*decoder.template.prefix_ids, *token_ids]
        cache = decoder.prefill(token_ids, room=len(after)) if after else decoder.new_cache(1, len(text))
        scores: list[torch.Tensor] = []
        scale, rules = decoder.runner.scale, decoder.runner.rules

        def watch(layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            """An `Attention` that has the layer scored."""
            observing = queries[0] if after else queries[0, :, first:]
            scores.append(
                self.score(Observed(observing, keys[0], values[0], chunk, scale, layer, rules[layer])).float()
            )
            tokens, seen = queries.shape[2], keys.shape[2]
            places = torch.arange(seen, device=keys.device)[None]
            mask = causal_mask(tokens, seen, keys.device, keys.dtype) if seen > tokens else None
            at = places[:, seen - tokens :], places
            return attend(queries, keys, values, mask, None, scale, rules[layer], at)

        decoder.follow(after or text, cache, watch)
        importance = torch.stack(scores)
        choose = most_important_per_head if self.budget == "head" else select
        return [keep_slots(cache, first, choose(importance, ratio)) for ratio in ratios]
