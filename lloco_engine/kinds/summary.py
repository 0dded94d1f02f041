"""Summary embeddings: vectors that the decoder reads in the place of input embeddings (docs/memories.md).

A segment's file has vectors (K, E); in int8 vectors.scale (1, 1, E) float32 too, in int4 vectors.least and .step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lloco_engine.config import DType, PrefixConfig
from lloco_engine.errors import StoreError
from lloco_engine.kinds import numbers
from lloco_engine.kinds.base import Format, MemoryKind, Room, Sizes, Tensors
from lloco_engine.types import Prefix

if TYPE_CHECKING:
    import torch

__all__ = ["Summary", "SummaryFormat", "SummarySegment"]


@dataclass(frozen=True, eq=False)
class SummarySegment:
    """The compressed memory of one chunk as summary embeddings: slots that enter the decoder before the text's tokens.

    vectors : (K, E)  final hidden states of the decoder at its K summary tokens, E numbers of an input embedding each
    source_tokens : decoder tokens of the chunk that the slots stand for
    """

    vectors: torch.Tensor
    source_tokens: int

    @property
    def slots(self) -> int:
        """Slots of the segment: one for each vector."""
        return int(self.vectors.shape[0])


class Summary(MemoryKind):
    """See `MemoryKind`. Segments stand in the order of their documents, one vector after another, before all text; each
    vector takes a position where positions are rotary."""

    name = "summary"
    called = "summary embeddings"
    segment = SummarySegment
    embeds = True

    def format(self, sizes: Sizes, dtype: DType) -> SummaryFormat:
        """See `MemoryKind.format`."""
        return SummaryFormat(sizes.embedding, dtype)

    def place(
        self,
        segments: Sequence[SummarySegment],
        config: PrefixConfig,
        room: Room,
        scores: Sequence[float] | None = None,
    ) -> Prefix:
        """See `MemoryKind.place`; the configuration has no say."""
        import torch

        vectors = torch.cat([segment.vectors for segment in segments])
        start = len(vectors) if room.rotary else 0
        return Prefix(tuple(segments), (0,) * len(segments), start, "sequence", embeddings=vectors)

    def is_ordered(self, config: PrefixConfig) -> bool:
        """See `MemoryKind.is_ordered`."""
        return True

    def free(self, room: Room) -> int | None:
        """See `MemoryKind.free`."""
        return room.window - room.template - room.text if room.rotary else None

    def advice(self, config: PrefixConfig, segments: int) -> str:
        """See `MemoryKind.advice`."""
        if segments > 1:
            return "shorten the question or the answer, or ingest the document in shorter chains of segments"
        return super().advice(config, segments)


@dataclass(frozen=True)
class SummaryFormat(Format):
    """See `Format`.

    Args:
        width: numbers of a vector.
        dtype: of vectors on disk.
    """

    width: int
    dtype: DType

    called = Summary.called
    segment = SummarySegment

    def marker(self, tensors: Collection[str]) -> str:
        """See `Format.marker`."""
        return "lloco.summary.1"

    def _pack(self, segment: SummarySegment, segment_id: str) -> Tensors:
        """See `Format.pack`."""
        import torch

        if segment.vectors.dim() != 2 or segment.vectors.shape[1] != self.width or not len(segment.vectors):
            raise StoreError(
                f"vectors of a segment must be (K, {self.width}) with K at least 1, not {tuple(segment.vectors.shape)}"
            )
        rows = torch.tensor([[len(segment.vectors)]])
        return numbers.packed("vectors", segment.vectors, rows, self.dtype, segment_id)

    def shapes(self, header: Mapping[str, Any]) -> dict[str, tuple[str, list[int]]]:
        """See `Format.shapes`."""
        rows = int(header["vectors"]["shape"][0])
        return numbers.shapes("vectors", [rows, self.width], [1, 1, self.width], self.dtype)

    def fault(self, tensors: Tensors) -> str | None:
        """See `Format.fault`."""
        return numbers.fault("vectors", tensors) if len(tensors["vectors"]) else "it has no vectors"

    def unpack(self, tensors: Tensors, source_tokens: int, strings: Mapping[str, str]) -> SummarySegment:
        """See `Format.unpack`."""
        import torch

        rows = torch.tensor([[len(tensors["vectors"])]])
        return SummarySegment(numbers.unpacked("vectors", tensors, rows), source_tokens)
