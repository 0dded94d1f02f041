"""A new adapter's folder: there as a whole, or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lloco_engine.errors import LLoCOError

__all__ = ["new_folder"]


@contextmanager
def new_folder(target: Path, hint: str = "nothing was left behind") -> Iterator[Path]:
    """A draft beside ``target`` to fill with files, which are flushed to disk before it takes the name.

    Args:
        target: the folder, which must not exist.
        hint: end of the error's message.

    Raises:
        LLoCOError: the file system refuses.
    """
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        draft.mkdir(parents=True)
        yield draft
        for file in draft.iterdir():
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        os.replace(draft, target)
    except OSError as error:
        raise LLoCOError(f"the adapter could not be written to {target}: {error.strerror}; {hint}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
