"""Files of a store: where they lie, and how one is written so that it is wholly there or not at all."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lloco_engine.errors import NotInStore, StoreError, StoreFull
from lloco_engine.store.lock import CLAIM, FULL, is_claimed, is_locked

__all__ = ["Layout", "check_segment_id", "flush_folder", "write_atomic"]

_SEGMENT_ID = re.compile(r"[0-9a-f]{32}")


def check_segment_id(segment_id: str) -> str:
    """Return ``segment_id``, which becomes part of a path, if it can be one.

    Raises:
        NotInStore: it is not 32 lowercase hex digits.
    """
    if not isinstance(segment_id, str) or not _SEGMENT_ID.fullmatch(segment_id):
        raise NotInStore(f"a segment id is 32 lowercase hex digits, not {segment_id!r}")
    return segment_id


class Layout:
    """Paths inside the folder of a store. No name comes from a document: segment ids are hex digits only."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.manifest = self.root / "manifest.json"
        self.catalogue = self.root / "catalogue.sqlite"
        self.segments = self.root / "segments"
        self._segments = str(self.segments)
        self.index = self.root / "index"
        self.adapters = self.root / "adapters"
        self.temporary = self.root / "tmp"
        self.reserve = self.root / "reserve"
        self.lock = self.root / "write.lock"

    def segment(self, segment_id: str) -> Path:
        """File of a segment; `NotInStore` when the id is not one."""
        return Path(self.segment_name(segment_id))

    def segment_name(self, segment_id: str) -> str:
        """The same as text, for what opens many: a `Path` takes as long to make as its file to open."""
        check_segment_id(segment_id)
        return f"{self._segments}/{segment_id[:2]}/{segment_id}.safetensors"

    def index_file(self, generation: int) -> Path:
        """File of one generation of the search index."""
        return self.index / f"{generation}.faiss"

    def segment_files(self) -> Iterator[Path]:
        """Every file under ``segments/``, in order of name."""
        if self.segments.is_dir():
            yield from (path for path in sorted(self.segments.rglob("*")) if path.is_file())

    def relative(self, path: Path) -> str:
        """``path`` as messages and `Problem` show it."""
        return path.relative_to(self.root).as_posix()

    def is_at_work(self) -> bool:
        """Whether somebody writes, or makes segments."""
        claims = self.temporary.glob(f"*{CLAIM}") if self.temporary.is_dir() else ()
        return is_locked(self.lock) or any(map(is_claimed, claims))

    def clear_temporary(self) -> None:
        """Remove what a killed writer left half written. Only the holder of the write lock may."""
        with suppress(FileNotFoundError):
            for path in self.temporary.iterdir():
                if path.suffix != CLAIM or not is_claimed(path):
                    path.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes | memoryview, temporary: Path) -> None:
    """Write ``data`` to ``path`` by way of a file in ``temporary`` (same file system), flushed to disk.

    Raises:
        StoreFull: no room; ``path`` is as it was and the temporary file is gone.
        StoreError: any other refusal of the file system.
    """
    draft = temporary / f"{path.name}.{secrets.token_hex(4)}"
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(draft, data)
        os.replace(draft, path)
        flush_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        if error.errno in FULL:
            raise StoreFull(
                f"no room to write {len(data)} bytes to {path} ({error.strerror}); the store is as it was: free space"
            ) from error
        raise StoreError(f"cannot write {path}: {error.strerror}") from error
    except BaseException:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def _write(path: Path, data: bytes | memoryview) -> None:
    with open(path, "xb", buffering=0) as file:
        view = memoryview(data)
        while view:  # a nearly full disk takes part of a write before it refuses the rest
            view = view[file.write(view) :]
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """See that the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
