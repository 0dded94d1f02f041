"""The write lock: one writer per store, among threads and processes; and claims on work that one should do."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lloco_engine.errors import StoreError, StoreFull, StoreLocked

__all__ = ["CLAIM", "FULL", "claim", "is_claimed", "is_locked", "write_lock"]

CLAIM = ".claim"  # the suffix of files that `claim` makes
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a full disk says
_POLL_S = 0.02


@contextmanager
def write_lock(path: Path, timeout: float) -> Iterator[None]:
    """Hold the lock file ``path``; the kernel lets go of it when the process ends, however it ends.

    Args:
        path: the lock file, made if missing. It holds the process id of the latest holder.
        timeout: seconds to wait for another holder.

    Raises:
        StoreLocked: another writer still holds it; names its process id.
        StoreError: this process may not write there.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in FULL:
            raise StoreFull(f"no room to make {path} ({error.strerror}): free space") from error
        raise StoreError(
            f"a store is changed only by who may write to its folder, and {path} cannot be written ({error.strerror}): "
            "give this user write permission, mount the folder writable, or copy the store and change the copy"
        ) from error
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
        with suppress(OSError):  # a full disk: the lock is held all the same
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode("ascii"), 0)
        yield
    finally:
        os.close(handle)


@contextmanager
def claim(path: Path) -> Iterator[None]:
    """Hold a file made for the purpose, which is removed at the end; waits for another holder as long as it lives.

    Where no file can be made or locked the block runs all the same.
    """
    handle = None
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        while handle is None:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            while not _try_lock(handle):
                time.sleep(_POLL_S)
            if not _is_at(handle, path):  # the one who held it has removed it: others may hold a new one
                os.close(handle)
                handle = None
    try:
        yield
    finally:
        if handle is not None:
            with suppress(OSError):
                path.unlink()
            os.close(handle)


def is_claimed(path: Path) -> bool:
    """Whether somebody holds this claim now."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _try_lock(handle)
    finally:
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock file ``path`` now."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
