"""A new adapter's folder: there as a whole, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lloco_engine import atomic
from lloco_engine.errors import LLoCOError

__all__ = ["new_folder"]


@contextmanager
def new_folder(target: Path, hint: str = "nothing was left behind") -> Iterator[Path]:
    """`atomic.new_folder` for an adapter.

    Args:
        target: the folder, which must not exist.
        hint: end of the error's message.

    Raises:
        LLoCOError: the file system refuses.
    """
    try:
        with atomic.new_folder(target) as draft:
            yield draft
    except OSError as error:
        raise LLoCOError(f"the adapter could not be written to {target}: {error.strerror}; {hint}") from error
