"""What the bench measures on: a long source made of the demo documents, compressed once and kept in the cache folder.

Two stores lie there. ``retrieved`` holds one document of the whole source, compressed as documents are by default;
``whole`` holds, compressed harder, one document for each source length, all of them beginnings of the same text.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from lloco_engine import __version__
from lloco_engine.chunking import Chunker
from lloco_engine.compress.base import Compressor
from lloco_engine.config import ChunkConfig
from lloco_engine.decoder.local import LocalDecoder
from lloco_engine.demo import documents_folder
from lloco_engine.errors import StoreError
from lloco_engine.models import cache_folder
from lloco_engine.readers import read_paths
from lloco_engine.store import Manifest, Store
from lloco_engine.store.manifest import FORMAT_VERSION
from lloco_engine.store.records import SegmentStats
from lloco_engine.store.writer import Writer
from lloco_engine.tokenizing import encode
from lloco_engine.types import Chunk, Document, Span

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from lloco_engine.eval.progress import Report

__all__ = ["Corpus", "CorpusSizes", "Encoder", "source_ids", "source_texts"]

_PARAGRAPHS = re.compile(r"\n\s*\n")
_Piece = tuple[int, ...]  # token ids of one segment
_EVERYTHING = "source"  # id of the document in the store that is searched


class Encoder(Protocol):
    """What is needed of an embedder."""

    name: str

    @property
    def dim(self) -> int:
        """Numbers per vector."""

    @property
    def fingerprint(self) -> str:
        """What shapes a vector."""

    def encode(self, texts: Sequence[str], /) -> npt.NDArray[np.float32]:
        """(texts, dim) float32, rows L2-normalised."""
        ...


@dataclass(frozen=True)
class CorpusSizes:
    """Tokens of a segment, source tokens per slot in either store, and the source lengths, ascending."""

    segment_tokens: int
    ratio: float
    whole_ratio: float
    lengths: tuple[int, ...]


def source_texts() -> list[str]:
    """The texts of the demo documents."""
    return [item.text for item in read_paths([documents_folder()]) if isinstance(item, Document)]


def source_ids(tokenizer: Any, count: int) -> list[int]:
    """``count`` tokens of text: the demo documents, then their paragraphs over and over, in ever another order."""
    texts = source_texts()
    paragraphs = [part for text in texts for part in _PARAGRAPHS.split(text) if part.strip()]
    ids = encode(tokenizer, "\n\n".join(texts))
    turn = 0
    while len(ids) < count:
        turn += 1
        order = random.Random(turn).sample(paragraphs, len(paragraphs))
        ids += encode(tokenizer, "\n\n" + "\n\n".join(order))
    return ids[:count]


class Corpus:
    """The two stores, open, with every source length in them. A context manager.

    Args:
        decoder: reads and compresses.
        compressor: what makes the segments.
        embedder: for the search.
        sizes: what there must be.
        folder: where the stores are; None is ``bench/<fingerprint>`` in the cache folder.
        progress: is told of the compressing, which takes long the first time and goes on where it was cut off.
    """

    def __init__(
        self,
        decoder: LocalDecoder,
        compressor: Compressor,
        embedder: Encoder,
        sizes: CorpusSizes,
        *,
        folder: Path | None = None,
        progress: Report | None = None,
    ) -> None:
        self.decoder, self.compressor, self.embedder, self.sizes = decoder, compressor, embedder, sizes
        self.ids = source_ids(decoder.tokenizer, max(sizes.lengths))
        self.compress_s = 0.0  # spent now; what was there already cost nothing
        self._vectors: dict[_Piece, npt.NDArray[np.float32]] = {}
        manifests = [self._manifest(ratio) for ratio in (sizes.ratio, sizes.whole_ratio)]
        self.folder = folder or cache_folder() / "bench" / _fingerprint(manifests)
        with ExitStack() as opened:
            self.retrieved, self.whole = (
                opened.enter_context(_open(self.folder / name, manifest))
                for name, manifest in zip(("retrieved", "whole"), manifests, strict=True)
            )
            self._complete(progress)
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @staticmethod
    def whole_id(length: int) -> str:
        """The document of a source length in the store ``whole``."""
        return f"source-{length}"

    def chunk_ids(self) -> list[list[int]]:
        """The token ids of the whole segments, in order."""
        size = self.sizes.segment_tokens
        return [self.ids[at : at + size] for at in range(0, len(self.ids) - size + 1, size)]

    def _manifest(self, ratio: float) -> Manifest:
        decoder, embedder = self.decoder, self.embedder
        return Manifest(
            format_version=FORMAT_VERSION,
            decoder=decoder.name,
            decoder_fingerprint=decoder.fingerprint,
            tokenizer_fingerprint=decoder.tokenizer_fingerprint,
            template_fingerprint=decoder.template.fingerprint,
            layers=decoder.shape.layers,
            kv_heads=decoder.shape.kv_heads,
            head_dim=decoder.shape.head_dim,
            memory="compact_kv",
            compressor=self.compressor.name,
            compressor_settings=self.compressor.settings,
            ratio=ratio,
            dtype="float16",
            embedder=embedder.name,
            embedder_fingerprint=embedder.fingerprint,
            embedder_dim=embedder.dim,
            chunk={"segment_tokens": self.sizes.segment_tokens},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            engine_version=__version__,
        )

    def _complete(self, progress: Report | None) -> None:
        """Compress and put what is not there yet. A longer source that is there already stays."""
        there = {info.doc_id: info.source_tokens for info in self.retrieved.documents()}
        wanted = {self.whole_id(length): length for length in self.sizes.lengths}
        have = {info.doc_id for info in self.whole.documents()}
        missing = {doc_id: length for doc_id, length in wanted.items() if doc_id not in have}
        longest = len(self.ids) if there.get(_EVERYTHING, 0) < len(self.ids) else 0
        if not missing and not longest:
            return
        with self.retrieved.writer() as fine, self.whole.writer() as coarse:
            fine_stats, coarse_stats = self._compress(
                [
                    (fine, self.sizes.ratio, dict.fromkeys(self._pieces(longest))),
                    (
                        coarse,
                        self.sizes.whole_ratio,
                        dict.fromkeys(p for n in missing.values() for p in self._pieces(n)),
                    ),
                ],
                progress,
            )
            if longest:
                self._put(fine, _EVERYTHING, longest, fine_stats)
            for doc_id, length in missing.items():
                self._put(coarse, doc_id, length, coarse_stats)

    def _pieces(self, length: int) -> Iterator[_Piece]:
        for at in range(0, length, self.sizes.segment_tokens):
            yield tuple(self.ids[at : min(at + self.sizes.segment_tokens, length)])

    def _compress(
        self, needs: Sequence[tuple[Writer, float, Mapping[_Piece, None]]], progress: Report | None
    ) -> list[dict[_Piece, SegmentStats]]:
        """The segments of every piece in each store that needs it, made where they are not there yet."""
        made: list[dict[_Piece, SegmentStats]] = [{} for _ in needs]
        pieces = sorted({piece: None for _, _, wanted in needs for piece in wanted}, key=len, reverse=True)
        done, total = 0, sum(map(len, pieces))
        for piece in pieces:
            if progress is not None:
                progress("compressing the source (once)", done, total)
            lacking = []
            for (writer, ratio, wanted), stats in zip(needs, made, strict=True):
                if piece in wanted:
                    identity = writer.segment_id("", piece)
                    if (kept := writer.segment_stats(identity)) is not None:
                        stats[piece] = kept
                    else:
                        lacking.append((writer, identity, ratio, stats))
            if lacking:  # one pass over the text serves both stores
                began = time.perf_counter()
                segments = self.compressor.compress(self.decoder, piece, [ratio for _, _, ratio, _ in lacking])
                self.compress_s += time.perf_counter() - began
                for (writer, identity, _, stats), segment in zip(lacking, segments, strict=True):
                    stats[piece] = writer.save_segment(identity, segment)
            done += len(piece)
        return made

    def _put(self, writer: Writer, doc_id: str, length: int, stats: Mapping[_Piece, SegmentStats]) -> None:
        chunks: list[Chunk] = []
        vectors = []
        text = ""
        pieces = list(self._pieces(length))
        for piece in pieces:
            chunk = self._chunk(doc_id, len(chunks), len(text), piece)
            if piece not in self._vectors:  # most pieces are in several documents
                windows = [chunk.text[w.start - len(text) : w.end - len(text)] for w in chunk.windows]
                self._vectors[piece] = self.embedder.encode(windows)
            vectors.append(self._vectors[piece])
            chunks.append(chunk)
            text += chunk.text
        writer.put_document(
            Document(doc_id, text),
            chunks,
            [stats[piece].segment_id for piece in pieces],
            vectors,
            seconds=self.compress_s,
            segment_stats=[stats[piece] for piece in pieces],
        )

    def _chunk(self, doc_id: str, ordinal: int, begin: int, piece: _Piece) -> Chunk:
        """A chunk of exactly these tokens, so that its windows are cut as an ingest cuts them."""
        text = self.decoder.tokenizer.decode(list(piece), clean_up_tokenization_spaces=False)
        roomy = 4 * self.sizes.segment_tokens  # a text that was cut between tokens may read as a few more
        window = min(ChunkConfig.window_tokens, roomy)
        sizes = ChunkConfig(max(roomy, 16), max(window, 8), min(ChunkConfig.window_overlap, window - 1))
        (chunk,) = Chunker(self.decoder.tokenizer, sizes).split(Document(doc_id, text))
        windows = tuple(Span(begin + window.start, begin + window.end) for window in chunk.windows)
        return replace(chunk, ordinal=ordinal, span=Span(begin, begin + len(text)), token_ids=piece, windows=windows)


def _open(path: Path, manifest: Manifest) -> Store:
    """The store at ``path``, made where there is none.

    Raises:
        StoreError: what is there cannot be used; says which folder to remove.
    """
    try:
        if (path / "manifest.json").exists():
            return Store.open(path, expect=manifest)
        return Store.create(path, manifest)
    except StoreError as error:
        raise type(error)(
            f"{error} (the bench keeps its source there; remove {path.parent} to have it made again)"
        ) from error


def _fingerprint(manifests: Sequence[Manifest]) -> str:
    """16 hex digits of everything that the stores are made from."""
    made_of = [
        {name: value for name, value in manifest.to_json().items() if name not in ("created", "decoder", "embedder")}
        for manifest in manifests
    ]
    texts = hashlib.sha256("\0".join(source_texts()).encode()).hexdigest()
    return hashlib.sha256(json.dumps([made_of, texts], sort_keys=True).encode()).hexdigest()[:16]
