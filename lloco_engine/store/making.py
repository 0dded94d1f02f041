"""A store's catalogue made, or brought up to date; and the form of its segments."""

from __future__ import annotations

from contextlib import suppress

from lloco_engine.store import segments
from lloco_engine.store.catalogue import explained
from lloco_engine.store.connecting import connect
from lloco_engine.store.files import Layout
from lloco_engine.store.manifest import Manifest
from lloco_engine.store.schema import migrate
from lloco_engine.store.seals import keep_manifest

__all__ = ["create_catalogue", "segment_format"]


def segment_format(manifest: Manifest) -> segments.AnyFormat:
    """What the segment files of a store have in common."""
    if manifest.memory == "summary":
        return segments.SummaryFormat(manifest.summary_dim, manifest.dtype)
    return segments.SegmentFormat(manifest.layers, manifest.kv_heads, manifest.head_dim, manifest.dtype)


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
