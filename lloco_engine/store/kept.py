"""The catalogue's connection for those who write, kept from one writer to the next."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lloco_engine.errors import StoreError
from lloco_engine.store.catalogue import Catalogue

__all__ = ["KeptCatalogue"]


class KeptCatalogue:
    """Gives a catalogue to one writer at a time, the same one as long as it is of the same file with the same tables.

    To connect, and to make the triggers that note what changes, takes as long as to put a small document.

    Args:
        path: of the catalogue.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._kept: tuple[Catalogue, tuple[int, ...]] | None = None
        self._closed = False

    @contextmanager
    def open(self) -> Iterator[Catalogue]:
        """The catalogue, for the holder of the write lock. One that an error came out of is not kept."""
        catalogue = self._taken() or Catalogue(self._path)
        try:
            yield catalogue
        except BaseException:
            catalogue.close()
            raise
        with suppress(StoreError), self._lock:
            if not self._closed:
                self._kept = catalogue, catalogue.file_and_tables()
                return
        catalogue.close()

    def close(self) -> None:
        """Let go of the file, now or when the writer of the moment has done."""
        with self._lock:
            self._closed = True
            kept, self._kept = self._kept, None
        if kept is not None:
            kept[0].close()

    def _taken(self) -> Catalogue | None:
        with self._lock:
            kept, self._kept = self._kept, None
        if kept is None:
            return None
        catalogue, state = kept
        with suppress(StoreError):
            if catalogue.file_and_tables() == state:
                return catalogue
        catalogue.close()
        return None
