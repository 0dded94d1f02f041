"""Documents into the store, one at a time: chunk, compress what is not there yet, embed, commit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lloco_engine.chunking import Chunker
from lloco_engine.errors import DocumentError, StoreError
from lloco_engine.readers import read_paths
from lloco_engine.store import SegmentStats, Store, Writer
from lloco_engine.store.catalogue import encode_value
from lloco_engine.types import AnySegment, Chunk, Document, Failure, IngestReport, MetadataValue

if TYPE_CHECKING:
    from lloco_engine.compress.base import Compressor
    from lloco_engine.decoder.local import LocalDecoder
    from lloco_engine.opening import DecoderFacts, Encodes

__all__ = ["Ingest", "Progress", "Source", "read_sources"]

Source = Document | str | Path


@dataclass(frozen=True)
class Progress:
    """Where an ingest stands; given to a callback when a document begins and after each of its segments.

    ``document`` is its id; segments that an earlier run had finished count as done. ``source_tokens_done`` are the
    tokens compressed by this run, ``tokens_per_s`` its rate so far; ``documents_done`` counts finished documents.
    """

    document: str
    done_segments: int
    total_segments_of_document: int
    source_tokens_done: int = 0
    tokens_per_s: float = 0.0
    documents_done: int = 0


def read_sources(
    sources: Iterable[Source], *, tenant: str = "", metadata: Mapping[str, MetadataValue] | None = None
) -> Iterator[Document | Failure]:
    """Documents out of documents, files and folders, lazily; what cannot be used is a Failure, and the rest go on.

    Raises:
        ConfigError: a metadata key is one of the names that every document has.
    """
    seen: set[tuple[str, str]] = set()
    read_paths((), metadata=metadata)  # checks the keys, whatever the sources are
    for source in sources:
        if isinstance(source, Document):
            items: Iterable[Document | Failure] = [_with(source, tenant, metadata or {})]
        else:
            items = read_paths([source], tenant=tenant, metadata=metadata)
        for item in items:
            if isinstance(item, Document) and (item.tenant, item.doc_id) in seen:
                reason = f"a doc_id must come once in a run, and {item.doc_id!r} came before"
                yield Failure(item.source or item.doc_id, reason)
                continue
            if isinstance(item, Document):
                seen.add((item.tenant, item.doc_id))
            yield item


def _with(document: Document, tenant: str, metadata: Mapping[str, MetadataValue]) -> Document | Failure:
    if tenant and document.tenant not in ("", tenant):
        reason = f"a document must be of the run's tenant {tenant!r}, and this one is of {document.tenant!r}"
        return Failure(document.source or document.doc_id, reason)
    return replace(document, tenant=tenant or document.tenant, metadata={**document.metadata, **metadata})


@dataclass
class _Tally:
    """What an `IngestReport` is made of, while it grows."""

    added: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    segments: int = 0
    source_tokens: int = 0
    slots: int = 0
    bytes_written: int = 0
    compress_s: float = 0.0

    @property
    def documents(self) -> int:
        return len(self.added) + len(self.replaced) + len(self.unchanged) + len(self.repaired) + len(self.failed)

    def report(self, seconds: float) -> IngestReport:
        return IngestReport(
            tuple(self.added),
            tuple(self.replaced),
            tuple(self.unchanged),
            tuple(self.repaired),
            tuple(self.failed),
            self.segments,
            self.source_tokens,
            self.slots,
            self.bytes_written,
            self.compress_s,
            seconds,
        )


class Ingest:
    """One run over some documents. Memory holds one document and one segment, however many there are.

    Args:
        store: where they go.
        chunker: of the store's decoder and chunk sizes.
        compressor: makes segments.
        ratio: source tokens per slot.
        facts: of the decoder.
        decoder: loads the decoder; called only when there is something to compress.
        embedder: turns search windows into vectors.
        progress: called as `Progress` says; what it raises stops the run.
    """

    def __init__(
        self,
        store: Store,
        chunker: Chunker,
        compressor: Compressor,
        ratio: float,
        *,
        facts: DecoderFacts,
        decoder: Callable[[], LocalDecoder],
        embedder: Encodes,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self._store = store
        self._chunker = chunker
        self._compressor = compressor
        self._ratio = ratio
        self._facts = facts
        self._decoder = decoder
        self._embedder = embedder
        self._progress = progress
        self._tally = _Tally()

    def run(self, items: Iterable[Document | Failure]) -> IngestReport:
        """Ingest documents until there are none left; those that cannot be used are in the report.

        What was finished when an error or an interrupt ends the run stays: the next run goes on from there.

        Raises:
            StoreLocked: another writer holds the store.
            StoreFull: no room; the store is as it was after the last finished document.
            LLoCOError: whatever is wrong with more than one document.
        """
        began = time.perf_counter()
        with self._store.writer() as writer:
            for item in items:
                if isinstance(item, Failure):
                    self._tally.failed.append(item)
                    continue
                try:
                    outcome = self._one(writer, item)
                except (DocumentError, StoreError) as error:
                    if not isinstance(error, DocumentError) and type(error) is not StoreError:
                        raise  # full, locked, damaged: not this document's fault
                    self._tally.failed.append(Failure(item.source or item.doc_id, str(error)))
                else:
                    done: list[str] = getattr(self._tally, outcome)
                    done.append(item.doc_id)
        return self._tally.report(time.perf_counter() - began)

    def _one(self, writer: Writer, document: Document) -> Literal["added", "replaced", "unchanged", "repaired"]:
        _check(document)
        missing: list[str] = []
        state = self._store.document_state(document.doc_id, document.tenant)
        same_text = state is not None and state[0] == document.content_hash
        if same_text:
            missing = self._store.missing_segments(document.doc_id, document.tenant, verify=True)
            if not missing and self._same_labels(document):
                return "unchanged"
        chunks = self._chunker.split(document)
        starts = self._chain_starts(chunks)
        ids: list[str] = []
        for number, (chunk, start) in enumerate(zip(chunks, starts, strict=True)):
            previous = ids[-1] if start < number else None
            ids.append(writer.segment_id(document.tenant, chunk.token_ids, previous))
        before = self._tally.compress_s
        stats = self._segments(writer, document, chunks, ids, starts)
        if missing and set(missing) <= set(ids) and self._same_labels(document):
            return "repaired"  # saving a segment again is all that it takes
        vectors = [
            self._embedder.encode([document.text[window.start : window.end] for window in chunk.windows])
            for chunk in chunks
        ]
        outcome = writer.put_document(
            document, chunks, ids, vectors, seconds=self._tally.compress_s - before, segment_stats=stats
        )
        return "repaired" if missing else outcome

    def _same_labels(self, document: Document) -> bool:
        known = self._store.document(document.doc_id, document.tenant)
        return known.title == document.title and dict(known.metadata) == dict(document.metadata)

    def _chain_starts(self, chunks: Sequence[Chunk]) -> list[int]:
        facts: Any = self._facts  # has what is read of a decoder
        return self._compressor.chain_starts(facts, [len(chunk.token_ids) for chunk in chunks])

    def _segments(
        self, writer: Writer, document: Document, chunks: Sequence[Chunk], ids: Sequence[str], starts: Sequence[int]
    ) -> list[SegmentStats]:
        """Every chunk's segment, in the store: found there, or compressed now, after those that it builds on.

        These are read back from the store, so that a run that was cut off goes on with the numbers it had.
        """
        stats: dict[str, SegmentStats] = {}
        for done, (chunk, segment_id, start) in enumerate(zip(chunks, ids, starts, strict=True)):
            self._tell(document, done, len(chunks))
            if segment_id in stats:
                continue
            kept = writer.segment_stats(segment_id)
            if kept is None:
                before = [self._store.load_segment(earlier) for earlier in ids[start:done]]
                kept = self._compress(writer, chunk, segment_id, before)
            stats[segment_id] = replace(kept, previous=ids[done - 1] if start < done else None)
        self._tell(document, len(chunks), len(chunks))
        return [stats[segment_id] for segment_id in ids]

    def _compress(self, writer: Writer, chunk: Chunk, segment_id: str, before: Sequence[AnySegment]) -> SegmentStats:
        decoder, tally = self._decoder(), self._tally
        began = time.perf_counter()
        (segment,) = self._compressor.compress(decoder, chunk.token_ids, [self._ratio], before)
        tally.compress_s += time.perf_counter() - began
        saved = writer.save_segment(segment_id, segment)
        tally.segments += 1
        tally.source_tokens += len(chunk.token_ids)
        tally.slots += saved.slots
        tally.bytes_written += saved.bytes
        return saved

    def _tell(self, document: Document, done: int, total: int) -> None:
        if self._progress is None:
            return
        tally = self._tally
        rate = tally.source_tokens / tally.compress_s if tally.compress_s > 0 else 0.0
        self._progress(Progress(document.doc_id, done, total, tally.source_tokens, rate, tally.documents))


def _check(document: Document) -> None:
    """What would fail only after the work was done.

    Raises:
        DocumentError: names the rule that the document breaks.
    """
    if not document.doc_id:
        raise DocumentError("a document's id must not be empty")
    if not document.text.strip():
        raise DocumentError("a document must hold text, and this one is blank")
    fields = {name: getattr(document, name) for name in ("doc_id", "text", "title", "source", "tenant")}
    fields |= {key: value for key, value in document.metadata.items() if isinstance(value, str)}
    for name, value in fields.items():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            reason = f"{name} must be valid Unicode, and character {error.start} is a lone surrogate"
            raise DocumentError(reason) from error
    for key, value in document.metadata.items():
        try:
            encode_value(key, value)
        except ValueError as error:
            raise DocumentError(str(error)) from error
