"""Documents into the store, one at a time: chunk, compress what is not there yet, embed, commit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lloco_engine.compress.chained import chain_starts
from lloco_engine.documents import file_of, is_older_note, printable
from lloco_engine.errors import ConfigError, DocumentError, NotInStore, SegmentUnavailable, StoreError
from lloco_engine.jobs import Compress, Job, Maker, ahead
from lloco_engine.metadata import same_metadata
from lloco_engine.process import give_back_memory
from lloco_engine.readers import Identities, Reader
from lloco_engine.store import DocumentInfo, SegmentStats, Store, Writer
from lloco_engine.types import Chunk, Document, Failure, IngestReport
from lloco_engine.vanished import find_vanished
from lloco_engine.vanished import prune as remove_vanished

if TYPE_CHECKING:
    from lloco_engine.store_setup import Setup

__all__ = ["Ingest", "Progress", "Source", "each_of"]

Source = Document | str | Path
Outcome = Literal["added", "replaced", "unchanged", "repaired", "moved"]
_LARGE = 1_000_000  # characters of a document that takes many times its size, which then is free but not given back
_TRIES = 100  # each of them is spoilt only by a writer that was quicker


def each_of(sources: Iterable[Source] | Source) -> Iterable[Source]:
    """Several sources, where there may be one; `ConfigError` where it is neither."""
    if isinstance(sources, Document | str | os.PathLike):
        return [sources]
    given: object = sources
    if not isinstance(given, Iterable) or isinstance(given, bytes | bytearray):
        raise ConfigError(f"sources must be a document, a path or several, not of type {type(given).__name__}")
    return sources


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


@dataclass
class _Read:
    """A document as it was read, or what is wrong with it; how far the reader was; what was cut of it so far."""

    item: Document | Failure
    bytes_done: int
    bytes_at_hand: int
    chunks: list[Chunk] = field(default_factory=list)
    jobs: list[Compress] = field(default_factory=list)


class Ingest:
    """One run over some documents. Memory holds one document and one segment, however many there are; where segments
    are made elsewhere, as many documents as it takes to keep those busy who make them.

    Args:
        store: where they go.
        setup: what the store is made with.
        maker: makes segments.
        progress: called as `Progress` says; what it raises stops the run.
    """

    def __init__(
        self,
        store: Store,
        setup: Setup,
        maker: Maker,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self._store, self._setup, self._maker = store, setup, maker
        self._chunker = setup.chunker
        self._progress = progress
        self._tally = _Tally()
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
        tally = self._tally
        for read in ahead(self._read(sources, reader), self._maker, self._begin):
            self._take(read)
            tally.documents += 1
            if isinstance(read.item, Document) and len(read.item.text) > _LARGE:
                give_back_memory()
        vanished, removable, doubts = find_vanished(self._store, tenant, reader.areas, self._identities)
        tally.vanished += [place.doc_id for place in vanished]
        if prune:
            tally.pruned += remove_vanished(self._store, tenant, removable)
            tally.failed += doubts
        self._store.publish()
        tally.compress_s = self._maker.busy_s
        return tally.report(time.perf_counter() - began, reader.skipped)

    def _read(self, sources: Iterable[Source], reader: Reader) -> Iterator[_Read]:
        for source in sources:
            for item in reader.read(source):
                yield _Read(item, reader.bytes_done, reader.bytes_at_hand)

    def _begin(self, read: _Read) -> Sequence[Job]:
        """Let what a document will probably need be made meanwhile. What is wrong with it is said when it is taken."""
        item = read.item
        if isinstance(item, Failure):
            return ()
        with suppress(DocumentError):
            named = self._identities.identify(item)
            state = self._store.document_state(named.doc_id, named.tenant)
            if state is None or state[0] != named.content_hash:
                read.chunks = self._chunker.split(named)
                read.jobs = self._jobs(named, read.chunks)
                self._begin_missing(read.jobs)
        return read.jobs

    def _begin_missing(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if self._store.segment_stats(job.segment_id) is None:
                self._maker.begin(job)

    def _jobs(self, document: Document, chunks: Sequence[Chunk]) -> list[Compress]:
        """What is to be made of a document's chunks, in order."""
        starts = chain_starts(self._setup.compressor, self._setup.facts, [len(chunk.token_ids) for chunk in chunks])
        ids: list[str] = []
        jobs: list[Compress] = []
        for number, (chunk, start) in enumerate(zip(chunks, starts, strict=True)):
            previous = ids[-1] if start < number else None
            ids.append(self._store.segment_id(document.tenant, chunk.token_ids, previous))
            jobs.append(Compress(ids[-1], chunk.token_ids, tuple(ids[start:number])))
        return jobs

    def _take(self, read: _Read) -> None:
        item = read.item
        if isinstance(item, Failure):
            self._tally.failed.append(item)
            return
        try:
            named = self._identities.claim(item)
            outcome, doc_id = self._one(named, item, read)
        except (DocumentError, StoreError) as error:
            if not isinstance(error, DocumentError) and type(error) is not StoreError:
                raise  # full, locked, damaged: not this document's fault
            self._tally.failed.append(Failure(item.source or item.doc_id, str(error), item.doc_id))
        else:
            done: list[str] = getattr(self._tally, outcome)
            done.append(doc_id)

    def _one(self, named: Document, item: Document, read: _Read) -> tuple[Outcome, str]:
        """Bring one document in, however often other writers change what is known of it, or remove a segment that it
        shares, while its own are being made."""
        for _ in range(_TRIES):
            try:
                return self._try(named, item, read), named.doc_id
            except (_Overtaken, SegmentUnavailable, NotInStore):
                named = self._identities.identify(item)
        raise StoreError(f"other writers changed {named.doc_id!r} {_TRIES} times meanwhile; ingest it again")

    def _try(self, document: Document, item: Document, read: _Read) -> Outcome:
        missing: list[str] = []
        state = self._store.document_state(document.doc_id, document.tenant)
        same_text = state is not None and state[0] == document.content_hash
        damaged = same_text and not self._store.is_sound(document.doc_id, document.tenant)
        if same_text and not damaged:
            missing = self._store.missing_segments(document.doc_id, document.tenant, verify=True)
            if not missing:
                return self._relabel(document, item, state)
        chunks = read.chunks
        if not chunks or chunks[0].doc_id != document.doc_id:
            chunks = self._chunker.split(document)
        jobs = read.jobs or self._jobs(document, chunks)
        ids = [job.segment_id for job in jobs]
        stats, seconds = self._segments(document, jobs, read)
        if missing and set(missing) <= set(ids):
            self._relabel(document, item, state)
            return "repaired"  # saving a segment again is all that it takes
        vectors = [
            self._setup.embedder.encode([document.text[window.start : window.end] for window in chunk.windows])
            for chunk in chunks
        ]
        with self._write(document, item, state) as writer:
            outcome = writer.put_document(document, chunks, ids, vectors, seconds=seconds, segment_stats=stats)
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

    def _segments(self, document: Document, jobs: Sequence[Compress], read: _Read) -> tuple[list[SegmentStats], float]:
        """Every chunk's segment, in the store: found there, or made now, after those that it builds on; and the seconds
        that took.

        They are looked for in the store first, so that a run that was cut off goes on with what it had.
        """
        stats: dict[str, SegmentStats] = {}
        seconds = 0.0
        for done, job in enumerate(jobs):
            self._tell(document, done, len(jobs), read)
            if job.segment_id in stats:
                continue
            found, took = self._segment(job, jobs[done:])
            stats[job.segment_id] = replace(found, previous=job.before[-1] if job.before else None)
            seconds += took
        self._tell(document, len(jobs), len(jobs), read)
        return [stats[job.segment_id] for job in jobs], seconds

    def _segment(self, job: Compress, rest: Sequence[Compress]) -> tuple[SegmentStats, float]:
        """A segment, and the seconds that it took to make; where it must be made, the rest are begun with it."""
        made = self._maker.taken(job.segment_id)
        if made is None:
            if (kept := self._store.segment_stats(job.segment_id)) is not None:
                return kept, 0.0
            if self._maker.wants_more:
                self._begin_missing(rest)
            with self._store.claim(job.segment_id):
                made = self._maker.taken(job.segment_id)
                if made is None and (kept := self._store.segment_stats(job.segment_id)) is not None:
                    return kept, 0.0  # another has made it meanwhile
                made = made or self._maker.make(job)
        assert made.stats is not None
        tally = self._tally
        tally.segments += 1
        tally.source_tokens += made.stats.source_tokens
        tally.slots += made.stats.slots
        tally.bytes_written += made.stats.bytes
        return made.stats, made.seconds

    def _tell(self, document: Document, done: int, total: int, read: _Read) -> None:
        if self._progress is None:
            return
        tally, maker = self._tally, self._maker
        rate = maker.tokens / maker.busy_s if maker.busy_s > 0 else 0.0
        size = read.bytes_done + read.bytes_at_hand * done // max(total, 1)
        self._progress(Progress(document.doc_id, done, total, tally.source_tokens, rate, tally.documents, size))


def _is_same_place(known: DocumentInfo, document: Document) -> bool:
    """Whether a document's source is where it was: also where the same file is only named from another folder."""
    if known.source == document.source:
        return not known.origin or known.origin == document.origin
    if not document.origin or known.origin != document.origin:
        return is_older_note(known.origin, known.source, document.origin)
    name, line = (source.rpartition("/")[2] for source in (known.source, document.source))
    return name == line and name.startswith(printable(Path(file_of(document.origin)).name))
