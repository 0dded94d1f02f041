"""Steps that the answers of several threads share: continuous batching, without a thread of its own.

A step reads every weight of the decoder once, however many answers go on by it. So threads that ask for a step at about
the same time share one, which one of them runs. An answer joins by asking and leaves by not asking, at any step (Yu et
al. 2022, "Orca"); and whoever asks for a step runs it where nobody else is there to (Hendler et al. 2010, "Flat
combining"), so a single answer waits for nothing and hands nothing over.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from lloco_engine.decoder.attention import Cache
from lloco_engine.decoder.memory import Memory
from lloco_engine.process import ProcessLock

__all__ = ["LIMIT", "PIECE", "Batching", "Stream"]

LIMIT = 16  # answers that share a step: what a step holds, and takes, is bounded
PIECE = 128  # tokens of prompts that are read between two steps of others
_SHORTEST_S, _LONGEST_S = 0.001, 0.05


class Stream:
    """One answer that goes on by shared steps, as a strategy runs it on: see `lloco_engine.decoder.decoding.Ahead`.

    Args:
        batching: shares the steps.
        cache: of the live tokens, a single row that nobody else touches.
        memory: of the segments.
        adapter: that reads.
        offset: of positions beyond places in the cache.
    """

    def __init__(
        self, batching: Batching, cache: Cache, memory: Memory | None, adapter: str | None, offset: int
    ) -> None:
        self._batching = batching
        self.cache, self.memory, self.adapter, self.offset = cache, memory, adapter, offset
        self.tokens: Sequence[int] = ()  # to be run
        self.thread = 0  # that asked last
        self._logits: torch.Tensor | None = None
        self._error: Exception | None = None
        self._gate = threading.Lock()
        self._gate.acquire()

    def __call__(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits (T, vocabulary) after more tokens, a list of one row."""
        return self._batching.step(self, tokens[0])

    def forget(self, tokens: int) -> None:
        """Take back the last tokens."""
        self.cache.length -= tokens

    def reorder(self, origins: Sequence[int]) -> None:
        """There is one row."""

    @property
    def crowded(self) -> bool:
        """Whether others share its steps."""
        return self._batching.crowded

    def close(self) -> None:
        """It goes on no more."""
        self._batching.leave(self)

    def ask(self, tokens: Sequence[int]) -> None:
        """What is to be run in the next step."""
        self.tokens, self._logits, self._error = tokens, None, None
        self.thread = threading.get_ident()

    def answer(self, logits: torch.Tensor | None, error: Exception | None = None) -> None:
        """What became of it."""
        self._logits, self._error = logits, error

    @property
    def answered(self) -> bool:
        """Whether it was run, or failed."""
        return self._logits is not None or self._error is not None

    @property
    def logits(self) -> torch.Tensor:
        """After the tokens, (T, vocabulary); what failed is raised."""
        if self._error is not None:
            raise self._error
        assert self._logits is not None
        return self._logits

    def wake(self) -> None:
        """Have its thread look again; by one thread at a time."""
        if self._gate.locked():
            self._gate.release()

    def wait(self, seconds: float | None) -> bool:
        """Until it is woken; False where it was not in time."""
        return self._gate.acquire(timeout=-1 if seconds is None else seconds)


class Batching:
    """Who asks for a step, and who runs it.

    The rule: those who asked first are run first, at most `LIMIT` together, all of the first one's adapter. A step
    waits for those who were in the last ones, but only for half as long as a step takes; who is late is waited for
    again when it has come back. A step that fails is run again for each of its answers alone, so that the one at fault
    fails alone.

    Args:
        run: logits (T, vocabulary) of each stream after its tokens; several streams are of one adapter. Where it
            raises, the streams' caches are as they were.
    """

    def __init__(self, run: Callable[[Sequence[Stream]], Sequence[torch.Tensor]]) -> None:
        self._run = run
        self._mutex = ProcessLock("the decoder")
        self._queue: list[Stream] = []
        self._expected: set[Stream] = set()
        self._leader: Stream | None = None  # whose thread runs a step, or is about to
        self._last: Stream | None = None  # leader: torch keeps threads for each thread that it is called from
        self._patience = _SHORTEST_S
        self._reading = threading.Lock()
        self._readers: list[threading.Lock] = []  # who wait until a step has been run
        self._read = 0  # tokens of prompts since the last step

    @property
    def crowded(self) -> bool:
        """Whether several answers share steps."""
        return len(self._expected) > 1

    def step(self, stream: Stream, tokens: Sequence[int]) -> torch.Tensor:
        """Logits (T, vocabulary) of a stream after more tokens, which its cache then holds.

        Raises:
            whatever running them alone raises.
        """
        try:
            with self._mutex:
                stream.ask(tokens)
                self._queue.append(stream)
                self._expected.add(stream)
                self._elect()
            while not stream.answered:
                self._go_on(stream)
        except BaseException:
            self.leave(stream)
            raise
        return stream.logits

    def leave(self, stream: Stream) -> None:
        """A stream asks no more; harmless where it has left."""
        with self._mutex:
            self._expected.discard(stream)
            if stream in self._queue:
                self._queue.remove(stream)
            if self._leader is stream:
                self._leader = None
            if self._last is stream:
                self._last = None
            self._elect()

    @contextmanager
    def turn(self, tokens: int) -> Iterator[int]:
        """Of the ``tokens`` that are left of a prompt, as many as is said may be read within: all, where nobody else
        is being answered. Else prompts are read one at a time, and `PIECE` tokens of all of them between two steps.
        """
        with self._mutex:
            alone = not self._expected
        if alone:
            yield tokens
            return
        piece = min(tokens, PIECE)
        with self._reading:
            stepped = threading.Lock()
            with self._mutex:
                due = bool(self._queue) or self._leader is not None
                if due and self._read + piece > PIECE:
                    stepped.acquire()
                    self._readers.append(stepped)
            stepped.acquire()
            with self._mutex:
                self._read += piece
            yield piece

    def _go_on(self, stream: Stream) -> None:
        """Run a step where that is this thread's part, or wait."""
        with self._mutex:
            leads = self._leader is stream
            watches = self._leader is None and bool(self._queue) and self._queue[0] is stream
        if leads:
            self._lead()
        elif not stream.wait(self._patience if watches else None):
            with self._mutex:
                if self._leader is None:
                    self._expected.intersection_update(self._queue)
                    self._elect()

    def _elect(self) -> None:
        """Have someone run a step, once all have asked who are waited for; else have the first watch over the time."""
        if self._leader is not None:
            return
        if not self._queue:
            self._let_read()
        elif len(self._queue) >= LIMIT or not self._awaited():
            self._leader = self._last if self._last in self._queue else self._queue[0]
            assert self._leader is not None
            self._leader.wake()
        else:
            self._queue[0].wake()

    def _awaited(self) -> bool:
        """Whether someone may yet come in time: not those whose thread is here, waiting by another of its streams."""
        here = {one.thread for one in self._queue}
        return any(one.thread not in here for one in self._expected)

    def _let_read(self) -> None:
        for reader in self._readers:
            reader.release()
        self._readers.clear()

    def _lead(self) -> None:
        """Run a step for those who are first in the queue."""
        with self._mutex:
            leader = self._leader
            first = [one for one in self._queue if one.adapter == self._queue[0].adapter][:LIMIT]
            self._queue = [one for one in self._queue if one not in first]
        began = time.perf_counter()
        try:
            self._answer(first)
        finally:
            took = time.perf_counter() - began
            with self._mutex:
                self._patience = min(max(took / 2, _SHORTEST_S), _LONGEST_S)
                self._queue = [*(one for one in first if not one.answered), *self._queue]
                self._leader, self._last, self._read = None, leader, 0
                for one in first:
                    one.wake()
                self._let_read()
                self._elect()

    def _answer(self, streams: Sequence[Stream]) -> None:
        try:
            for one, logits in zip(streams, self._run(streams), strict=True):
                one.answer(logits)
        except Exception as error:
            if len(streams) == 1:
                streams[0].answer(None, error)
                return
            for one in streams:
                self._answer([one])
