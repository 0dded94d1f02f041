"""Segments that were read and checked, kept in memory for as long as their files stay as they were."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from lloco_engine.store.segments import SegmentFiles
from lloco_engine.types import AnySegment

if TYPE_CHECKING:
    import torch

__all__ = ["HeldSegments"]

_MOST_BYTES = 128 * 2**20  # a source of 128,000 tokens at the default ratio of whole documents takes 102 MB


class HeldSegments:
    """The segments used last, up to a number of bytes. Safe for use from several threads.

    What is used is a private copy whose checksum was right, so nothing that becomes of a file changes an answer
    unseen: a file that is another one than before, by its number, size or times, is read and checked anew.
    """

    def __init__(self, files: SegmentFiles, most_bytes: int = _MOST_BYTES) -> None:
        self._files = files
        self._most = most_bytes
        self._bytes = 0
        self._lock = threading.Lock()
        self._held: OrderedDict[str, tuple[tuple[int, ...], AnySegment, int]] = OrderedDict()

    def read(self, segment_id: str) -> AnySegment:
        """A segment, read and checked now or earlier; shared with others, so its tensors must not be written to.

        Raises:
            SegmentUnavailable: missing or damaged.
        """
        identity = _identity(self._files.name(segment_id))
        with self._lock:
            known = self._held.get(segment_id)
            if known is not None and known[0] == identity:
                self._held.move_to_end(segment_id)
                return known[1]
        segment = self._files.read(segment_id)
        if identity is not None:
            self._keep(segment_id, identity, segment)
        return segment

    def sizes(self) -> tuple[int, int]:
        """How many segments are held, and their bytes."""
        with self._lock:
            return len(self._held), self._bytes

    def forget(self) -> None:
        """Hold nothing, so that the next use reads and checks files again."""
        with self._lock:
            self._held.clear()
            self._bytes = 0

    def _keep(self, segment_id: str, identity: tuple[int, ...], segment: AnySegment) -> None:
        size = sum(value.nbytes for value in _tensors(segment))
        with self._lock:
            if segment_id in self._held:
                self._bytes -= self._held.pop(segment_id)[2]
            self._held[segment_id] = (identity, segment, size)
            self._bytes += size
            while self._bytes > self._most:
                self._bytes -= self._held.popitem(last=False)[1][2]


def _tensors(segment: AnySegment) -> list[torch.Tensor]:
    import torch

    return [value for value in vars(segment).values() if isinstance(value, torch.Tensor)]


def _identity(path: str) -> tuple[int, ...] | None:
    """What changes when a file is written to or replaced; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
