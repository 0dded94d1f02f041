"""Put a damaged store in order: what is derived is made again, what can be saved is kept, what is lost is named."""

from __future__ import annotations

import os
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path

from lloco_engine.atomic import move
from lloco_engine.errors import StoreCorrupt, StoreNotFound
from lloco_engine.store.adapters import remove_damaged_adapters
from lloco_engine.store.catalogue import Catalogue
from lloco_engine.store.files import Layout, write_atomic
from lloco_engine.store.index import SearchIndex, remove_index_files
from lloco_engine.store.lock import write_lock
from lloco_engine.store.making import create_catalogue
from lloco_engine.store.manifest import Manifest
from lloco_engine.store.salvage import Salvage
from lloco_engine.store.seals import kept_manifest
from lloco_engine.store.segments import SegmentFiles
from lloco_engine.store.verify import DAMAGE, catalogue_problems, index_problems, private_copy, segment_problems
from lloco_engine.store.writer import Writer

__all__ = ["repair_store"]

_FILES = ("", "-wal", "-shm")  # what SQLite makes of a catalogue


def repair_store(
    path: str | Path, *, manifest: Manifest | None = None, hnsw_above: int = 50_000, timeout: float = 10.0
) -> list[str]:
    """Put a damaged store in order; afterwards it opens, and `verify_store` finds no more than missing segments.

    A damaged manifest is written anew from the copy that the catalogue keeps. A damaged catalogue is made anew: with
    every document that is as it was written, and with what is derived from them. Documents that are not are named:
    ingest them again, and their segment files are used, not compressed again. The former files are moved aside
    (``*.damaged-TIME``), never deleted. Damaged segment files are removed; `Store.missing_segments` then names them.
    Where no document was lost, files that no document refers to are removed too. Nobody else may use the store
    meanwhile.

    Args:
        path: the store's folder.
        manifest: what to write when the manifest is damaged and so is the catalogue; it must be as it was, or segments
            are not found again.
        hnsw_above: as in `StoreConfig`.
        timeout: seconds to wait for another writer.

    Returns:
        what was done, a sentence each; empty when nothing was wrong.

    Raises:
        StoreNotFound: there is no store.
        StoreCorrupt: the manifest is damaged, the catalogue has no sound copy of it, and none was given.
        StoreLocked: another writer holds the store.
        StoreFull: no room; the store is as it was.
    """
    layout = Layout(path)
    if not layout.manifest.exists() and not layout.catalogue.exists():
        raise StoreNotFound(f"there is no store at {path}")
    with write_lock(layout.lock, timeout):
        layout.clear_temporary()
        done, manifest = _repair_manifest(layout, manifest)
        remade, lost = _repair_catalogue(layout, manifest)
        done += remade
        create_catalogue(layout)
        with closing(Catalogue(layout.catalogue)) as catalogue:
            done += remove_damaged_adapters(layout, catalogue)
            with catalogue.transaction():
                bad = list(segment_problems(layout, catalogue, SegmentFiles.of(layout, manifest.form)))
                index = list(index_problems(layout, catalogue, manifest))
            for problem in bad:
                file = layout.root / problem.path
                if file.is_dir():
                    move(file, _aside(file))
                file.unlink(missing_ok=True)
                used_by = ", ".join(problem.doc_ids)
                done.append(f"{problem.path} was damaged or missing: ingest {used_by} again to make it")
            if index:
                remove_index_files(layout)
                done.append(f"{index[0].path} was damaged: the index was made again")
            if not lost:
                writer = Writer(layout, manifest, catalogue)
                if removed := writer.collect_garbage():
                    done.append(f"{removed} files that no document refers to were removed")
            SearchIndex(layout, manifest.embedder_dim, hnsw_above).publish(catalogue)
    return done


def _repair_manifest(layout: Layout, given: Manifest | None) -> tuple[list[str], Manifest]:
    kept = _kept_manifest(layout)
    damage: StoreCorrupt | None = None
    try:
        found = Manifest.load(layout.manifest)
        if kept is None or layout.manifest.read_text(encoding="utf-8") == kept:
            return [], found
    except StoreCorrupt as error:
        damage = error
    text = kept if kept is not None else given.dumps() if given is not None else None
    if text is None:
        assert damage is not None
        raise damage
    done = []
    if layout.manifest.exists():
        aside = _aside(layout.manifest)
        move(layout.manifest, aside)
        done.append(f"manifest.json was damaged: moved to {aside.name}")
    write_atomic(layout.manifest, text.encode("utf-8"), layout.temporary)
    return [*done, "manifest.json was written anew"], Manifest.load(layout.manifest)


def _kept_manifest(layout: Layout) -> str | None:
    with suppress(*DAMAGE), closing(Catalogue(layout.catalogue)) as catalogue:
        return kept_manifest(catalogue.connection)
    return None


def _repair_catalogue(layout: Layout, manifest: Manifest) -> tuple[list[str], bool]:
    """Make a damaged catalogue anew; returns what was done, and whether something was lost."""
    try:
        with closing(Catalogue(layout.catalogue)) as catalogue, closing(private_copy(catalogue)) as copy:
            problems = catalogue_problems(layout, copy)
            if not problems:
                return [], False
            why = problems[0].detail
            made, lost = Salvage(layout, copy.connection, SegmentFiles.of(layout, manifest.form)).run(manifest.dumps())
    except StoreCorrupt as error:
        aside = _set_aside(layout)
        told = f"{error}: moved to {aside.name}, and an empty one was made; ingest the documents again"
        return [told], True
    aside = _keep_beside(layout)
    move(made, layout.catalogue)  # in one step: a process that is killed leaves the one or the other
    return [
        f"{why}: catalogue.sqlite was made anew with what is sound in it, and the former one moved to {aside.name}",
        *lost,
    ], bool(lost)


def _keep_beside(layout: Layout) -> Path:
    """Give the catalogue a second name, so that another can take its place; its log and index go."""
    aside = _aside(layout.catalogue)
    for suffix in _FILES:
        file, other = Path(f"{layout.catalogue}{suffix}"), Path(f"{aside}{suffix}")
        if not file.exists():
            continue
        try:
            os.link(file, other)
        except OSError:  # a file system without links
            write_atomic(other, file.read_bytes(), layout.temporary)
    for suffix in _FILES[1:]:  # of what has the name now: to another catalogue they would be another's log
        Path(f"{layout.catalogue}{suffix}").unlink(missing_ok=True)
    remove_index_files(layout)
    return aside


def _set_aside(layout: Layout) -> Path:
    """Move the catalogue out of the way, and remove the index that was made of it."""
    aside = _aside(layout.catalogue)
    for suffix in _FILES:
        with suppress(FileNotFoundError):
            move(Path(f"{layout.catalogue}{suffix}"), Path(f"{aside}{suffix}"))
    remove_index_files(layout)
    return aside


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%S%f}")
