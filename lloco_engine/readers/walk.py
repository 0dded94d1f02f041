"""Which files a path stands for: itself, or everything readable below a folder, in a fixed order."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from lloco_engine.types import Failure

__all__ = ["Found", "find_files"]


@dataclass(frozen=True)
class Found:
    """A file to read, and the document id that its place gives it."""

    path: Path
    doc_id: str


def find_files(root: Path, suffixes: Collection[str], skipped: Counter[str]) -> Iterator[Found | Failure]:
    """The files that ``root`` stands for.

    A file given by name counts whatever it is called (its suffix is judged by the reader). Below a folder, hidden
    files, other suffixes, links to folders, links that leave the folder and special files are skipped and counted in
    ``skipped``; a broken link or a folder that cannot be listed is a Failure. Sorted by name at every level.
    """
    try:
        mode = root.stat().st_mode
    except OSError as error:
        yield Failure(printable(root), _why(root, error))
        return
    if stat.S_ISDIR(mode):
        yield from _below(root, root, suffixes, skipped)
    elif stat.S_ISREG(mode):
        yield Found(root, root.resolve().name if root.name in ("", "..") else root.name)
    else:
        yield Failure(printable(root), "a source must be a regular file or a folder, and this is neither")


def _below(folder: Path, root: Path, suffixes: Collection[str], skipped: Counter[str]) -> Iterator[Found | Failure]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        yield Failure(printable(folder), _why(folder, error))
        return
    for name in names:
        path = folder / name
        if name.startswith("."):
            skipped["hidden"] += 1
            continue
        if path.is_symlink() and (verdict := _judge_link(path, root)):
            if isinstance(verdict, Failure):
                yield verdict
            else:
                skipped[verdict] += 1
            continue
        if path.is_dir():
            yield from _below(path, root, suffixes, skipped)
        elif path.suffix.lower() not in suffixes:
            skipped[path.suffix.lower() or "no suffix"] += 1
        elif not path.is_file():
            skipped["special file"] += 1
        else:
            yield Found(path, path.relative_to(root).as_posix())


def _judge_link(path: Path, root: Path) -> Failure | str | None:
    """Why a link below a folder is not followed; None when it is."""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # Python 3.11 and 3.12 report a loop of links as RuntimeError
        return Failure(printable(path), "the link is broken: what it points to does not exist")
    if not target.is_relative_to(root.resolve()):
        return "link that leaves the folder"
    return "link to a folder" if target.is_dir() else None


def printable(path: Path) -> str:
    """A path as text that any output can take, bytes that are not UTF-8 shown as ``\\udcXX``."""
    return path.as_posix().encode("utf-8", "backslashreplace").decode("utf-8")


def _why(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "the link is broken: what it points to does not exist" if path.is_symlink() else "no such file or folder"
    return f"cannot be read: {error.strerror or error}"
