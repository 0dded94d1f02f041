"""The contract of a compressor: token ids of one chunk in, a segment at each asked ratio out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lloco_engine.errors import ConfigError

if TYPE_CHECKING:
    from lloco_engine.decoder.local import LocalDecoder
    from lloco_engine.types import AnySegment

__all__ = ["Compressor"]


class Compressor(ABC):
    """Turns a chunk into the slots that stand for it.

    A leaf sets ``name`` and implements `make`. Its settings, if it has any, are the fields of a dataclass, of JSON's
    types; compressors of equal name and settings make interchangeable segments of equal
    input, equal to the precision of the machine that made them.
    Compression always uses the decoder's base weights, never an adapter. Learned parameters are the compressor's own:
    it finds them by the decoder it is given, and the decoder's fingerprint stands for them in a store's manifest.

    A segment is made from its chunk alone unless the leaf says otherwise (`chain_starts`, `make_after`).
    """

    name: ClassVar[str]
    memory: ClassVar[str] = "compact_kv"  # which kind of memory: "compact_kv" or "summary"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as JSON-ready values: what the constructor takes."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init} if is_dataclass(self) else {}

    @abstractmethod
    def make(self, decoder: LocalDecoder, token_ids: Sequence[int], ratios: Sequence[float]) -> Sequence[AnySegment]:
        """One segment per ratio; the arguments have been checked."""

    def make_after(
        self, decoder: LocalDecoder, token_ids: Sequence[int], ratios: Sequence[float], before: Sequence[AnySegment]
    ) -> Sequence[AnySegment]:
        """The same for a chunk whose segment builds on at least one other."""
        raise ConfigError(f"{self.name!r} makes each segment by itself, and {len(before)} were given to go on from")

    def chain_starts(self, decoder: LocalDecoder, lengths: Sequence[int]) -> list[int]:
        """For each chunk of a document, the first of the chunks whose segments its own builds on; by default itself.

        Args:
            decoder: only what a `DecoderFacts` has is read.
            lengths: tokens of the chunks, in order.
        """
        return list(range(len(lengths)))

    def reads_chain(self, decoder: LocalDecoder) -> bool:
        """Whether a segment is read after all those that it builds on, and not alone."""
        return False

    def ratio(self, decoder: LocalDecoder, asked: float, segment_tokens: int) -> float:
        """Source tokens per slot of a whole segment, where that many are asked for.

        Raises:
            ConfigError: the compressor cannot be asked for that.
        """
        return asked

    def compress(
        self,
        decoder: LocalDecoder,
        token_ids: Sequence[int],
        ratios: Sequence[float],
        before: Sequence[AnySegment] = (),
    ) -> Sequence[AnySegment]:
        """Compress one chunk.

        Args:
            decoder: the decoder that will read the segment.
            token_ids: n >= 1 decoder tokens of the chunk, without the template prefix.
            ratios: source tokens per slot, each >= 1; work that does not depend on the ratio is shared.
            before: the segments that this one builds on, in document order, as `chain_starts` says.

        Returns:
            a segment per ratio. Compact KV has about ``n / ratio`` slots per KV head on average, at least one in each
            head, and its keys carry the rotary embedding of positions P .. P+n-1, where P is the length of the
            template prefix. Summary embeddings have as many slots as the compressor was trained for.

        Raises:
            ConfigError: the chunk is empty or too long for the decoder's window, or a ratio is below 1.
        """
        if not token_ids:
            raise ConfigError("a chunk must have at least one token")
        if bad := [ratio for ratio in ratios if ratio < 1]:
            raise ConfigError(f"a compression ratio must be at least 1, not {bad[0]}")
        longest = self.longest_chunk(decoder)
        if len(token_ids) > longest:
            raise ConfigError(
                f"a chunk must have at most {longest} tokens to be compressed by {self.name!r} in the decoder's window "
                f"of {decoder.shape.window}, not {len(token_ids)}; lower segment_tokens"
            )
        return self.make_after(decoder, token_ids, ratios, before) if before else self.make(decoder, token_ids, ratios)

    def longest_chunk(self, decoder: LocalDecoder) -> int:
        """Most tokens a chunk may have with this decoder."""
        return decoder.shape.window - decoder.template_tokens
