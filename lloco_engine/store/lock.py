"""The write lock: one writer per store, among threads and processes."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lloco_engine.errors import StoreLocked

__all__ = ["write_lock"]

_POLL_S = 0.02


@contextmanager
def write_lock(path: Path, timeout: float) -> Iterator[None]:
    """Hold the lock file ``path``; the kernel lets go of it when the process ends, however it ends.

    Args:
        path: the lock file, made if missing. It holds the process id of the latest holder.
        timeout: seconds to wait for another holder.

    Raises:
        StoreLocked: another writer still holds it; names its process id.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        deadline = time.monotonic() + timeout
        while not _try_lock(handle):
            if time.monotonic() >= deadline:
                holder = path.read_text(encoding="ascii", errors="replace").strip() or "unknown"
                raise StoreLocked(
                    f"another writer holds {path} (process {holder}); waited {timeout:g} s: "
                    "wait until it is done, or raise the timeout"
                )
            time.sleep(min(_POLL_S, max(0.0, deadline - time.monotonic())))
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode("ascii"), 0)
        yield
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
