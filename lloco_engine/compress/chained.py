"""Compressors whose segments build on those before them in their document, and the same questions to any compressor."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lloco_engine.compress.base import Compressor
from lloco_engine.errors import ConfigError

if TYPE_CHECKING:
    from lloco_engine.decoder.local import LocalDecoder
    from lloco_engine.decoder.spec import DecoderSpec
    from lloco_engine.types import AnySegment

__all__ = ["ChainedCompressor", "chain_starts", "compress_after", "reads_chain"]


class ChainedCompressor(Compressor):
    """A compressor that makes a segment of its chunk and of the segments before it."""

    @abstractmethod
    def chain_starts(self, decoder: DecoderSpec, lengths: Sequence[int]) -> list[int]:
        """For each chunk of a document, the first of the chunks whose segments its own builds on; itself: none.

        Args:
            decoder: will read the segments.
            lengths: tokens of the chunks, in order.
        """

    @abstractmethod
    def reads_chain(self, decoder: DecoderSpec) -> bool:
        """Whether a segment is read after all those that it builds on, and not alone."""

    @abstractmethod
    def make_after(
        self, decoder: LocalDecoder, token_ids: Sequence[int], ratios: Sequence[float], before: Sequence[AnySegment]
    ) -> Sequence[AnySegment]:
        """One segment per ratio, which builds on those ``before`` it, in document order."""

    def make(self, decoder: LocalDecoder, token_ids: Sequence[int], ratios: Sequence[float]) -> Sequence[AnySegment]:
        """One segment per ratio, which builds on none."""
        return self.make_after(decoder, token_ids, ratios, ())


def chain_starts(compressor: Compressor, decoder: DecoderSpec, lengths: Sequence[int]) -> list[int]:
    """As `ChainedCompressor.chain_starts`; each chunk's own number where segments stand by themselves."""
    if isinstance(compressor, ChainedCompressor):
        return compressor.chain_starts(decoder, lengths)
    return list(range(len(lengths)))


def reads_chain(compressor: Compressor, decoder: DecoderSpec) -> bool:
    """As `ChainedCompressor.reads_chain`."""
    return isinstance(compressor, ChainedCompressor) and compressor.reads_chain(decoder)


def compress_after(
    compressor: Compressor,
    decoder: LocalDecoder,
    token_ids: Sequence[int],
    ratios: Sequence[float],
    before: Sequence[AnySegment],
) -> Sequence[AnySegment]:
    """`Compressor.compress` of a chunk whose segment builds on those ``before`` it, as `chain_starts` says.

    Raises:
        ConfigError: as `Compressor.compress`; or the compressor goes on from none.
    """
    if not before:
        return compressor.compress(decoder, token_ids, ratios)
    if not isinstance(compressor, ChainedCompressor):
        raise ConfigError(
            f"{compressor.name!r} makes each segment by itself, and {len(before)} were given to go on from"
        )
    compressor.check(decoder, token_ids, ratios)
    return compressor.make_after(decoder, token_ids, ratios, before)
