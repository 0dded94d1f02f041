"""Files of a store: where they lie, and how one is written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lloco_engine import atomic
from lloco_engine.errors import NotInStore, StoreError, StoreFull
from lloco_engine.store.lock import CLAIM, is_held

__all__ = ["Layout", "check_segment_id", "segment_name", "write_atomic"]

_SEGMENT_ID = re.compile(r"[0-9a-f]{32}")


def check_segment_id(segment_id: str) -> str:
    """Return ``segment_id``, which becomes part of a path, if it can be one.

    Raises:
        NotInStore: it is not 32 lowercase hex digits.
    """
    if not isinstance(segment_id, str) or not _SEGMENT_ID.fullmatch(segment_id):
        raise NotInStore(f"a segment id is 32 lowercase hex digits, not {segment_id!r}")
    return segment_id


def segment_name(folder: str, segment_id: str) -> str:
    """Path of a segment's file in a folder of such, as text: a `Path` takes as long to make as the file to open.

    Raises:
        NotInStore: the id is not one.
    """
    return f"{folder}/{check_segment_id(segment_id)[:2]}/{segment_id}.safetensors"


class Layout:
    """Paths inside the folder of a store. No name comes from a document: segment ids are hex digits only.

    Raises:
        StoreError: the folder's name is none that the system can have.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        try:
            sound = b"\0" not in os.fsencode(self.root)
        except UnicodeEncodeError:
            sound = False
        if not sound:
            raise StoreError(f"a store's folder must have a name without NUL and lone surrogates, not {root!a}")
        self.manifest = self.root / "manifest.json"
        self.catalogue = self.root / "catalogue.sqlite"
        self.segments = self.root / "segments"
        self.index = self.root / "index"
        self.adapters = self.root / "adapters"
        self.temporary = self.root / "tmp"
        self.reserve = self.root / "reserve"
        self.lock = self.root / "write.lock"

    def segment(self, segment_id: str) -> Path:
        """File of a segment; `NotInStore` when the id is not one."""
        return Path(segment_name(str(self.segments), segment_id))

    def index_file(self, generation: int) -> Path:
        """File of one generation of the search index."""
        return self.index / f"{generation}.faiss"

    def segment_files(self) -> Iterator[Path]:
        """Every file under ``segments/``, in order of name."""
        if self.segments.is_dir():
            yield from (path for path in sorted(self.segments.rglob("*")) if path.is_file())

    def sizes(self) -> dict[str, int]:
        """Bytes of the catalogue and of the search index on disk."""
        catalogue = (Path(f"{self.catalogue}{suffix}") for suffix in ("", "-wal"))
        return {"catalogue": sum(map(_size, catalogue)), "index": sum(map(_size, self.index.glob("*.faiss")))}

    def relative(self, path: Path) -> str:
        """``path`` as messages and `Problem` show it."""
        return path.relative_to(self.root).as_posix()

    def is_at_work(self) -> bool:
        """Whether somebody writes, or makes segments."""
        claims = self.temporary.glob(f"*{CLAIM}") if self.temporary.is_dir() else ()
        return any(map(is_held, (self.lock, *claims)))

    def clear_temporary(self) -> None:
        """Remove what a killed writer left half written. Only the holder of the write lock may."""
        with suppress(FileNotFoundError):
            for path in self.temporary.iterdir():
                if path.suffix != CLAIM or not is_held(path):
                    path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def write_atomic(path: Path, data: bytes | memoryview, temporary: Path) -> None:
    """Write ``data`` to ``path`` by way of a file in ``temporary`` (same file system), flushed to disk.

    Raises:
        StoreFull: no room; ``path`` is as it was and the temporary file is gone.
        StoreError: any other refusal of the file system.
    """
    try:
        atomic.write_file(path, data, temporary)
    except OSError as error:
        if error.errno in atomic.FULL:
            raise StoreFull(
                f"no room to write {len(data)} bytes to {path} ({error.strerror}); the store is as it was: free space"
            ) from error
        raise StoreError(f"cannot write {path}: {error.strerror}") from error
