"""Files of an object store, by way of a folder of this machine that keeps those read last, up to a size.

Files never change under a name, so none is asked for again while it is here. Several processes may share a folder, the
ranks of one server for instance: a file comes in wholly or not at all, and one that another process has removed is
fetched again.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from lloco_engine import atomic

__all__ = ["FileCache"]

_KEPT_S = 60.0  # since its last use, for which no file is removed: somebody may be about to open it
_LESS = 0.9  # of the size that is left when files are removed
_DRAFTS = ".fetched"


class FileCache:
    """Keeps files of a folder at a URL.

    Args:
        url: of a folder, that fsspec knows (``s3://bucket/store``); what it needs to get in is in the environment, as
            that file system says.
        folder: of this machine; made if it is missing.
        most: bytes that its files may take together. Files that were just used stay though they take more.

    Raises:
        ValueError: ``most`` is not positive, or fsspec does not know the URL.
        ImportError: what fsspec needs for the URL is not installed; says what.
    """

    def __init__(self, url: str, folder: Path, most: int) -> None:
        from fsspec.core import url_to_fs

        if most <= 0:
            raise ValueError(f"a cache's size must be above 0 bytes, not {most!r}")
        self._remote: Any
        self._remote, self._base = url_to_fs(url)
        self.url, self.folder, self._most = url, folder, most
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._held = sum(size for _, size, _ in self._files())

    def path(self, name: str, *, again: bool = False) -> Path:
        """A file's copy here.

        Args:
            name: its path under the URL.
            again: fetch it though it is here: the copy turned out to be damaged.

        Raises:
            ValueError: the name leads out of the folder.
            OSError: it is not there, or cannot be fetched.
        """
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or name.startswith("/") or parts[0] == _DRAFTS:
            raise ValueError(f"a file's name must lead into the folder, not {name!r}")
        place = self.folder.joinpath(*parts)
        if not again:
            with suppress(FileNotFoundError):
                os.utime(place)
                return place
        self._fetch(name, place)
        return place

    def _fetch(self, name: str, place: Path) -> None:
        with atomic.new_file(place, self.folder / _DRAFTS) as draft:
            self._remote.get_file(f"{self._base}/{name}", str(draft))
            size = draft.stat().st_size
        with self._lock:
            self._held += size
            if self._held > self._most:
                self._make_room()

    def _make_room(self) -> None:
        """Remove the files that were not used for longest."""
        files = sorted(self._files())
        self._held, recent = sum(size for _, size, _ in files), time.time() - _KEPT_S
        for used, size, path in files:
            if self._held <= self._most * _LESS or used > recent:
                break
            path.unlink(missing_ok=True)
            self._held -= size

    def _files(self) -> list[tuple[float, int, Path]]:
        """When each file was last used, its size, and its place."""
        found = []
        for path in self.folder.rglob("*"):
            with suppress(FileNotFoundError):
                status = path.stat()
                if path.is_file() and _DRAFTS not in path.parts:
                    found.append((status.st_mtime, status.st_size, path))
        return found
