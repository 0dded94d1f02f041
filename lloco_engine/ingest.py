"""Documents into the store, one at a time: chunk, compress what is not there yet, embed, commit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lloco_engine.chunking import Chunker
from lloco_engine.compress.chained import chain_starts, compress_after
from lloco_engine.documents import file_of, is_older_note, printable
from lloco_engine.errors import DocumentError, NotInStore, SegmentUnavailable, StoreError
from lloco_engine.metadata import same_metadata
from lloco_engine.process import give_back_memory
from lloco_engine.readers import Identities, Reader
from lloco_engine.store import DocumentInfo, SegmentStats, Store, Writer
from lloco_engine.types import AnySegment, Chunk, Document, Failure, IngestReport
from lloco_engine.vanished import find_vanished
from lloco_engine.vanished import prune as remove_vanished

if TYPE_CHECKING:
    from lloco_engine.compress.base import Compressor
    from lloco_engine.decoder.local import LocalDecoder
    from lloco_engine.opening import DecoderFacts, Encodes

__all__ = ["Ingest", "Progress", "Source"]

Source = Document | str | Path
Outcome = Literal["added", "replaced", "unchanged", "repaired", "moved"]
_LARGE = 1_000_000  # characters of a document that takes many times its size, which then is free but not given back
_TRIES = 100  # each of them is spoilt only by a writer that was quicker


@dataclass(frozen=True)
class Progress:
    """Where an ingest stands; given to a callback when a document begins and after each of its segments.

    ``document`` is its id; segments that an earlier run had finished count as done. ``source_tokens_done`` are the
    tokens compressed by this run, ``tokens_per_s`` its rate so far; ``documents_done`` counts finished documents, and
    ``bytes_done`` what has been read and finished of the files' bytes (`lloco_engine.readers.size_of_files` tells all).
    """

    document: str
    done_segments: int
    total_segments_of_document: int
    source_tokens_done: int = 0
    tokens_per_s: float = 0.0
    documents_done: int = 0
    bytes_done: int = 0


@dataclass
class _Tally:
    """What an `IngestReport` is made of, while it grows."""

    added: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    vanished: list[str] = field(default_factory=list)
    pruned: list[str] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    documents: int = 0
    segments: int = 0
    source_tokens: int = 0
    slots: int = 0
    bytes_written: int = 0
    compress_s: float = 0.0

    def report(self, seconds: float, skipped: Mapping[str, int]) -> IngestReport:
        values: dict[str, Any] = vars(self).copy()
        del values["documents"]
        values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return IngestReport(**values, seconds=seconds, skipped=dict(skipped))


class _Overtaken(Exception):
    """Another writer changed what is known of the document at hand."""


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
        one_at_a_time: a lock under which the decoder compresses a segment.
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
        one_at_a_time: AbstractContextManager[Any],
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self._store = store
        self._chunker = chunker
        self._compressor = compressor
        self._ratio = ratio
        self._facts = facts
        self._decoder = decoder
        self._embedder = embedder
        self._one_at_a_time = one_at_a_time
        self._progress = progress
        self._tally = _Tally()
        self._reader: Reader | None = None
        self._identities = Identities(store.places)

    def run(self, sources: Iterable[Source], reader: Reader, tenant: str = "", *, prune: bool = False) -> IngestReport:
        """Ingest sources until there are none left; what cannot be used is in the report.

        What was finished when an error or an interrupt ends the run stays: the next run goes on from there.
        The write lock is held for no longer than it takes to write a segment or to commit a document.

        Args:
            sources: read lazily.
            reader: reads them.
            tenant: the reader's.
            prune: remove what has vanished (see `find_vanished`).

        Raises:
            StoreLocked: another writer holds the store.
            StoreFull: no room; the store is as it was after the last finished document.
            LLoCOError: whatever is wrong with more than one document.
        """
        began = time.perf_counter()
        tally, self._reader = self._tally, reader
        for source in sources:
            for item in reader.read(source):
                self._take(item)
                tally.documents += 1
                if isinstance(item, Document) and len(item.text) > _LARGE:
                    give_back_memory()
        vanished, removable, doubts = find_vanished(self._store, tenant, reader.areas, self._identities)
        tally.vanished += [place.doc_id for place in vanished]
        if prune:
            tally.pruned += remove_vanished(self._store, tenant, removable)
            tally.failed += doubts
        self._store.publish()
        return tally.report(time.perf_counter() - began, reader.skipped)

    def _take(self, item: Document | Failure) -> None:
        if isinstance(item, Failure):
            self._tally.failed.append(item)
            return
        try:
            named = self._identities.claim(item)
            outcome, doc_id = self._one(named, item)
        except (DocumentError, StoreError) as error:
            if not isinstance(error, DocumentError) and type(error) is not StoreError:
                raise  # full, locked, damaged: not this document's fault
            self._tally.failed.append(Failure(item.source or item.doc_id, str(error), item.doc_id))
        else:
            done: list[str] = getattr(self._tally, outcome)
            done.append(doc_id)

    def _one(self, named: Document, item: Document) -> tuple[Outcome, str]:
        """Bring one document in, however often other writers change what is known of it, or remove a segment that it
        shares, while its own are being made."""
        for _ in range(_TRIES):
            try:
                return self._try(named, item), named.doc_id
            except (_Overtaken, SegmentUnavailable, NotInStore):
                named = self._identities.identify(item)
        raise StoreError(f"other writers changed {named.doc_id!r} {_TRIES} times meanwhile; ingest it again")

    def _try(self, document: Document, item: Document) -> Outcome:
        missing: list[str] = []
        state = self._store.document_state(document.doc_id, document.tenant)
        same_text = state is not None and state[0] == document.content_hash
        damaged = same_text and not self._store.is_sound(document.doc_id, document.tenant)
        if same_text and not damaged:
            missing = self._store.missing_segments(document.doc_id, document.tenant, verify=True)
            if not missing:
                return self._relabel(document, item, state)
        chunks = self._chunker.split(document)
        starts = chain_starts(self._compressor, self._facts, [len(chunk.token_ids) for chunk in chunks])
        ids: list[str] = []
        for number, (chunk, start) in enumerate(zip(chunks, starts, strict=True)):
            previous = ids[-1] if start < number else None
            ids.append(self._store.segment_id(document.tenant, chunk.token_ids, previous))
        before = self._tally.compress_s
        stats = self._segments(document, chunks, ids, starts)
        if missing and set(missing) <= set(ids):
            self._relabel(document, item, state)
            return "repaired"  # saving a segment again is all that it takes
        vectors = [
            self._embedder.encode([document.text[window.start : window.end] for window in chunk.windows])
            for chunk in chunks
        ]
        with self._write(document, item, state) as writer:
            outcome = writer.put_document(
                document, chunks, ids, vectors, seconds=self._tally.compress_s - before, segment_stats=stats
            )
        return "repaired" if missing or damaged else outcome

    @contextmanager
    def _write(self, document: Document, item: Document, state: tuple[str, int] | None) -> Iterator[Writer]:
        """The write lock, for what was decided without it, if that is still right."""
        with self._store.writer(publish=False) as writer:
            if (
                self._identities.identify(item).doc_id != document.doc_id
                or self._store.document_state(document.doc_id, document.tenant) != state
            ):
                raise _Overtaken
            yield writer

    def _relabel(self, document: Document, item: Document, state: tuple[str, int] | None) -> Outcome:
        """Let the labels of a document that is there with this text follow."""
        known = self._store.document(document.doc_id, document.tenant)
        labelled = (
            known.title == document.title
            and same_metadata(known.metadata, document.metadata)
            and any(
                same_metadata(one.private, document.private)
                for one in self._store.load_documents([document.doc_id], document.tenant)
            )
        )
        stays = _is_same_place(known, document)
        read_alike = (known.origin, known.encoding, known.pages) == (
            document.origin,
            document.encoding,
            len(document.pages),
        )
        if labelled and stays and read_alike:
            return "unchanged"
        kept = replace(document, source=known.source) if stays else document
        with self._write(document, item, state) as writer:
            writer.relabel(kept)
        if labelled and stays:
            return "unchanged"
        return "moved" if not stays and document.origin else "replaced"

    def _segments(
        self, document: Document, chunks: Sequence[Chunk], ids: Sequence[str], starts: Sequence[int]
    ) -> list[SegmentStats]:
        """Every chunk's segment, in the store: found there, or compressed now, after those that it builds on.

        These are read back from the store, so that a run that was cut off goes on with the numbers it had.
        """
        stats: dict[str, SegmentStats] = {}
        for done, (chunk, segment_id, start) in enumerate(zip(chunks, ids, starts, strict=True)):
            self._tell(document, done, len(chunks))
            if segment_id in stats:
                continue
            kept = self._store.segment_stats(segment_id)
            if kept is None:
                with self._store.claim(segment_id):
                    kept = self._store.segment_stats(segment_id)  # another may have made it meanwhile
                    if kept is None:
                        before = [self._store.load_segment(earlier) for earlier in ids[start:done]]
                        kept = self._compress(chunk, segment_id, before)
            stats[segment_id] = replace(kept, previous=ids[done - 1] if start < done else None)
        self._tell(document, len(chunks), len(chunks))
        return [stats[segment_id] for segment_id in ids]

    def _compress(self, chunk: Chunk, segment_id: str, before: Sequence[AnySegment]) -> SegmentStats:
        decoder, tally = self._decoder(), self._tally
        with self._one_at_a_time:
            began = time.perf_counter()
            (segment,) = compress_after(self._compressor, decoder, chunk.token_ids, [self._ratio], before)
            tally.compress_s += time.perf_counter() - began
        with self._store.writer(publish=False) as writer:
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
        size = 0
        if self._reader is not None:
            size = self._reader.bytes_done + self._reader.bytes_at_hand * done // max(total, 1)
        self._progress(Progress(document.doc_id, done, total, tally.source_tokens, rate, tally.documents, size))


def _is_same_place(known: DocumentInfo, document: Document) -> bool:
    """Whether a document's source is where it was: also where the same file is only named from another folder."""
    if known.source == document.source:
        return not known.origin or known.origin == document.origin
    if not document.origin or known.origin != document.origin:
        return is_older_note(known.origin, known.source, document.origin)
    name, line = (source.rpartition("/")[2] for source in (known.source, document.source))
    return name == line and name.startswith(printable(Path(file_of(document.origin)).name))
