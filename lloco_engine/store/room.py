"""Room on a full disk for what makes room: a reserve, and the search index, which can be made again."""

from __future__ import annotations

import os
from contextlib import suppress

from lloco_engine.store.files import Layout
from lloco_engine.store.index import remove_index_files

__all__ = ["keep_reserve", "make_room", "spend_reserve"]

_BYTES = 2**20  # of log for removing a document; a large one needs what the index takes besides
_TO_OPEN = 2**17


def keep_reserve(layout: Layout) -> None:
    """See that the reserve is there, if the disk has so much. For the holder of the write lock."""
    with suppress(OSError):
        if layout.reserve.exists() and layout.reserve.stat().st_size == _BYTES:
            return
        had = layout.reserve.exists()
        try:
            with layout.reserve.open("ab") as file:
                file.write(bytes(_BYTES - file.tell()))
        except OSError:
            if not had:
                layout.reserve.unlink()


def spend_reserve(layout: Layout) -> bool:
    """Give up a little of the reserve, for what is needed to open a store; whether there was so much."""
    try:
        left = layout.reserve.stat().st_size - _TO_OPEN
        if left > 0:
            os.truncate(layout.reserve, left)
        return left > 0
    except OSError:
        return False


def make_room(layout: Layout) -> bool:
    """Give up the reserve and the index on disk; whether there was anything. For the holder of the write lock."""
    freed = layout.reserve.exists()
    with suppress(OSError):
        layout.reserve.unlink()
    with suppress(OSError):
        freed = any(layout.index.iterdir()) or freed
        remove_index_files(layout)
    return freed
