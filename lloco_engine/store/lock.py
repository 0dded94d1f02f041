"""The write lock: one writer per store, among threads and processes; and claims on work that one should do.

Both are locks of `filelock` on a file, which the kernel lets go of when the process ends, however it ends.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout, lock_descriptor

from lloco_engine.atomic import FULL
from lloco_engine.errors import StoreError, StoreFull, StoreLocked

__all__ = ["CLAIM", "claim", "is_held", "write_lock"]

CLAIM = ".claim"  # the suffix of files that `claim` makes
_POLL_S = 0.02


@contextmanager
def write_lock(path: Path, timeout: float) -> Iterator[None]:
    """Hold the lock file ``path``.

    Args:
        path: the lock file, made if missing. It holds the process id of the latest holder.
        timeout: seconds to wait for another holder.

    Raises:
        StoreLocked: another writer still holds it; names its process id.
        StoreError: this process may not write there, or the file system has no locks.
    """
    lock = _lock(path)
    try:
        lock.acquire(timeout=max(0.0, timeout), poll_interval=_POLL_S)
    except Timeout as error:
        holder = path.read_text(encoding="ascii", errors="replace").strip() or "unknown"
        raise StoreLocked(
            f"another writer holds {path} (process {holder}); waited {timeout:g} s: "
            "wait until it is done, or raise the timeout"
        ) from error
    except OSError as error:
        if error.errno in FULL:
            raise StoreFull(f"no room to make {path} ({error.strerror}): free space") from error
        raise StoreError(
            f"a store is changed only by who may write to its folder, and {path} cannot be written ({error.strerror}): "
            "give this user write permission, mount the folder writable, or copy the store and change the copy"
        ) from error
    try:
        with suppress(OSError):  # a full disk: the lock is held all the same
            path.write_text(str(os.getpid()), encoding="ascii")
        yield
    finally:
        lock.release()


@contextmanager
def claim(path: Path) -> Iterator[None]:
    """Hold a file made for the purpose, which is removed at the end; waits for another holder as long as it lives.

    Where no file can be made or locked the block runs all the same.
    """
    lock = _lock(path)
    with suppress(OSError):
        lock.acquire(poll_interval=_POLL_S)
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):
                path.unlink()  # while it is held: who waits for it sees that it is gone, and makes a new one
            lock.release()


def is_held(path: Path) -> bool:
    """Whether somebody holds this lock or claim now, or may: where that cannot be told. Writes nothing."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return stat.S_ISREG(os.fstat(handle).st_mode) and not lock_descriptor(handle, blocking=False)
    except OSError:  # a file system without such locks
        return True
    finally:
        os.close(handle)


def _lock(path: Path) -> FileLock:
    """A lock that any thread may let go of, and that is a lock of the kernel or none at all."""
    return FileLock(path, thread_local=False, fallback_to_soft=False)
