"""The one writer of a store: segment files first, then one transaction that makes a document be there."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from lloco_engine.documents import check_document
from lloco_engine.errors import DocumentError, NotInStore, SegmentUnavailable, StoreError, StoreFull
from lloco_engine.store.catalogue import Catalogue, missing_document
from lloco_engine.store.files import Layout, check_segment_id
from lloco_engine.store.manifest import Manifest
from lloco_engine.store.records import SegmentStats
from lloco_engine.store.room import make_room
from lloco_engine.store.segments import SegmentFile, SegmentFiles, pack
from lloco_engine.store.terms import add_words
from lloco_engine.store.values import rows_of
from lloco_engine.types import AnySegment, Chunk, Document, Span

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float32]

__all__ = ["Writer", "stats_of"]

_Made = TypeVar("_Made")
_log = logging.getLogger(__name__)


class Writer:
    """Adds, replaces and removes documents. Made by `Store.writer`, which holds the write lock meanwhile.

    A document is put by: `segment_id` for each chunk; `save_segment` for those whose `segment_stats` is None;
    `put_document`, the commit point. A process that dies in between leaves segment files that the next try uses.
    """

    def __init__(self, layout: Layout, manifest: Manifest, catalogue: Catalogue) -> None:
        self._layout = layout
        self._manifest = manifest
        self._files = SegmentFiles.of(layout, manifest.form)
        self._catalogue = catalogue

    def segment_id(self, tenant: str, token_ids: Iterable[int], previous: str | None = None) -> str:
        """Content address of the segment that a tenant's tokens become in this store: 32 hex digits.

        ``previous`` is the segment that it builds on.
        """
        return self._manifest.segment_id(tenant, token_ids, previous)

    def segment_stats(self, segment_id: str) -> SegmentStats | None:
        """What `put_document` needs of a segment whose file is already there; None when it must be made (again).

        Reads and checks the whole file.
        """
        with self._catalogue.transaction():
            return stats_of(segment_id, self._files, self._catalogue)

    def save_segment(self, segment_id: str, segment: AnySegment) -> SegmentStats:
        """Write a segment's file, or write a damaged one again.

        Raises:
            StoreFull: no room; nothing was changed.
            StoreError: the segment is not of this store's kind or shape, or has numbers that are not finite.
        """
        return self.save_file(pack(segment, segment_id, self._files.form))

    def save_file(self, file: SegmentFile) -> SegmentStats:
        """`save_segment` of one that is packed already.

        Raises:
            StoreFull: no room; nothing was changed.
        """
        stats, segment_id = file.stats, file.stats.segment_id
        self._files.write(file)
        with self._catalogue.transaction():
            known = self._catalogue.segment_rows([segment_id])
        if known:
            with self._catalogue.transaction(write=True) as connection:
                connection.execute(
                    "UPDATE segments SET slots = ?, source_tokens = ?, bytes = ?, checksum = ? WHERE segment_id = ?",
                    (stats.slots, stats.source_tokens, stats.bytes, stats.checksum, segment_id),
                )
        return stats

    def put_document(
        self,
        document: Document,
        chunks: Sequence[Chunk],
        segment_ids: Sequence[str],
        vectors: Sequence[Vectors],
        *,
        seconds: float,
        segment_stats: Sequence[SegmentStats],
    ) -> Literal["added", "replaced"]:
        """Make a document be there, instead of its earlier version if there is one. All of it or nothing.

        Args:
            document: what the chunks were cut from.
            chunks: in order; their spans tile the document.
            segment_ids: one id a chunk; each was saved before.
            vectors: one array (windows of the chunk, embedder_dim) a chunk, float32, rows L2-normalised.
            seconds: what compressing this version took.
            segment_stats: one a chunk, from `save_segment` or `segment_stats`; ``previous`` of each is None, or the
                segment of the chunk before it, which it builds on.

        Raises:
            DocumentError: chunks do not tile the document, or it is none that can be kept (`check_document`).
            SegmentUnavailable: a segment's file is not there, or no longer.
            StoreError: lists differ in length, or vectors have a wrong shape.
            StoreFull: no room; the store is as it was.
        """
        put = _Put(check_document(document), chunks, segment_ids, vectors, seconds, segment_stats)
        put.check(self._manifest.embedder_dim, self._layout)
        with self._catalogue.transaction(write=True) as connection:
            state = self._catalogue.document_state(document.doc_id, document.tenant)
            dropped: set[str] = set()
            if state is not None:
                dropped = _forget(connection, state[0])
            put.insert(connection, version=1 if state is None else state[2] + 1)
            unused = _drop_unused(connection, dropped)
            connection.execute("UPDATE generation SET number = number + 1")
        self._remove_files(unused)
        return "added" if state is None else "replaced"

    def replace_segments(self, replaced: Mapping[str, SegmentStats]) -> None:
        """Let every chunk that has one of these segments have the other, in one transaction.

        A process that dies before it leaves the former ones, and files that the next try uses; one that dies after it
        leaves files that nobody refers to. Segments that no chunk has any more are none's to replace.

        Args:
            replaced: by the former id, the stats of what `save_segment` saved, of the same tokens and tenant.

        Raises:
            StoreFull: no room; the store is as it was.
        """
        with self._catalogue.transaction(write=True) as connection:
            connection.executemany(
                "INSERT OR REPLACE INTO segments (segment_id, slots, source_tokens, bytes, checksum, previous)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                [(s.segment_id, s.slots, s.source_tokens, s.bytes, s.checksum, s.previous) for s in replaced.values()],
            )
            connection.executemany(
                "UPDATE chunks SET segment_id = ? WHERE segment_id = ?",
                [(stats.segment_id, former) for former, stats in replaced.items()],
            )
            new = {stats.segment_id for stats in replaced.values()}
            unused = _drop_unused(connection, replaced.keys() | new)
            connection.execute("UPDATE generation SET number = number + 1")
        self._remove_files(unused)

    def relabel(self, document: Document) -> None:
        """Give a document that is there, with this text, these labels: all but its text. Its version stays.

        Raises:
            NotInStore: the tenant has no such document.
            DocumentError: it is none that can be kept (`check_document`).
            StoreFull: no room; the store is as it was.
        """
        document = check_document(document)
        with self._catalogue.transaction(write=True) as connection:
            doc_key = self._catalogue.doc_key(document.doc_id, document.tenant)
            labels = _labels(document)
            assignments = ", ".join(f"{name} = :{name}" for name in labels)
            connection.execute(
                f"UPDATE documents SET {assignments} WHERE doc_key = :doc_key", labels | {"doc_key": doc_key}
            )
            for table in ("metadata", "pages"):
                connection.execute(f"DELETE FROM {table} WHERE doc_key = ?", (doc_key,))
            _insert_labels(connection, doc_key, document)
            connection.execute("UPDATE generation SET number = number + 1")

    def delete_document(self, doc_id: str, tenant: str = "") -> None:
        """Remove a document, and the segments that no other document has.

        Raises:
            NotInStore: the tenant has no such document.
        """
        if not self.delete_documents([doc_id], tenant):
            raise NotInStore(missing_document(doc_id, tenant))

    def delete_documents(self, doc_ids: Iterable[str], tenant: str = "") -> list[str]:
        """Remove documents as `delete_document` does, in one transaction; returns the ids of those that were there."""
        wanted = tuple(dict.fromkeys(doc_ids))
        removed, unused = self._with_room(lambda: self._delete(wanted, tenant))
        self._remove_files(unused)
        return removed

    def _delete(self, doc_ids: Iterable[str], tenant: str) -> tuple[list[str], list[str]]:
        """Ids of the documents that were there, and of the segments that nobody has any more."""
        removed: list[str] = []
        used: set[str] = set()
        with self._catalogue.transaction(write=True) as connection:
            for doc_id in doc_ids:
                state = self._catalogue.document_state(doc_id, tenant)
                if state is not None:
                    used |= _forget(connection, state[0])
                    removed.append(doc_id)
            unused = _drop_unused(connection, used)
            if removed:
                connection.execute("UPDATE generation SET number = number + 1")
        return removed, unused

    def _with_room(self, change: Callable[[], _Made]) -> _Made:
        """Make a change that makes room, on a full disk too: then with what was kept for this, and the index's room."""
        try:
            return change()
        except StoreFull:
            if not make_room(self._layout):
                raise
        return change()

    def collect_garbage(self) -> int:
        """Remove every file that no document refers to; returns how many.

        That ends what a killed ingest could have gone on from.
        """
        with self._catalogue.transaction():
            kept = {self._layout.segment(segment_id) for segment_id in self._catalogue.segment_rows()}
        removed = 0
        for path in self._layout.segment_files():
            if path not in kept:
                path.unlink(missing_ok=True)
                removed += 1
        return removed

    def _remove_files(self, segment_ids: Iterable[str]) -> None:
        for segment_id in segment_ids:
            try:
                self._layout.segment(segment_id).unlink(missing_ok=True)
            except OSError as error:  # the document is gone all the same; verify shows what is left
                _log.warning("segment %s is no longer used but could not be removed: %s", segment_id, error)


@dataclass(frozen=True)
class _Put:
    """The arguments of one `Writer.put_document`."""

    document: Document
    chunks: Sequence[Chunk]
    segment_ids: Sequence[str]
    vectors: Sequence[Vectors]
    seconds: float
    stats: Sequence[SegmentStats]

    def check(self, dim: int, layout: Layout) -> None:
        import numpy as np

        name, count = self.document.doc_id, len(self.chunks)
        for what, values in (("segment ids", self.segment_ids), ("vectors", self.vectors), ("stats", self.stats)):
            if len(values) != count:
                raise StoreError(f"document {name!r} has {count} chunks but {len(values)} {what}; give one a chunk")
        at = 0
        for chunk in self.chunks:
            if chunk.span.start != at or chunk.text != self.document.text[at : chunk.span.end]:
                raise DocumentError(f"chunks must tile document {name!r}; chunk {chunk.ordinal} breaks off at {at}")
            at = chunk.span.end
        if at != len(self.document.text) or not count:
            raise DocumentError(
                f"chunks must tile document {name!r}; {count} chunks end at {at} of {len(self.document.text)}"
            )
        end = 0
        for page in self.document.pages:
            if not end <= page.span.start <= page.span.end <= len(self.document.text):
                raise DocumentError(f"pages must lie in document {name!r} in order; page {page.number} does not")
            end = page.span.end
        for chunk, vectors in zip(self.chunks, self.vectors, strict=True):
            if vectors.shape != (len(chunk.windows), dim) or not np.isfinite(vectors).all():
                raise StoreError(
                    f"vectors of chunk {chunk.ordinal} of {name!r} must be finite and of shape "
                    f"{(len(chunk.windows), dim)}, not {vectors.shape}"
                )
        for segment_id, stats in zip(self.segment_ids, self.stats, strict=True):
            path = layout.segment(check_segment_id(segment_id))
            if stats.segment_id != segment_id or not path.is_file() or path.stat().st_size != stats.bytes:
                raise SegmentUnavailable(
                    f"segment {segment_id} of {name!r} is not in the store; save it before the document"
                )
        for stats, before in zip(self.stats, (None, *self.segment_ids[:-1]), strict=True):
            if stats.previous not in (None, before):
                raise StoreError(
                    f"segment {stats.segment_id} of {name!r} must build on that of the chunk before it, {before}, or "
                    f"on none, not on {stats.previous}"
                )

    def insert(self, connection: sqlite3.Connection, version: int) -> None:
        document = self.document
        values = _labels(document) | {
            "tenant": document.tenant,
            "doc_id": document.doc_id,
            "version": version,
            "content_hash": document.content_hash,
            "windows_hash": windows_hash(self._windows()),
            "chars": len(document.text),
            "source_tokens": sum(len(chunk.token_ids) for chunk in self.chunks),
            "compress_s": self.seconds,
            "ingested_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        doc_key = connection.execute(
            f"INSERT INTO documents ({', '.join(values)}) VALUES (:{', :'.join(values)})", values
        ).lastrowid
        assert doc_key is not None
        _insert_labels(connection, doc_key, document)
        connection.executemany(
            "INSERT OR REPLACE INTO segments (segment_id, slots, source_tokens, bytes, checksum, previous)"
            " VALUES (?, ?, ?, ?, ?, ?)",  # what was damaged in a row that is there already is written anew
            [(s.segment_id, s.slots, s.source_tokens, s.bytes, s.checksum, s.previous) for s in self.stats],
        )
        for ordinal, (chunk, segment_id, vectors) in enumerate(
            zip(self.chunks, self.segment_ids, self.vectors, strict=True)
        ):
            chunk_key = connection.execute(
                "INSERT INTO chunks (doc_key, ordinal, start, end, source_tokens, segment_id, text, text_hash)"
                " VALUES (:doc, :ordinal, :start, :end, :tokens, :segment, :text, text_hash(:text))",
                {
                    "doc": doc_key,
                    "ordinal": ordinal,
                    "start": chunk.span.start,
                    "end": chunk.span.end,
                    "tokens": len(chunk.token_ids),
                    "segment": segment_id,
                    "text": chunk.text,
                },
            ).lastrowid
            connection.executemany(
                "INSERT INTO windows (chunk_key, start, end, vector) VALUES (?, ?, ?, ?)",
                [(chunk_key, *row) for row in _window_rows(chunk, vectors)],
            )
        add_words(connection, doc_key)

    def _windows(self) -> Iterator[tuple[int, int, bytes]]:
        for chunk, vectors in zip(self.chunks, self.vectors, strict=True):
            yield from _window_rows(chunk, vectors)


def _labels(document: Document) -> dict[str, str]:
    """The columns of what is said about a document, apart from its text."""
    return {
        "title": document.title,
        "source": document.source,
        "origin": document.origin,
        "encoding": document.encoding,
        "metadata": json.dumps(document.metadata, ensure_ascii=False, allow_nan=False),
        "private": json.dumps(document.private, ensure_ascii=False, allow_nan=False),
    }


def _insert_labels(connection: sqlite3.Connection, doc_key: int, document: Document) -> None:
    """What is said about a document and has rows of its own."""
    connection.executemany(
        "INSERT INTO pages (doc_key, number, label, start, end) VALUES (?, ?, ?, ?, ?)",
        [(doc_key, page.number, page.label, page.span.start, page.span.end) for page in document.pages],
    )
    insert_metadata(connection, doc_key, document.metadata, document.private)


def stats_of(segment_id: str, files: SegmentFiles, catalogue: Catalogue) -> SegmentStats | None:
    """What is to be known of a segment whose file is there, all of it read and checked; None where it is not good.

    The catalogue is inside a transaction.
    """
    try:
        segment, checksum = files.verify(segment_id)
        size = os.stat(files.name(segment_id)).st_size
    except (SegmentUnavailable, OSError):
        return None
    known = catalogue.segment_rows([segment_id]).get(segment_id)
    if known is not None and known[1] != checksum:
        return None
    return SegmentStats(segment_id, segment.slots, segment.source_tokens, size, checksum)


def insert_metadata(
    connection: sqlite3.Connection, doc_key: int, metadata: Mapping[str, Any], private: Mapping[str, Any]
) -> None:
    """The rows by which filters find a document, derived from its metadata."""
    connection.executemany(
        "INSERT INTO metadata (doc_key, key, value, listed) VALUES (?, ?, ?, ?)",
        [(doc_key, *row) for row in rows_of(metadata, private)],
    )


def windows_hash(rows: Iterable[tuple[int, int, bytes]]) -> str:
    """SHA-256 of search windows (start, end, float32 vector) in order; shows a damaged vector."""
    digest = hashlib.sha256()
    for start, end, vector in rows:
        digest.update(f"{start} {end} {len(vector)}\n".encode("ascii") + vector)
    return digest.hexdigest()


def _window_rows(chunk: Chunk, vectors: Vectors) -> Iterator[tuple[int, int, bytes]]:
    window: Span
    for window, vector in zip(chunk.windows, vectors, strict=True):
        yield window.start, window.end, vector.astype("<f4").tobytes()


def _forget(connection: sqlite3.Connection, doc_key: int) -> set[str]:
    """Remove a document's rows; returns the segments it referred to."""
    used = connection.execute("SELECT DISTINCT segment_id FROM chunks WHERE doc_key = ?", (doc_key,)).fetchall()
    connection.execute("DELETE FROM documents WHERE doc_key = ?", (doc_key,))
    return {row[0] for row in used}


def _drop_unused(connection: sqlite3.Connection, segment_ids: Iterable[str]) -> list[str]:
    """Remove the rows of those segments that no document refers to; returns them."""
    unused = []
    for segment_id in sorted(segment_ids):
        if connection.execute("SELECT 1 FROM chunks WHERE segment_id = ?", (segment_id,)).fetchone() is None:
            connection.execute("DELETE FROM segments WHERE segment_id = ?", (segment_id,))
            unused.append(segment_id)
    return unused
