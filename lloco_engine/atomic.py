"""Files and folders that are there wholly or not at all: nothing else in these packages gives a file its name.

A draft is written beside the target, or in a folder of the same file system, and flushed to the disk; then it takes the
target's name, and the folder that has the name is flushed too. A process that is killed leaves a draft at most, whose
name begins with a dot and the target's. What the file system refuses is an `OSError`, which callers say in their words.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

__all__ = ["FULL", "flush_folder", "move", "new_file", "new_folder", "open_file", "write_file"]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a full disk says


def write_file(path: Path, data: bytes | memoryview | str, temporary: Path | None = None) -> None:
    """Write a file; one that is there stays as it was until the new one is whole.

    Args:
        path: where; its folder is made if it is missing.
        data: its content; text is written as UTF-8.
        temporary: folder of the draft; None is that of ``path``.
    """
    with new_file(path, temporary) as draft:
        _write(draft, data.encode("utf-8") if isinstance(data, str) else data)


@contextmanager
def open_file(path: Path) -> Iterator[TextIO]:
    """`write_file` for text that is made bit by bit: what is written in the block is there when it ends well."""
    with new_file(path) as draft, draft.open("x", encoding="utf-8", newline="\n") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill with files, which takes the name of ``target`` when the block ends well.

    Its files can then be read by whoever may read the folder, however they were written.

    Args:
        target: must not exist when the block ends, or be an empty folder.
    """
    draft = _beside(target)
    try:
        draft.mkdir(parents=True)
        yield draft
        mode = draft.stat().st_mode & 0o666
        for file in [path for path in draft.rglob("*") if path.is_file()]:
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
            file.chmod(mode)
        flush_folder(draft)
        move(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def move(path: Path, target: Path) -> None:
    """Give a file or folder another name, in place of the file or the empty folder that had it."""
    os.replace(path, target)
    flush_folder(target.parent)


def flush_folder(folder: Path) -> None:
    """See that the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_file(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Where to write a file, which takes its name when the block ends well; whoever writes it flushes it.

    Args:
        path: its name; the folder is made if it is missing.
        temporary: folder of the draft; None is that of ``path``.
    """
    draft = _beside(path) if temporary is None else temporary / _beside(path).name
    draft.parent.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield draft
        move(draft, path)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def _write(path: Path, data: bytes | memoryview) -> None:
    with open(path, "xb", buffering=0) as file:
        view = memoryview(data)
        while view:  # a nearly full disk takes part of a write before it refuses the rest
            view = view[file.write(view) :]
        os.fsync(file.fileno())
