"""The write lock: one writer per store, among threads and processes; and claims on work that one should do.

Both are locks of `filelock` on an open file, which the kernel lets go of when the process ends, however it ends. Its
`FileLock`, which opens the file too, takes 0.4 ms of processor time a lock, and ingest takes three for a document.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import lock_descriptor

from lloco_engine.atomic import FULL
from lloco_engine.errors import StoreError, StoreFull, StoreLocked

__all__ = ["CLAIM", "claim", "is_held", "write_lock"]

CLAIM = ".claim"  # the suffix of files that `claim` makes
_POLL_S = 0.02
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC


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
    try:
        handle = os.open(path, _FLAGS, 0o666)
    except OSError as error:
        raise _refused(path, error) from error
    try:
        deadline = time.monotonic() + timeout
        while not _locked(handle, path):
            if time.monotonic() >= deadline:
                holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
                raise StoreLocked(
                    f"another writer holds {path} (process {holder}); waited {timeout:g} s: "
                    "wait until it is done, or raise the timeout"
                )
            time.sleep(min(_POLL_S, max(0.0, deadline - time.monotonic())))
        _sign(handle)
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
            handle = os.open(path, _FLAGS, 0o666)
            lock_descriptor(handle, poll_interval=_POLL_S)
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


def _locked(handle: int, path: Path) -> bool:
    try:
        return lock_descriptor(handle, blocking=False)
    except OSError as error:  # a file system without such locks
        raise _refused(path, error) from error


def _sign(handle: int) -> None:
    """Write who holds a lock, where that is another process than the last one: to cut a file takes milliseconds."""
    name = str(os.getpid()).encode("ascii")
    with suppress(OSError):  # a full disk: the lock is held all the same
        if os.pread(handle, 32, 0) != name:
            os.ftruncate(handle, 0)
            os.pwrite(handle, name, 0)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _refused(path: Path, error: OSError) -> StoreError:
    if error.errno in FULL:
        return StoreFull(f"no room to make {path} ({error.strerror}): free space")
    return StoreError(
        f"a store is changed only by who may write to its folder, and {path} cannot be written ({error.strerror}): "
        "give this user write permission, mount the folder writable, or copy the store and change the copy"
    )
