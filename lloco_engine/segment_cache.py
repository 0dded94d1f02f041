"""Compressed segments found again by their content: in a store, or in a folder that keeps them between runs.

Compression is what evaluation and finetuning spend their time on. A segment's id stands for what it is made of and for
what makes it, so runs with other questions, methods or adapters share it, and a run that was cut off goes on with what
it had. It is read as a store gives it: in float16.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lloco_engine import kinds
from lloco_engine.adapters.loading import facts_of
from lloco_engine.compress.base import Compressor
from lloco_engine.compress.chained import compress_after
from lloco_engine.errors import SegmentUnavailable
from lloco_engine.kinds import Sizes
from lloco_engine.store.segments import SegmentFiles, checksum, content_id, pack
from lloco_engine.types import AnySegment

if TYPE_CHECKING:
    from types import ModuleType

    from lloco_engine.decoder.local import LocalDecoder
    from lloco_engine.store import Store

__all__ = ["SegmentCache"]


class SegmentCache:
    """Makes segments, or finds them.

    Args:
        folder: where they are kept; anything in it may be removed at any time.
        decoder: compresses, with its base weights.
        compressor: what makes them.
        store: one of this decoder and this compressor, where they are looked for first, or None.
        tenant: whose segments of the store may be read.
    """

    def __init__(
        self,
        folder: Path,
        decoder: LocalDecoder,
        compressor: Compressor,
        *,
        store: Store | None = None,
        tenant: str = "",
    ) -> None:
        self.decoder, self.compressor = decoder, compressor
        self.source = _source_hash(compressor)
        self._store, self._tenant = store, tenant
        form = kinds.get(compressor.memory).format(Sizes.of(decoder.shape), "float16")
        self._files = SegmentFiles(folder, folder / "tmp", form)
        self._made_with = {
            **facts_of(decoder),
            "compressor": compressor.name,
            "compressor_settings": compressor.settings,
            "source": self.source,
        }
        self.made = 0  # chunks compressed by this object

    def get(
        self,
        token_ids: Sequence[int],
        ratio: float,
        together: Sequence[float] = (),
        before: Sequence[AnySegment] = (),
    ) -> AnySegment:
        """A chunk's segment at a ratio; where it is not kept yet, those of the other ratios are made along with it.

        Args:
            token_ids: of the chunk.
            ratio, together: source tokens per slot.
            before: the segments that it builds on, in document order.

        Raises:
            ConfigError: as `Compressor.compress` does.
            StoreFull: no room in the folder.
        """
        previous = self._digest(before) if before else None
        if (found := self._found(token_ids, ratio, previous)) is not None:
            return found
        others = (other for other in together if other != ratio and self._found(token_ids, other, previous) is None)
        ratios = [ratio, *others]
        self.made += 1
        made = compress_after(self.compressor, self.decoder, token_ids, ratios, before)
        for each, segment in zip(ratios, made, strict=True):
            self._files.write(pack(segment, self._id(token_ids, each, previous), self._files.form))
        return self._files.read(self._id(token_ids, ratio, previous))

    def _found(self, token_ids: Sequence[int], ratio: float, previous: str | None) -> AnySegment | None:
        """The segment, if it is somewhere with every byte as it was written."""
        if self._store is not None and self._store.manifest.ratio == ratio and previous is None:
            with suppress(SegmentUnavailable):
                return self._store.load_segment(self._store.segment_id(self._tenant, token_ids))
        with suppress(SegmentUnavailable):
            return self._files.read(self._id(token_ids, ratio, previous))
        return None

    def _id(self, token_ids: Sequence[int], ratio: float, previous: str | None = None) -> str:
        return content_id(self._made_with | {"ratio": float(ratio)}, token_ids, previous)

    def _digest(self, segments: Sequence[AnySegment]) -> str:
        """What segments that others build on say, for the ids of these."""
        said = (checksum(self._files.form.pack(segment, ""), {}) for segment in segments)
        return hashlib.sha256("".join(said).encode()).hexdigest()


def _source_hash(compressor: Compressor) -> str:
    """Hash of the modules that a compressor is made of: a changed method makes new segments."""
    digest = hashlib.sha256()
    for module in sorted(_modules(sys.modules[type(compressor).__module__], set()), key=lambda each: each.__name__):
        if module.__file__ is not None:
            digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()[:16]


def _modules(module: ModuleType, seen: set[str]) -> Iterator[ModuleType]:
    """A module and those of its package that its names come from."""
    if module.__name__ in seen:
        return
    seen.add(module.__name__)
    yield module
    package = module.__name__.rpartition(".")[0]
    for value in vars(module).values():
        home = getattr(value, "__module__", None) or ""
        if isinstance(home, str) and home.startswith(f"{package}.") and home in sys.modules:
            yield from _modules(sys.modules[home], seen)
