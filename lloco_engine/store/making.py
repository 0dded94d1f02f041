"""A store made; and one that is there made ready for use."""

from __future__ import annotations

import json
from contextlib import suppress

from lloco_engine.errors import StoreCorrupt, StoreError, StoreMismatch
from lloco_engine.store.catalogue import Catalogue
from lloco_engine.store.connecting import connect
from lloco_engine.store.database import explained
from lloco_engine.store.files import Layout, write_atomic
from lloco_engine.store.lock import write_lock
from lloco_engine.store.manifest import Manifest
from lloco_engine.store.schema import is_latest, migrate
from lloco_engine.store.seals import keep_manifest, kept_manifest

__all__ = ["create_catalogue", "make_ready", "make_store"]


def make_store(layout: Layout, manifest: Manifest) -> None:
    """Make an empty store in a folder that is missing or empty.

    Raises:
        StoreError: the folder holds something else, or a store.
        StoreFull: no room; a store can be made there when there is.
    """
    try:
        layout.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot make a folder at {layout.root}: {error.strerror}") from error
    # What is left of a creation that was cut off is ours; the manifest comes last and makes it a store.
    ours = {"tmp", layout.lock.name, *(layout.catalogue.name + suffix for suffix in ("", "-wal", "-shm"))}
    ours.add(layout.reserve.name)
    if strangers := sorted({entry.name for entry in layout.root.iterdir()} - ours):
        kind = "a store" if layout.manifest.name in strangers else f"{strangers[0]!r} and is not a store"
        raise StoreError(f"a store is made in a missing or empty folder; {layout.root} already holds {kind}")
    with write_lock(layout.lock, timeout=10.0):
        if layout.manifest.exists():
            raise StoreError(f"a store is made in a missing or empty folder; {layout.root} already holds a store")
        create_catalogue(layout, manifest.dumps())
        write_atomic(layout.manifest, manifest.dumps().encode("utf-8"), layout.temporary)


def make_ready(layout: Layout, catalogue: Catalogue, manifest: Manifest) -> None:
    """Check a store's catalogue, and bring an older one up to date.

    Raises:
        StoreCorrupt: it is damaged, or the manifest is not the one that the store was made with.
        StoreMismatch: a newer engine made it.
    """
    catalogue.check()
    with catalogue.errors():
        if not is_latest(catalogue.connection, str(layout.catalogue)):
            with write_lock(layout.lock, timeout=10.0):
                create_catalogue(layout)
        kept = kept_manifest(catalogue.connection)
    try:
        if kept is not None:
            manifest.check(Manifest.from_json(json.loads(kept)), layout.root)
    except (StoreMismatch, ValueError, TypeError) as error:
        raise StoreCorrupt(
            f"{layout.manifest} is not the one that the store was made with, of which the catalogue "
            f"keeps a copy ({error}); `lloco verify --repair` puts it back"
        ) from error


def create_catalogue(layout: Layout, manifest: str | None = None) -> None:
    """Make an empty catalogue, or bring an older one up to date. The caller holds the write lock.

    Args:
        layout: of the store.
        manifest: the text of its manifest, of which the catalogue keeps a copy; None takes the file's.

    Raises:
        StoreFull: no room; a catalogue that was there is as it was.
    """
    with explained(layout.catalogue):
        connection = connect(layout.catalogue)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            migrate(connection, str(layout.catalogue))
            (kept,) = connection.execute("SELECT manifest FROM sealed").fetchone() or ("",)
            if kept is None:
                if manifest is None:
                    with suppress(OSError, UnicodeDecodeError):
                        manifest = layout.manifest.read_text(encoding="utf-8")
                if manifest is not None:
                    keep_manifest(connection, manifest)
        finally:
            connection.close()
