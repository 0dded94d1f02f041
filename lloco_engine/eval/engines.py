"""The engines that an evaluation asks: the product's own, with a store in a temporary folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lloco_engine.compress import chained
from lloco_engine.compress.base import Compressor
from lloco_engine.compress.chained import ChainedCompressor
from lloco_engine.config import ChunkConfig, CompressConfig, PrefixConfig, RetrieveConfig, StoreConfig
from lloco_engine.engine import Engine
from lloco_engine.errors import DocumentError
from lloco_engine.types import AnySegment, Document, Hit, Segment

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from lloco_engine.decoder.local import LocalDecoder
    from lloco_engine.decoder.spec import DecoderSpec
    from lloco_engine.embedder import Encodes
    from lloco_engine.eval.data import Group
    from lloco_engine.segment_cache import SegmentCache

__all__ = ["Blank", "Engines", "GroupEngines", "KeptSegments", "Remembered", "filled"]


class Blank(Compressor):
    """One slot of zeros a head for any chunk: for engines that are only searched. It is never read."""

    name = "blank"

    def make(self, decoder: LocalDecoder, token_ids: Sequence[int], ratios: Sequence[float]) -> list[Segment]:
        """The same for every ratio."""
        import torch

        heads = decoder.shape.layers, decoder.shape.kv_heads
        rows = torch.zeros(heads[0] * heads[1], decoder.shape.head_dim)
        lengths, positions = torch.ones(heads, dtype=torch.int64), torch.zeros(len(rows), dtype=torch.int32)
        segment = Segment(rows, rows, rows[:, 0], lengths, len(token_ids), positions)
        return [segment for _ in ratios]


class KeptSegments(ChainedCompressor):
    """A cache's compressor, which makes a segment only where it is not kept yet.

    Args:
        cache: where they are looked for and kept.
        ratios: all that a run will ask for: where one is missing, the others are made along with it.
    """

    def __init__(self, cache: SegmentCache, ratios: Sequence[float]) -> None:
        self.cache, self._ratios = cache, ratios
        vars(self).update(name=cache.compressor.name, memory=cache.compressor.memory)  # a class has one, this has any

    @property
    def settings(self) -> dict[str, Any]:
        """As the compressor has it, as what follows."""
        return self.cache.compressor.settings

    def chain_starts(self, decoder: DecoderSpec, lengths: Sequence[int]) -> list[int]:
        return chained.chain_starts(self.cache.compressor, decoder, lengths)

    def reads_chain(self, decoder: DecoderSpec) -> bool:
        return chained.reads_chain(self.cache.compressor, decoder)

    def longest_chunk(self, decoder: DecoderSpec) -> int:
        return self.cache.compressor.longest_chunk(decoder)

    def make_after(
        self, decoder: LocalDecoder, token_ids: Sequence[int], ratios: Sequence[float], before: Sequence[AnySegment]
    ) -> list[AnySegment]:
        return [self.cache.get(token_ids, ratio, self._ratios, before) for ratio in ratios]


class Remembered:
    """An embedder that embeds a text once: the cells of a grid, and the rows of a run, search the same windows.

    Args:
        embedder: what embeds a text the first time.
    """

    def __init__(self, embedder: Encodes) -> None:
        self._embedder = embedder
        self._vectors: dict[tuple[str, str], npt.NDArray[np.float32]] = {}

    @property
    def name(self) -> str:
        """As `lloco_engine.embedder.Encodes` has it, as all that follows."""
        return self._embedder.name

    @property
    def fingerprint(self) -> str:
        return self._embedder.fingerprint

    @property
    def dim(self) -> int:
        return self._embedder.dim

    def encode(self, texts: Sequence[str], /) -> npt.NDArray[np.float32]:
        return self._once("encode", texts)

    def encode_query(self, texts: Sequence[str], /) -> npt.NDArray[np.float32]:
        return self._once("encode_query" if hasattr(self._embedder, "encode_query") else "encode", texts)

    def _once(self, way: str, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        import numpy as np

        if new := [text for text in dict.fromkeys(texts) if (way, text) not in self._vectors]:
            vectors = getattr(self._embedder, way)(new)
            self._vectors.update(((way, text), vector) for text, vector in zip(new, vectors, strict=True))
        return np.stack([self._vectors[way, text] for text in texts])


def filled(engine: Engine, documents: Iterable[Document], **options: Any) -> Engine:
    """An engine with documents in it, all of them.

    Raises:
        DocumentError: one cannot be used; says which, and why.
    """
    report = engine.ingest(documents, **options)
    if report.failed:
        raise DocumentError(f"document {report.failed[0].doc_id!r} cannot be used: {report.failed[0].reason}")
    return engine


@dataclass(frozen=True)
class Engines:
    """What the engines of all groups have in common.

    Args:
        decoder: reads, compresses and answers.
        embedder: of the search.
        compressors: by kind of memory.
        chunk: sizes.
        store, retrieve, prefix: as engines take them.
    """

    decoder: LocalDecoder
    embedder: Encodes
    compressors: Mapping[str, Compressor]
    chunk: ChunkConfig
    store: StoreConfig
    retrieve: RetrieveConfig
    prefix: PrefixConfig

    @contextmanager
    def about(self, group: Group) -> Iterator[GroupEngines]:
        """Engines that hold a group's documents, for the length of the block."""
        with TemporaryDirectory(prefix="lloco-eval-") as folder, ExitStack() as opened:
            yield GroupEngines(self, group, Path(folder), opened)


class GroupEngines:
    """A group's texts, a document each, in engines that are made when they are first asked for. By `Engines.about`."""

    def __init__(self, common: Engines, group: Group, folder: Path, opened: ExitStack) -> None:
        self.group = group
        self._common, self._folder, self._opened = common, folder, opened
        self._documents = [Document(str(number), text) for number, text in enumerate(group.chunks)]
        self._made: dict[tuple[str, float], Engine] = {}

    def memory(self, kind: str, ratio: float) -> Engine:
        """The engine whose segments are of a kind and a ratio."""
        if (kind, ratio) not in self._made:
            self._made[kind, ratio] = self._open(kind, self._common.compressors[kind], ratio, self._common.chunk)
        return self._made[kind, ratio]

    @cached_property
    def search(self) -> Engine:
        """An engine to search only: the same chunks, nothing compressed."""
        return self._open("search", Blank(), CompressConfig.ratio, self._common.chunk)

    @cached_property
    def passages(self) -> Engine:
        """The same with chunks of a search window's size, for text that has to be short."""
        size = self._common.chunk.window_tokens
        return self._open("passages", Blank(), CompressConfig.ratio, ChunkConfig(max(16, size), size, 0))

    @property
    def doc_ids(self) -> list[str]:
        """All documents, in order."""
        return [document.doc_id for document in self._documents]

    def chunks(self, engine: Engine) -> list[Hit]:
        """All segments, in order."""
        return [hit for doc_id in self.doc_ids for hit in engine.store.chunks(doc_id)]

    def split(self, engine: Engine) -> int:
        """How many texts were too long for one segment."""
        return sum(info.segments > 1 for info in engine.documents())

    def _open(self, kind: str, compressor: Compressor, ratio: float, chunk: ChunkConfig) -> Engine:
        common = self._common
        opened = Engine.open(
            self._folder / f"{kind}-{ratio:g}",
            decoder=common.decoder,
            embedder=common.embedder,
            compressor=compressor,
            compress=CompressConfig(ratio=ratio),
            chunk=chunk,
            store_config=common.store,
            retrieve=common.retrieve,
            prefix=common.prefix,
        )
        return filled(self._opened.enter_context(opened), self._documents)
