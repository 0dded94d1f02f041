"""Summary embeddings: the memory of LLoCO (Tan et al. 2024, arXiv 2404.07979), written by an AutoCompressor."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lloco_engine.compress.autocompressor import AutoCompressor
from lloco_engine.compress.chained import ChainedCompressor
from lloco_engine.compress.summary_tokens import SummaryFacts, SummaryTokens
from lloco_engine.errors import ConfigError
from lloco_engine.kinds.summary import SummarySegment
from lloco_engine.models import decoder_folder
from lloco_engine.types import AnySegment

if TYPE_CHECKING:
    from lloco_engine.decoder.local import LocalDecoder
    from lloco_engine.decoder.spec import DecoderSpec

__all__ = ["SummaryEmbeddings"]


@dataclass(kw_only=True, eq=False)
class SummaryEmbeddings(ChainedCompressor):
    """Makes the K summary vectors of each chunk with the decoder's own summary tokens, a published AutoCompressor's.

    A chunk is a segment of the model, and by default every segment of a document builds on all those before it, as the
    model was trained. A chain of segments begins anew where the summaries before a segment, the segment and the
    summary tokens would not fit the window.

    Args:
        chain: most segments of a chain; 1 makes every segment by itself, 0 sets no limit.
    """

    name = "autocompressor"
    memory = "summary"

    chain: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.chain, int) or self.chain < 0:
            raise ConfigError(f"chain must be a number of segments, or 0 for no limit, not {self.chain!r}")
        self._known: dict[str, SummaryFacts] = {}  # by the decoder's name
        self._loaded: weakref.WeakKeyDictionary[Any, AutoCompressor] = weakref.WeakKeyDictionary()

    def make_after(
        self, decoder: LocalDecoder, token_ids: Sequence[int], ratios: Sequence[float], before: Sequence[AnySegment]
    ) -> list[SummarySegment]:
        """The same segment for every ratio, after earlier summaries: all, or the last, as the model was trained."""
        earlier = [segment.vectors for segment in before if isinstance(segment, SummarySegment)]
        with decoder.base() as runner:
            if decoder not in self._loaded:
                tokens = SummaryTokens.of_folder(decoder_folder(decoder.name))
                self._loaded[decoder] = AutoCompressor(runner, tokens)
            model = self._loaded[decoder]
            softprompt = torch.cat([model.embeddings[:0], *(part.to(model.embeddings) for part in earlier)])
            if not model.accumulate:
                softprompt = softprompt[-model.summary_length :]
            (vectors,) = model.summarise([token_ids], softprompt[None])
        return [SummarySegment(vectors, len(token_ids)) for _ in ratios]

    def chain_starts(self, decoder: DecoderSpec, lengths: Sequence[int]) -> list[int]:
        """As the contract says."""
        facts = self._facts(decoder)
        starts: list[int] = []
        for number, length in enumerate(lengths):
            start = starts[-1] if starts else 0
            summaries = (number - start) if facts.accumulate else min(1, number - start)
            positions = (summaries + 1) * facts.length + length if decoder.shape.rotary else length
            too_long = self.chain and number - start >= self.chain
            starts.append(number if too_long or positions > decoder.shape.window else start)
        return starts

    def reads_chain(self, decoder: DecoderSpec) -> bool:
        """A model that accumulates summaries reads all of them; another reads the last, which carries the others."""
        return self._facts(decoder).accumulate

    def slots(self, decoder: DecoderSpec) -> int:
        """As many as the model has summary tokens."""
        return self._facts(decoder).length

    def longest_chunk(self, decoder: DecoderSpec) -> int:
        """The window, less the summary tokens where these take positions."""
        return decoder.shape.window - (self._facts(decoder).length if decoder.shape.rotary else 0)

    def _facts(self, decoder: DecoderSpec) -> SummaryFacts:
        if decoder.name not in self._known:
            self._known[decoder.name] = SummaryFacts.of_folder(decoder_folder(decoder.name))
        return self._known[decoder.name]
