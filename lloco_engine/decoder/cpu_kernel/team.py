"""Compiled functions run by the threads that torch keeps.

torch's threads wait for their next task by spinning, so a second pool beside them (numba's own) would fight for the
cores: attention took a third longer. On Linux torch's pool is GNU OpenMP's, which takes a function by its address;
elsewhere the calling thread does all parts.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from llvmlite import binding
from numba import cfunc, njit, types

__all__ = ["Task", "can_keep", "number", "renew", "size", "threads", "wait"]

# of OpenMP, for compiled functions: this thread's number in its team, the team's size, and waiting until all are here
number: Any = types.ExternalFunction("lloco_team_number", types.int32())
size: Any = types.ExternalFunction("lloco_team_size", types.int32())
wait: Any = types.ExternalFunction("lloco_team_wait", types.void())


def _number_of_one() -> int:
    return 0


def _size_of_one() -> int:
    return 1


def _wait_for_none() -> None:
    pass


@cache
def _of_one() -> list[Any]:
    """What stands for `number`, `size` and `wait` without OpenMP, held here: all that is known of it are addresses."""
    numbers = [cfunc(types.int32())(function) for function in (_number_of_one, _size_of_one)]
    return [*numbers, cfunc(types.void())(_wait_for_none)]


@cache
def _openmp() -> Any:
    """torch's OpenMP, or None; what `number`, `size` and `wait` stand for is settled here, once."""
    try:
        library: Any = ctypes.CDLL("libgomp.so.1")  # the name finds the copy that torch has loaded
        functions = library.omp_get_thread_num, library.omp_get_num_threads, library.GOMP_barrier
        addresses = [ctypes.cast(function, ctypes.c_void_p).value for function in functions]
        library.GOMP_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        library.GOMP_parallel.restype = None
    except (OSError, AttributeError):
        library, addresses = None, [each.address for each in _of_one()]
    for name, address in zip(("lloco_team_number", "lloco_team_size", "lloco_team_wait"), addresses, strict=True):
        binding.add_symbol(name, address)
    return library


@cache
def can_keep() -> bool:
    """Whether numba has a folder to keep what it compiles: beside the code, or in the user's cache folder."""
    try:
        njit(cache=True)(_number_of_one)
    except RuntimeError:
        return False
    return True


def renew(file: str, *others: str) -> None:
    """Have what numba keeps of a file compiled anew where another that it is made of has changed since.

    By itself numba looks at the file of each function alone, and not at those of what is compiled into it.
    """
    if max(os.stat(other).st_mtime for other in others) > os.stat(file).st_mtime:
        with suppress(OSError):  # where files cannot be changed none has been
            os.utime(file)


def threads() -> int:
    """How many threads may take part in a task."""
    return torch.get_num_threads() if _openmp() is not None else 1


class Task:
    """A function of one address, compiled.

    It does the share of the work that `number` and `size` say: a team may be smaller than was asked for.

    Args:
        function: of the module's top level, so that numba can keep what it compiles.
    """

    def __init__(self, function: Callable[[Any], None]) -> None:
        self._openmp = _openmp()
        self._compiled: Any = cfunc(types.void(types.voidptr), cache=can_keep())(function)
        self._address = self._compiled.address
        self._alone = self._compiled.ctypes

    def __call__(self, call: ctypes.Structure, threads: int) -> None:
        """Run it on a call's address, by a team of so many threads at most; other Python threads go on."""
        if threads > 1 and self._openmp is not None:
            self._openmp.GOMP_parallel(self._address, ctypes.addressof(call), threads, 0)
        else:
            self._alone(ctypes.addressof(call))
