"""Which files a path stands for: itself, or everything readable below a folder, in a fixed order."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lloco_engine.documents import origin_of, printable
from lloco_engine.errors import DocumentError
from lloco_engine.types import Failure

__all__ = ["Found", "find_files", "open_file"]


@dataclass(frozen=True)
class Found:
    """A file to read.

    ``doc_id`` is what its place below the folder makes of it; ``origin`` its resolved path, as `origin_of` writes it;
    ``linked`` tells a file with several names (hard links) by its device and number, and is None for any other;
    ``size`` is in bytes.
    """

    path: Path
    doc_id: str
    origin: str
    linked: tuple[int, int] | None = None
    size: int = 0


def find_files(root: Path, suffixes: Collection[str], skipped: Counter[str]) -> Iterator[Found | Failure]:
    """The files that ``root`` stands for.

    A file given by name counts whatever it is called (its suffix is judged by the reader). Below a folder, hidden
    files, other suffixes, links to folders, links that leave the folder and special files are skipped and counted in
    ``skipped``; what cannot be looked at is a Failure. Sorted by name at every level, links to files after the files.
    """
    try:
        state = os.stat(root)
        real = Path(os.path.realpath(root))
        if stat.S_ISDIR(state.st_mode):
            yield from _below(root, real, suffixes, skipped)
        elif stat.S_ISREG(state.st_mode):
            name = real.name if root.name in ("", "..") else root.name
            yield Found(root, name, origin_of(real), _linked(state), state.st_size)
        else:
            yield Failure(printable(root), "a source must be a regular file or a folder, and this is neither")
    except (OSError, ValueError) as error:
        yield Failure(printable(root), _why(root, error))


def _below(root: Path, real: Path, suffixes: Collection[str], skipped: Counter[str]) -> Iterator[Found | Failure]:
    links: list[Path] = []
    waiting = [root]
    while waiting:  # and no recursion, for folders may lie deeper in each other than calls may
        path = waiting.pop()
        try:
            state = os.stat(path) if path is root else os.lstat(path)
            if stat.S_ISDIR(state.st_mode):
                names = sorted(os.listdir(path), reverse=True)
                waiting += [path / name for name in names if not name.startswith(".")]
                if hidden := sum(name.startswith(".") for name in names):
                    skipped["hidden"] += hidden
            elif stat.S_ISLNK(state.st_mode):
                links.append(path)
            elif path.suffix.lower() not in suffixes:
                skipped[path.suffix.lower() or "no suffix"] += 1
            elif not stat.S_ISREG(state.st_mode):
                skipped["special file"] += 1
            else:
                place = path.relative_to(root)
                yield Found(path, place.as_posix(), origin_of(real / place), _linked(state), state.st_size)
        except (OSError, ValueError) as error:
            yield Failure(printable(path), _why(path, error))
    yield from _behind(links, root, real, suffixes, skipped)


def _behind(
    links: list[Path], root: Path, real: Path, suffixes: Collection[str], skipped: Counter[str]
) -> Iterator[Found | Failure]:
    """The files that links below a folder point to, where they lie in it."""
    for path in links:
        try:
            target = path.resolve(strict=True)
            state = os.stat(target)
        except (OSError, RuntimeError, ValueError) as error:  # Python before 3.13 reports loops as RuntimeError
            yield Failure(printable(path), _why(path, error))
            continue
        if not target.is_relative_to(real):
            skipped["link that leaves the folder"] += 1
        elif stat.S_ISDIR(state.st_mode):
            skipped["link to a folder"] += 1
        elif path.suffix.lower() not in suffixes:
            skipped[path.suffix.lower() or "no suffix"] += 1
        elif not stat.S_ISREG(state.st_mode):
            skipped["special file"] += 1
        else:
            place = path.relative_to(root).as_posix()
            yield Found(path, place, origin_of(target), _linked(state), state.st_size)


def open_file(path: Path) -> BinaryIO:
    """Open a file that is read to its end: a regular one, even where something else has taken its place since.

    Raises:
        DocumentError: it is a pipe, a device or the like, which might never end; it is not waited for.
        OSError: it cannot be opened.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise DocumentError("a source must be a regular file, and this is none")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _linked(state: os.stat_result) -> tuple[int, int] | None:
    return (state.st_dev, state.st_ino) if state.st_nlink > 1 else None


def _why(path: Path, error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return f"a path must be valid Unicode, and character {error.start} of this one is a lone surrogate"
    if isinstance(error, ValueError):
        return f"a path must be one that the system can open, and this is not: {error}"
    if os.path.islink(path):
        return "the link is broken: what it points to does not exist"
    if isinstance(error, FileNotFoundError):
        return "no such file or folder"
    return f"cannot be read: {getattr(error, 'strerror', None) or error}"
