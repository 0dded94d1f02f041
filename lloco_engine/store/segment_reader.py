"""The segments of a store for a process that only reads them, such as a server beside the engine: no catalogue."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lloco_engine.errors import StoreMismatch
from lloco_engine.fingerprints import agree, model_fingerprint
from lloco_engine.store.files import Layout
from lloco_engine.store.manifest import Manifest
from lloco_engine.store.segments import SegmentFiles
from lloco_engine.types import AnySegment

__all__ = ["SegmentReader"]


class SegmentReader:
    """Reads segments by id from a store's folder, which may be on a file system that other machines write to.

    Segment files never change, and their names are hashes: nothing is locked, and catalogue and index are not opened.
    Threads may share one.

    Args:
        store: the store's folder.

    Raises:
        StoreCorrupt: it has no readable manifest.
        StoreMismatch: a newer engine wrote it.
    """

    def __init__(self, store: str | Path) -> None:
        self._layout = Layout(store)
        self._manifest = Manifest.load(self._layout.manifest)
        self._files = SegmentFiles.of(self._layout, self._manifest.form)

    @property
    def manifest(self) -> Mapping[str, Any]:
        """What the store was made with, as ``manifest.json`` has it."""
        return self._manifest.to_json()

    def read(self, segment_id: str) -> AnySegment:
        """A segment on the CPU, every byte of its file compared with its checksum.

        Args:
            segment_id: 32 lowercase hex digits.

        Raises:
            NotInStore: the id is none.
            SegmentUnavailable: the file is missing, cut short, damaged, or another segment's.
        """
        return self._files.read(segment_id)

    def check_decoder(self, folder: str | Path) -> None:
        """Compare a decoder's folder with the decoder that the segments were made for.

        Raises:
            StoreMismatch: it is another one; has both fingerprints.
            ModelNotFound: there is no decoder in the folder.
        """
        made_for, given = self._manifest.decoder_fingerprint, model_fingerprint(folder)
        if not agree(made_for, given):
            raise StoreMismatch(
                f"the decoder at {folder} must be the one that the segments of {self._layout.root} were made for, "
                f"{made_for} ({self._manifest.decoder!r}), not {given}: serve that one, or make another store"
            )
