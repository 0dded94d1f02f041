"""Check a store's files one by one, and put right what can be put right. Works on stores that cannot be opened."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from lloco_engine.errors import SegmentUnavailable, StoreCorrupt, StoreError, StoreNotFound
from lloco_engine.store import segments
from lloco_engine.store.adapters import adapter_problems, remove_damaged_adapters
from lloco_engine.store.catalogue import Catalogue
from lloco_engine.store.connecting import connect
from lloco_engine.store.files import Layout, write_atomic
from lloco_engine.store.index import SearchIndex, remove_index_files
from lloco_engine.store.lock import write_lock
from lloco_engine.store.manifest import Manifest
from lloco_engine.store.records import Problem
from lloco_engine.store.schema import migrate
from lloco_engine.store.writer import Writer, windows_hash

__all__ = ["create_catalogue", "repair_store", "segment_format", "verify_store"]

Progress = Callable[[int, int], None]


def segment_format(manifest: Manifest) -> segments.AnyFormat:
    """What the segment files of a store have in common."""
    if manifest.memory == "summary":
        return segments.SummaryFormat(manifest.summary_dim, manifest.dtype)
    return segments.SegmentFormat(manifest.layers, manifest.kv_heads, manifest.head_dim, manifest.dtype)


def create_catalogue(layout: Layout) -> None:
    """Make an empty catalogue, or bring an older one up to date. The caller holds the write lock."""
    connection = connect(layout.catalogue)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        migrate(connection, str(layout.catalogue))
    finally:
        connection.close()


def verify_store(path: str | Path, progress: Progress | None = None) -> list[Problem]:
    """Everything that is wrong with a store, every byte of it read: manifest, catalogue, segments,
    index, adapters, orphans.

    Args:
        path: the store's folder.
        progress: called with segments checked and segments in all.

    Raises:
        StoreNotFound: there is no store.
    """
    layout = Layout(path)
    if not layout.manifest.exists() and not layout.catalogue.exists():
        raise StoreNotFound(f"there is no store at {path}")
    problems: list[Problem] = []
    manifest: Manifest | None = None
    try:
        manifest = Manifest.load(layout.manifest)
    except StoreError as error:
        problems.append(Problem("manifest", "manifest.json", str(error)))
    try:
        catalogue = Catalogue(layout.catalogue)
    except StoreError as error:
        return [*problems, Problem("catalogue", "catalogue.sqlite", str(error))]
    try:
        catalogue.check()
        catalogue.integrity()
        with catalogue.transaction():
            problems += _document_problems(catalogue)
            found: list[Problem] = []
            if manifest is not None:
                found = list(_segment_problems(layout, catalogue, segment_format(manifest), progress))
            problems += _orphans(layout, catalogue)
        if manifest is not None:
            with catalogue.transaction():  # a writer may have replaced meanwhile what was looked for
                known = {layout.relative(layout.segment(segment_id)) for segment_id in catalogue.segment_rows()}
                problems += [problem for problem in found if problem.path in known]
                problems += _index_problems(layout, catalogue, manifest)
        problems += adapter_problems(layout, catalogue)
    except StoreError as error:
        problems.append(Problem("catalogue", "catalogue.sqlite", str(error)))
    finally:
        catalogue.close()
    return problems


def _document_problems(catalogue: Catalogue) -> Iterator[Problem]:
    for doc_id, detail, _ in _damaged_documents(catalogue):
        yield Problem("catalogue", "catalogue.sqlite", detail, (doc_id,))


def _damaged_documents(catalogue: Catalogue) -> Iterator[tuple[str, str, int]]:
    """Documents whose text or vectors are not what was put there: id, what is wrong, key."""
    rows = catalogue.connection.execute("SELECT doc_key, doc_id, content_hash, windows_hash FROM documents")
    for doc_key, doc_id, content_hash, of_windows in rows.fetchall():
        text = catalogue.text(doc_key).encode("utf-8", "surrogatepass")
        if hashlib.sha256(text).hexdigest() != content_hash:
            yield doc_id, f"the text of document {doc_id!r} does not match its hash", doc_key
            continue
        windows = catalogue.connection.execute(
            "SELECT w.start, w.end, w.vector FROM chunks c JOIN windows w USING (chunk_key) WHERE c.doc_key = ?"
            " ORDER BY c.ordinal, w.window_id",
            (doc_key,),
        )
        if windows_hash(windows) != of_windows:
            yield doc_id, f"the search vectors of document {doc_id!r} do not match their hash", doc_key


def _segment_problems(
    layout: Layout, catalogue: Catalogue, form: segments.AnyFormat, progress: Progress | None
) -> Iterator[Problem]:
    known = catalogue.segment_rows()
    for done, (segment_id, (_, checksum)) in enumerate(sorted(known.items()), start=1):
        path = layout.segment(segment_id)
        try:
            if segments.verify(path, segment_id, form)[1] != checksum:
                raise SegmentUnavailable(f"segment {segment_id} ({path}) is not the one that the catalogue knows")
        except SegmentUnavailable as error:
            yield Problem("segment", layout.relative(path), str(error), catalogue.users_of(segment_id))
        if progress is not None:
            progress(done, len(known))


def _index_problems(layout: Layout, catalogue: Catalogue, manifest: Manifest) -> Iterator[Problem]:
    recorded = catalogue.index_file()
    damage = SearchIndex(layout, manifest.embedder_dim, 0).damage(catalogue)
    if recorded is not None and damage is not None:
        yield Problem("index", layout.relative(layout.index_file(recorded[0])), damage)


def _orphans(layout: Layout, catalogue: Catalogue) -> Iterator[Problem]:
    known = {layout.segment(segment_id) for segment_id in catalogue.segment_rows()}
    for path in layout.segment_files():
        if path not in known:
            yield Problem("orphan", layout.relative(path), "no document refers to it; the next ingest may")


def repair_store(
    path: str | Path, *, manifest: Manifest | None = None, hnsw_above: int = 50_000, timeout: float = 10.0
) -> list[str]:
    """Put a damaged store in order; afterwards it opens, and `verify_store` finds no more than orphans.

    A damaged manifest or catalogue is moved aside (``*.damaged-TIME``), never deleted. After a fresh catalogue the
    store is empty but for its segment files: ingest the documents again and they are used, not compressed again.
    A document whose text or vectors are damaged is removed from the catalogue: ingest it again. Damaged segment
    files are removed; `Store.missing_segments` then names them. Where no document was lost, files that no document
    refers to are removed too. Nobody else may use the store meanwhile.

    Args:
        path: the store's folder.
        manifest: what to write when the manifest is damaged; it must be as it was, or segments are not found again.
        hnsw_above: as in `StoreConfig`.
        timeout: seconds to wait for another writer.

    Returns:
        what was done, a sentence each; empty when nothing was wrong.

    Raises:
        StoreNotFound: there is no store.
        StoreCorrupt: the manifest is damaged and none was given.
        StoreLocked: another writer holds the store.
    """
    layout = Layout(path)
    if not layout.manifest.exists() and not layout.catalogue.exists():
        raise StoreNotFound(f"there is no store at {path}")
    with write_lock(layout.lock, timeout):
        layout.clear_temporary()
        done, manifest = _repair_manifest(layout, manifest)
        fresh = _repair_catalogue(layout)
        done += fresh
        create_catalogue(layout)
        catalogue = Catalogue(layout.catalogue)
        try:
            lost = _remove_damaged_documents(catalogue)
            done += lost + remove_damaged_adapters(layout, catalogue)
            with catalogue.transaction():
                bad = list(_segment_problems(layout, catalogue, segment_format(manifest), None))
                index = list(_index_problems(layout, catalogue, manifest))
            for problem in bad:
                (layout.root / problem.path).unlink(missing_ok=True)
                used_by = ", ".join(problem.doc_ids)
                done.append(f"{problem.path} was damaged or missing: ingest {used_by} again to make it")
            if index:
                remove_index_files(layout)
                done.append(f"{index[0].path} was damaged: the index was made again")
            if not fresh and not lost:
                writer = Writer(layout, manifest, segment_format(manifest), catalogue)
                if removed := writer.collect_garbage():
                    done.append(f"{removed} files that no document refers to were removed")
            SearchIndex(layout, manifest.embedder_dim, hnsw_above).publish(catalogue)
        finally:
            catalogue.close()
    return done


def _repair_manifest(layout: Layout, manifest: Manifest | None) -> tuple[list[str], Manifest]:
    try:
        return [], Manifest.load(layout.manifest)
    except StoreCorrupt:
        if manifest is None:
            raise
    done = []
    if layout.manifest.exists():
        aside = _aside(layout.manifest)
        layout.manifest.rename(aside)
        done.append(f"manifest.json was damaged: moved to {aside.name}")
    write_atomic(layout.manifest, manifest.dumps().encode("utf-8"), layout.temporary)
    return [*done, "manifest.json was written anew"], manifest


def _repair_catalogue(layout: Layout) -> list[str]:
    """Move a damaged catalogue aside."""
    try:
        catalogue = Catalogue(layout.catalogue)
        try:
            catalogue.check()
            catalogue.integrity()
            return []
        finally:
            catalogue.close()
    except StoreCorrupt as error:
        aside = _aside(layout.catalogue)
        for suffix in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                layout.catalogue.with_name(layout.catalogue.name + suffix).rename(f"{aside}{suffix}")
        remove_index_files(layout)
        return [f"{error}: moved to {aside.name}, and an empty one was made; ingest the documents again"]


def _remove_damaged_documents(catalogue: Catalogue) -> list[str]:
    done = []
    with catalogue.transaction(write=True) as connection:
        for doc_id, detail, doc_key in list(_damaged_documents(catalogue)):
            connection.execute("DELETE FROM documents WHERE doc_key = ?", (doc_key,))
            done.append(f"{detail}: it was removed; ingest {doc_id} again")
        if done:
            connection.execute("DELETE FROM segments WHERE segment_id NOT IN (SELECT segment_id FROM chunks)")
            connection.execute("UPDATE generation SET number = number + 1")
    return done


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%S%f}")
