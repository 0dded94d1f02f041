"""Check a store byte by byte. Works on stores that cannot be opened, and beside a writer.

The catalogue is looked at in a private copy of one state. Files are compared with that state, and what does not fit is
looked at again a little later: a writer may have replaced it, or be about to say that it has.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing
from pathlib import Path

from lloco_engine.errors import SegmentUnavailable, StoreCorrupt, StoreError, StoreFull, StoreLocked, StoreNotFound
from lloco_engine.store.adapters import adapter_problems
from lloco_engine.store.catalogue import Catalogue
from lloco_engine.store.files import Layout
from lloco_engine.store.index import SearchIndex
from lloco_engine.store.manifest import Manifest
from lloco_engine.store.records import Problem
from lloco_engine.store.schema import migrate
from lloco_engine.store.seals import kept_manifest, seal_problems
from lloco_engine.store.segments import SegmentFiles
from lloco_engine.store.words import word_problems
from lloco_engine.store.writer import windows_hash

__all__ = ["DAMAGE", "catalogue_problems", "index_problems", "private_copy", "segment_problems", "verify_store"]

Progress = Callable[[int, int], None]
# What reading something damaged may raise: a size that is not there, a name that is no text, a type that nobody wrote.
DAMAGE = (
    sqlite3.Error,
    StoreError,
    OSError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    MemoryError,
    RecursionError,
    SystemError,
)
_LOOKS = 6
_PAUSE_S = 0.25
_ADVICE = "`lloco verify --repair`"


def verify_store(path: str | Path, progress: Progress | None = None) -> list[Problem]:
    """Everything that is wrong with a store, every byte of it read: manifest, catalogue, segments, index, adapters.

    The copy of the catalogue that is looked at takes its size of room in the system's temporary folder.

    Args:
        path: the store's folder.
        progress: called with segments checked and segments in all.

    Raises:
        StoreNotFound: there is no store.
        StoreFull: no room for the copy.
        StoreLocked: another program holds the catalogue.
    """
    layout = Layout(path)
    if not layout.manifest.exists() and not layout.catalogue.exists():
        raise StoreNotFound(f"there is no store at {path}")
    try:
        catalogue = Catalogue(layout.catalogue)
    except (StoreFull, StoreLocked):
        raise
    except StoreError as error:
        return [*_manifest_problems(layout, None), Problem("catalogue", "catalogue.sqlite", str(error))]
    with closing(catalogue):
        try:
            copy = private_copy(catalogue)
        except (StoreFull, StoreLocked):
            raise
        except DAMAGE as error:
            return [*_manifest_problems(layout, None), _of_catalogue(layout, error)]
        with closing(copy):
            problems = list(_manifest_problems(layout, copy))
            problems += catalogue_problems(layout, copy)
            return problems + _file_problems(layout, catalogue, copy, progress)


def private_copy(catalogue: Catalogue) -> Catalogue:
    """A copy of one state of a catalogue, brought up to date, which anything may be done to.

    Raises:
        StoreCorrupt: it is no readable catalogue of ours.
        StoreMismatch: a newer engine made it.
    """
    copy = catalogue.copy()
    try:
        copy.check()
        with copy.errors():
            migrate(copy.connection, str(catalogue.path))
    except BaseException:
        copy.close()
        raise
    return copy


def _manifest_problems(layout: Layout, copy: Catalogue | None) -> Iterator[Problem]:
    try:
        Manifest.load(layout.manifest)
        kept = None if copy is None else kept_manifest(copy.connection)
        if kept is not None and layout.manifest.read_bytes() != kept.encode("utf-8"):
            raise StoreCorrupt(
                f"{layout.manifest} is not the one that the store was made with, of which the catalogue keeps a copy: "
                f"{_ADVICE} puts it back"
            )
    except DAMAGE as error:
        yield Problem("manifest", "manifest.json", str(error))


def catalogue_problems(layout: Layout, copy: Catalogue) -> list[Problem]:
    """What is wrong inside a catalogue, which `private_copy` gave."""
    problems: list[Problem] = []
    checks: tuple[Callable[[Catalogue], Iterable[tuple[str, str | None]]], ...] = (
        _structure,
        lambda copy: seal_problems(copy.connection),
        _contents,
    )
    for check in checks:
        try:
            for detail, doc_id in check(copy):
                suffers = () if doc_id is None else (doc_id,)
                if doc_id is None or all(suffers != problem.doc_ids for problem in problems):
                    advice = f"ingest {doc_id!r} again, or {_ADVICE}" if doc_id else _ADVICE
                    problems.append(Problem("catalogue", "catalogue.sqlite", f"{detail}: {advice}", suffers))
        except DAMAGE as error:
            problems.append(_of_catalogue(layout, error))
    if not problems:  # else what it is compared with is not sound
        try:
            with closing(Catalogue.empty(layout.temporary / "empty")) as empty:
                migrate(empty.connection, "an empty catalogue")
                problems += [
                    Problem("catalogue", "catalogue.sqlite", f"{detail}: {_ADVICE} makes it again")
                    for detail in word_problems(copy.connection, empty.connection)
                ]
        except DAMAGE as error:
            problems.append(_of_catalogue(layout, error))
    return problems


def _of_catalogue(layout: Layout, error: BaseException) -> Problem:
    detail = str(error) if isinstance(error, StoreError) else f"{layout.catalogue} is damaged ({error}): {_ADVICE}"
    return Problem("catalogue", "catalogue.sqlite", detail)


def _structure(copy: Catalogue) -> Iterator[tuple[str, None]]:
    copy.integrity()
    for table, *_ in copy.connection.execute("PRAGMA foreign_key_check").fetchmany(1):
        yield f"rows of table {table!r} refer to what is not there", None


def _contents(copy: Catalogue) -> Iterator[tuple[str, str]]:
    """Documents whose text or vectors are not what was put there."""
    rows = copy.connection.execute("SELECT doc_key, doc_id, content_hash, windows_hash FROM documents")
    for doc_key, doc_id, content_hash, of_windows in rows.fetchall():
        text = copy.text(doc_key).encode("utf-8", "surrogateescape")
        if hashlib.sha256(text).hexdigest() != content_hash:
            yield f"the text of document {doc_id!r} does not match its hash", doc_id
            continue
        windows = copy.connection.execute(
            "SELECT w.start, w.end, w.vector FROM chunks c JOIN windows w USING (chunk_key) WHERE c.doc_key = ?"
            " ORDER BY c.ordinal, w.window_id",
            (doc_key,),
        )
        if windows_hash(windows) != of_windows:
            yield f"the search vectors of document {doc_id!r} do not match their hash", doc_id


def _file_problems(layout: Layout, catalogue: Catalogue, copy: Catalogue, progress: Progress | None) -> list[Problem]:
    """Files that are not what the catalogue says, and still are not when it is asked again."""
    problems = _compared(layout, copy, None, progress)
    for _ in range(_LOOKS):
        if not problems:
            break
        time.sleep(_PAUSE_S)
        try:
            again = _compared(layout, catalogue, {problem.path for problem in problems}, None)
        except DAMAGE:  # a catalogue that can be read in part
            break
        problems = [problem for problem in again if any(problem.path == old.path for old in problems)]
    return problems


def _compared(
    layout: Layout, catalogue: Catalogue, paths: Collection[str] | None, progress: Progress | None
) -> list[Problem]:
    """Files against the catalogue; all of them, or only those of these paths."""

    def found() -> Iterator[Problem]:
        with catalogue.transaction():
            if manifest is not None:
                yield from segment_problems(layout, catalogue, SegmentFiles.of(layout, manifest.form), paths, progress)
                yield from index_problems(layout, catalogue, manifest)
            if not layout.is_at_work():  # else these may be the work
                yield from _orphans(layout, catalogue)
        yield from adapter_problems(layout, catalogue)

    try:
        manifest = Manifest.load(layout.manifest)
    except StoreError:
        manifest = None
    problems: list[Problem] = []
    try:
        problems += (problem for problem in found() if paths is None or problem.path in paths)
    except (StoreFull, StoreLocked):
        raise
    except DAMAGE as error:
        problems.append(_of_catalogue(layout, error))
    return problems


def segment_problems(
    layout: Layout,
    catalogue: Catalogue,
    files: SegmentFiles,
    paths: Collection[str] | None = None,
    progress: Progress | None = None,
) -> Iterator[Problem]:
    """Segment files that are missing, damaged, or not those that the catalogue knows. Inside a transaction."""
    known = catalogue.segment_rows()
    for done, (segment_id, (_, checksum)) in enumerate(sorted(known.items()), start=1):
        path = layout.segment(segment_id)
        if paths is None or layout.relative(path) in paths:
            try:
                if files.verify(segment_id)[1] != checksum:
                    raise SegmentUnavailable(f"segment {segment_id} ({path}) is not the one that the catalogue knows")
            except SegmentUnavailable as error:
                yield Problem("segment", layout.relative(path), str(error), catalogue.users_of(segment_id))
        if progress is not None:
            progress(done, len(known))


def index_problems(layout: Layout, catalogue: Catalogue, manifest: Manifest) -> Iterator[Problem]:
    """An index file that is missing or damaged. Inside a transaction."""
    recorded = catalogue.index_file()
    damage = SearchIndex(layout, manifest.embedder_dim, 0).damage(catalogue)
    if recorded is not None and damage is not None:
        yield Problem("index", layout.relative(layout.index_file(recorded[0])), damage)


def _orphans(layout: Layout, catalogue: Catalogue) -> Iterator[Problem]:
    known = {layout.segment(segment_id) for segment_id in catalogue.segment_rows()}
    for path in layout.segment_files():
        if path not in known:
            yield Problem("orphan", layout.relative(path), "no document refers to it; the next ingest may")
