"""The frozen segments that examples read: the store's own, or compressed once and kept in the run's folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lloco_engine.compress.base import Compressor
from lloco_engine.decoder.local import LocalDecoder
from lloco_engine.finetune.batches import Example, Ids
from lloco_engine.prefix import place
from lloco_engine.segment_cache import SegmentCache
from lloco_engine.store import Store
from lloco_engine.types import AnySegment, Prefix

__all__ = ["Segments"]


class Segments:
    """Segments by token ids and ratio.

    Args:
        decoder: compresses, with its base weights.
        compressor: the store's.
        folder: where those that are made are kept; a run that was cut off finds them again.
        store: where those at its own ratio are looked for first, or None.
        tenant: whose segments of the store may be read.
    """

    def __init__(
        self,
        decoder: LocalDecoder,
        compressor: Compressor,
        folder: Path,
        *,
        store: Store | None = None,
        tenant: str = "",
    ) -> None:
        self._decoder = decoder
        self._cache = SegmentCache(folder / "segments", decoder, compressor, store=store, tenant=tenant)
        self._wanted: dict[Ids, set[float]] = {}

    def expect(self, examples: Iterable[Example]) -> None:
        """Say what will be asked for, so that one pass over a chunk serves all its ratios."""
        for example in examples:
            if example.kind == "memory":
                for ids in example.chunks:
                    self._wanted.setdefault(ids, set()).add(example.ratio)

    def prefix(self, example: Example) -> Prefix:
        """The example's chunks, placed in parallel as at question time."""
        segments = tuple(self.get(ids, example.ratio) for ids in example.chunks)
        return place(segments, template_tokens=self._decoder.template_tokens)

    def get(self, ids: Ids, ratio: float) -> AnySegment:
        """One segment, found or made."""
        return self._cache.get(ids, ratio, sorted(self._wanted.get(ids, ())))
