"""The frozen segments that examples read: the store's own, or compressed once and kept in the run's folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from lloco_engine.adapters.loading import facts_of
from lloco_engine.compress.base import Compressor
from lloco_engine.decoder.local import LocalDecoder
from lloco_engine.errors import SegmentUnavailable
from lloco_engine.finetune.batches import Example, Ids
from lloco_engine.prefix import place
from lloco_engine.store import Store
from lloco_engine.store import manifest as manifests
from lloco_engine.store import segments as files
from lloco_engine.store.files import write_atomic
from lloco_engine.types import Prefix, Segment

__all__ = ["Segments"]


class Segments:
    """Segments by token ids and ratio.

    Args:
        decoder: compresses, with its base weights.
        compressor: the store's.
        folder: where those that are made are kept; a run that was cut off finds them again.
        store: where those at its own ratio are looked for first, or None.
        tenants: whose segments of the store may be read.
    """

    def __init__(
        self,
        decoder: LocalDecoder,
        compressor: Compressor,
        folder: Path,
        *,
        store: Store | None = None,
        tenants: Sequence[str] = ("",),
    ) -> None:
        self._decoder, self._compressor, self._folder = decoder, compressor, folder
        self._store, self._tenants = store, tenants
        shape = decoder.shape
        self._form = files.SegmentFormat(shape.layers, shape.kv_heads, shape.head_dim, "float16")
        self._made_with = json.dumps([facts_of(decoder), compressor.name, compressor.settings], sort_keys=True)
        self._wanted: dict[Ids, set[float]] = {}
        self.compressed_tokens = 0

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

    def get(self, ids: Ids, ratio: float) -> Segment:
        """One segment, found or made."""
        found = self._stored(ids, ratio) or self._kept(ids, ratio)
        if found is not None:
            return found
        ratios = sorted(self._wanted.get(ids, set()) | {ratio})
        missing = [one for one in ratios if self._stored(ids, one) is None and self._kept(ids, one) is None]
        made = self._compressor.compress(self._decoder, ids, missing)
        self.compressed_tokens += len(ids)
        for one, segment in zip(missing, made, strict=True):
            name = self._name(ids, one)
            data, _ = files.encode(segment, name, self._form)
            write_atomic(self._path(name), data, self._folder / "tmp")
        kept = self._kept(ids, ratio)
        assert kept is not None
        return kept

    def _stored(self, ids: Ids, ratio: float) -> Segment | None:
        if self._store is None or self._store.manifest.ratio != ratio:
            return None
        for tenant in self._tenants:
            try:
                found = self._store.load_segment(manifests.segment_id(self._store.manifest, tenant, ids))
                return found if isinstance(found, Segment) else None
            except SegmentUnavailable:
                continue
        return None

    def _kept(self, ids: Ids, ratio: float) -> Segment | None:
        name = self._name(ids, ratio)
        try:
            segment = files.read(self._path(name), name, self._form)
        except SegmentUnavailable:
            return None
        assert isinstance(segment, Segment)
        return replace(segment, source_tokens=len(ids))

    def _name(self, ids: Ids, ratio: float) -> str:
        digest = hashlib.sha256(f"{self._made_with}\0{float(ratio)}\0".encode())
        digest.update(",".join(map(str, ids)).encode("ascii"))
        return digest.hexdigest()[:32]

    def _path(self, name: str) -> Path:
        return self._folder / "segments" / f"{name}.safetensors"
