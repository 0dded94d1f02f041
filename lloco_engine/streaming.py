"""Answers while they are being made: a stream to iterate over, and its twin for asyncio."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any, Self

from lloco_engine.errors import LLoCOError
from lloco_engine.types import Answer, Hit

__all__ = ["AnswerStream", "AsyncAnswerStream"]


class AnswerStream:
    """Iterate over it for the answer's text, piece by piece; then `answer` is the whole, with its cost.

    Use it up, or close it (it is a context manager): until then other answers may wait for it a little.

    Args:
        pieces: new text, in order.
        hits: the hits that the answer is made from.
        finish: makes the answer, once the pieces are used up.
    """

    def __init__(self, pieces: Iterator[str], hits: tuple[Hit, ...], finish: Callable[[], Answer]) -> None:
        self._pieces = pieces
        self._finish = finish
        self._ended = False
        self._notes: tuple[str, ...] = ()
        self.hits = hits

    def note(self, warnings: Iterable[str]) -> Self:
        """Put warnings of whoever asked for the answer before its own."""
        self._notes = (*warnings, *self._notes)
        return self

    def then(self, change: Callable[[Answer], Answer]) -> Self:
        """Have the whole answer changed by whoever asked for it."""
        finish = self._finish
        self._finish = lambda: change(finish())
        return self

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration:
            self._ended = True
            raise

    @cached_property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            LLoCOError: the stream has not been read to its end.
        """
        if not self._ended:
            raise LLoCOError("an answer is whole when its stream has been read to the end, and this one has not")
        whole = self._finish()
        return replace(whole, warnings=(*self._notes, *whole.warnings)) if self._notes else whole

    def whole(self) -> Answer:
        """Read to the end, and the answer; the stream is closed however that ends."""
        with self:
            for _ in self:
                pass
            return self.answer

    def close(self) -> None:
        """End the answer here and free the decoder; harmless when it has ended."""
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncAnswerStream:
    """An `AnswerStream` for asyncio: ``async for piece in stream``, then ``stream.answer``.

    The answer is made in a thread of its own, so the event loop stays free; nothing starts before the first piece is
    asked for. The thread stops at its next piece when the consumer is cancelled, calls `aclose` (``async with`` does)
    or drops the stream.

    Args:
        start: begins the answer; called in the thread.
    """

    def __init__(self, start: Callable[[], AnswerStream]) -> None:
        self._start = start
        self._events: asyncio.Queue[tuple[str, Any]] | None = None
        self._stop = threading.Event()
        self._ended = False
        self._answer: Answer | None = None
        weakref.finalize(self, self._stop.set)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        if self._ended or self._stop.is_set():
            raise StopAsyncIteration
        if self._events is None:
            self._events = asyncio.Queue()
            arguments = (self._start, asyncio.get_running_loop(), self._events, self._stop)
            threading.Thread(target=_produce, args=arguments, name="lloco-answer", daemon=True).start()
        try:
            kind, value = await self._events.get()
        except asyncio.CancelledError:
            self._stop.set()
            raise
        if kind == "piece":
            return str(value)
        self._ended = True
        if kind == "error":
            raise value
        self._answer = value
        raise StopAsyncIteration

    @property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            LLoCOError: the stream has not been read to its end.
        """
        if self._answer is None:
            raise LLoCOError("an answer is whole when its stream has been read to the end, and this one has not")
        return self._answer

    async def aclose(self) -> None:
        """End the answer here; harmless when it has ended."""
        self._stop.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def _produce(
    start: Callable[[], AnswerStream],
    loop: asyncio.AbstractEventLoop,
    events: asyncio.Queue[tuple[str, Any]],
    stop: threading.Event,
) -> None:
    """Make an answer and send its pieces to the loop. Holds no reference to the stream, so that it can be dropped."""

    def send(kind: str, value: Any) -> None:
        try:
            loop.call_soon_threadsafe(events.put_nowait, (kind, value))
        except RuntimeError:  # the loop is closed: nobody waits any more
            stop.set()

    try:
        with start() as stream:
            for piece in stream:
                if stop.is_set():
                    return
                send("piece", piece)
            send("end", stream.answer)
    except BaseException as error:  # whatever it is, the consumer must not wait for ever
        send("error", error)
