"""How a ratio of two times is taken, and what has to be held still meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

__all__ = ["forget_files", "median_ratio", "seconds"]


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def median_ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """The median of second over first; each pair was measured one after the other."""
    return median(second / first for first, second in pairs)


def forget_files(folder: Path) -> bool:
    """Ask the system to drop a folder's segment files from its page cache; False where it cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in folder.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return True
