"""What a process is to the engine: locks that know theirs, and memory that goes back.

What was opened before a fork is not used after it, for it would wait for ever. A forked child has a copy of the memory
and none of the threads. A lock that another thread held stays held in it, and OpenMP and SQLite go on with what their
threads and locks in the parent know.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from typing import Self

from lloco_engine.errors import WrongProcess

__all__ = ["ProcessLock", "give_back_memory"]


def give_back_memory() -> None:
    """Let the system have what was freed: glibc keeps it otherwise, in pieces between what is still used."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


class ProcessLock:
    """A reentrant lock, a context manager, that refuses to be taken in a process forked from the one that made it.

    Args:
        owner: what it belongs to, for the message.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._process = os.getpid()
        self._lock = threading.RLock()

    @property
    def here(self) -> bool:
        """Whether this is the process that made it."""
        return self._process == os.getpid()

    def check(self) -> None:
        """Refuse another process.

        Raises:
            WrongProcess: this process was forked after the lock was made.
        """
        if not self.here:
            raise WrongProcess(
                f"{self._owner} is used by the process that opened it ({self._process}), not by one forked from it "
                f"later ({os.getpid()}): open it in each process, after the fork, or start processes by 'spawn'"
            )

    def __enter__(self) -> Self:
        self.check()
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()
