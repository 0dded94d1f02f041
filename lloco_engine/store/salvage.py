"""A new catalogue with everything of a damaged one that is as it was written, which the seals tell."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from lloco_engine.errors import NotInStore, SegmentUnavailable
from lloco_engine.store.connecting import connect
from lloco_engine.store.database import explained
from lloco_engine.store.files import Layout
from lloco_engine.store.schema import migrate
from lloco_engine.store.seals import Seals, keep_manifest, rest_differing, seal_all
from lloco_engine.store.segments import SegmentFiles
from lloco_engine.store.tables import Key, Shape
from lloco_engine.store.terms import add_words
from lloco_engine.store.writer import insert_metadata

__all__ = ["Salvage"]

_DERIVED = ("index_file", "sqlite_sequence")  # of the search index, which is made again; of the rows that are copied


class Salvage:
    """Copies what is sound, document by document.

    Args:
        layout: of the store; the caller holds its write lock.
        old: a private copy of the damaged catalogue.
        files: of its segments, whose rows can be made again from them.
    """

    def __init__(self, layout: Layout, old: sqlite3.Connection, files: SegmentFiles) -> None:
        self._layout, self._old, self._files = layout, old, files

    def run(self, manifest: str) -> tuple[Path, list[str]]:
        """Make the new catalogue.

        Args:
            manifest: the text of manifest.json.

        Returns:
            its file, and a sentence for each thing that was lost.

        Raises:
            StoreCorrupt: the old one has no list of what it should hold.
            StoreFull: no room.
        """
        path = self._layout.temporary / self._layout.catalogue.name
        self._layout.temporary.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        with explained(self._layout.catalogue):
            new = connect(self._layout.catalogue, str(path))
            try:
                new.execute("PRAGMA foreign_keys = OFF")
                migrate(new, str(path))
                new.execute("BEGIN IMMEDIATE")
                lost = list(self._copy(new))
                seal_all(new)
                keep_manifest(new, manifest)
                new.execute("COMMIT")
                if new.execute("PRAGMA foreign_key_check").fetchone() is not None:
                    raise sqlite3.DatabaseError("what is sound in it does not fit together")
            except BaseException:
                new.close()
                path.unlink(missing_ok=True)
                raise
            new.close()
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
        return path, lost

    def _copy(self, new: sqlite3.Connection) -> Iterator[str]:
        old, made, seals = Shape(self._old), Shape(new), Seals(self._old)
        sound = {
            key
            for key, _ in seals.listed("segments", old)
            if self._put(new, old, made, seals, "segments", key) or self._segment(new, made, seals, str(key))
        }
        for key, label in seals.listed("documents", old):
            new.execute("SAVEPOINT one")
            whole = self._put(new, old, made, seals, "documents", key)
            if whole:
                used = {row[0] for row in new.execute("SELECT segment_id FROM chunks WHERE doc_key = ?", (key,))}
                whole = used <= sound
            if not whole:
                new.execute("ROLLBACK TO one")
                yield f"document {label!r} was damaged and is not in it: ingest {label} again"
            new.execute("RELEASE one")
        add_words(new)
        new.execute("DELETE FROM segments WHERE segment_id NOT IN (SELECT segment_id FROM chunks)")
        if not seals.complete:
            yield "documents may be missing that are not even listed any more: ingest everything again to be sure"
        yield from self._copy_rest(new, old)

    def _put(self, new: sqlite3.Connection, old: Shape, made: Shape, seals: Seals, root: str, key: Key) -> bool:
        """Copy the rows of one document or segment; whether they are as they were written."""
        try:
            for table in old.owned[root]:
                columns = ", ".join(f'"{name}"' for name in table.columns)
                marks = ", ".join("?" * len(table.columns))
                rows = self._old.execute(table.select, (key,)).fetchall()
                new.executemany(f'INSERT INTO "{table.name}" ({columns}) VALUES ({marks})', rows)
            if seals.differing(root, key, made) == ["metadata"]:  # which is derived from the document's row
                new.execute("DELETE FROM metadata WHERE doc_key = ?", (key,))
                kept = new.execute("SELECT metadata, private FROM documents WHERE doc_key = ?", (key,)).fetchone()
                insert_metadata(new, int(key), *map(json.loads, kept))
            return not seals.differing(root, key, made)
        except (sqlite3.Error, ValueError, TypeError, AttributeError):
            return False

    def _segment(self, new: sqlite3.Connection, made: Shape, seals: Seals, segment_id: str) -> bool:
        """Make a segment's row again from its file, and whether it is then as it was written."""
        try:
            segment, checksum = self._files.verify(segment_id)
            size = self._layout.segment(segment_id).stat().st_size
            others = self._old.execute("SELECT segment_id FROM segments").fetchall()
        except (SegmentUnavailable, NotInStore, OSError, sqlite3.Error):
            return False
        for (previous,) in [(None,), *others]:
            new.execute(
                "INSERT OR REPLACE INTO segments (segment_id, slots, source_tokens, bytes, checksum, previous)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (segment_id, segment.slots, segment.source_tokens, size, checksum, previous),
            )
            if not seals.differing("segments", segment_id, made):
                return True
        new.execute("DELETE FROM segments WHERE segment_id = ?", (segment_id,))
        return False

    def _copy_rest(self, new: sqlite3.Connection, old: Shape) -> Iterator[str]:
        """Tables that belong to no document: the old ones where they are sound, else those of a new catalogue."""
        wrong = rest_differing(self._old, old)
        for name in old.others:
            if name in _DERIVED:
                continue
            if name in wrong:
                if name != "generation":
                    yield f"table {name!r} was damaged: what can be made of the store's files is in it"
                continue
            columns = ", ".join(f'"{column}"' for column in old.columns(name))
            marks = ", ".join("?" * len(old.columns(name)))
            new.execute(f'DELETE FROM "{name}"')
            rows = self._old.execute(f'SELECT {columns} FROM "{name}"').fetchall()
            new.executemany(f'INSERT INTO "{name}" ({columns}) VALUES ({marks})', rows)
        # A number that no earlier state had, for those who compare.
        least = int(time.time()) if "generation" in wrong else 0
        new.execute("UPDATE generation SET number = max(number, ?) + 1", (least,))
