"""Async twins of methods: the same call, with the same signature, in a thread."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from lloco_engine.errors import LLoCOError

__all__ = ["in_thread"]

_Self = TypeVar("_Self")
_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def in_thread(
    method: Callable[Concatenate[_Self, _Given], _Result], more: str = ""
) -> Callable[Concatenate[_Self, _Given], Coroutine[Any, Any, _Result]]:
    """A method that awaits another in a thread.

    Where the other takes ``progress``, that is called in the thread, and cancelling stops the work at its next call.

    Args:
        method: what is awaited, and whose signature the twin has.
        more: what else its docstring says.
    """
    name = method.__name__
    watched = "progress" in inspect.signature(method).parameters

    @wraps(method)
    async def twin(self: _Self, /, *args: _Given.args, **options: _Given.kwargs) -> _Result:
        cancelled = threading.Event()
        if watched:
            options["progress"] = _until(cancelled, name, options.get("progress"))
        call: Callable[_Given, _Result] = getattr(self, name)
        try:
            return await asyncio.to_thread(call, *args, **options)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    twin.__name__ = f"a{name}"
    twin.__qualname__ = f"{method.__qualname__.rpartition('.')[0]}.a{name}"
    twin.__doc__ = f"`{name}` in a thread{more}."
    return twin


def _until(cancelled: threading.Event, name: str, progress: Any) -> Callable[[Any], None]:
    """A callback that ends the work once nobody waits for it, and else hands on."""

    def watch(state: Any) -> None:
        if cancelled.is_set():
            raise LLoCOError(f"the {name} was cancelled; the same call goes on from here")
        if progress is not None:
            progress(state)

    return watch
