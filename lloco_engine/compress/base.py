"""The contract of a compressor: token ids of one chunk in, a segment at each asked ratio out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lloco_engine.errors import ConfigError

if TYPE_CHECKING:
    from lloco_engine.decoder.local import LocalDecoder
    from lloco_engine.decoder.spec import DecoderSpec
    from lloco_engine.types import AnySegment

__all__ = ["Compressor"]


class Compressor(ABC):
    """Turns a chunk into the slots that stand for it.

    A leaf sets ``name`` and implements `make`. Its settings, if it has any, are the fields of a dataclass, of JSON's
    types; compressors of equal name and settings make interchangeable segments of equal
    input, equal to the precision of the machine that made them.
    Compression always uses the decoder's base weights, never an adapter. Learned parameters are the compressor's own:
    it finds them by the decoder it is given, and the decoder's fingerprint stands for them in a store's manifest.

    A segment is made from its chunk alone; `lloco_engine.compress.chained` is for those that build on others.
    """

    name: ClassVar[str]
    memory: ClassVar[str] = "compact_kv"  # which kind of memory (`lloco_engine.kinds`)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as JSON-ready values: what the constructor takes."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init} if is_dataclass(self) else {}

    @abstractmethod
    def make(self, decoder: LocalDecoder, token_ids: Sequence[int], ratios: Sequence[float]) -> Sequence[AnySegment]:
        """One segment per ratio; the arguments have been checked."""

    def slots(self, decoder: DecoderSpec) -> int | None:
        """How many slots it makes of any chunk; None: as many as are asked for."""
        return None

    def compress(
        self, decoder: LocalDecoder, token_ids: Sequence[int], ratios: Sequence[float]
    ) -> Sequence[AnySegment]:
        """Compress one chunk.

        Args:
            decoder: the decoder that will read the segment.
            token_ids: n >= 1 decoder tokens of the chunk, without the template prefix.
            ratios: source tokens per slot, each >= 1; work that does not depend on the ratio is shared.

        Returns:
            a segment per ratio. Compact KV has about ``n / ratio`` slots per KV head on average, at least one in each
            head, and its keys carry the rotary embedding of positions P .. P+n-1, where P is the length of the
            template prefix. Where `slots` says a number, a segment has so many.

        Raises:
            ConfigError: the chunk is empty or too long for the decoder's window, or a ratio is below 1.
        """
        self.check(decoder, token_ids, ratios)
        return self.make(decoder, token_ids, ratios)

    def check(self, decoder: LocalDecoder, token_ids: Sequence[int], ratios: Sequence[float]) -> None:
        """Raise as `compress` says."""
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

    def longest_chunk(self, decoder: DecoderSpec) -> int:
        """Most tokens a chunk may have with this decoder."""
        return decoder.shape.window - decoder.template_tokens
