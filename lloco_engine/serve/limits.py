"""What one request may ask of the server, and how many are answered at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from lloco_engine.config import Config
from lloco_engine.errors import ConfigError
from lloco_engine.serve.errors import APIError

__all__ = ["Admission", "Limits", "Place"]


@dataclass(frozen=True)
class Limits(Config):
    """Limits of a server.

    Args:
        concurrent: questions that are answered beside each other.
        queue: questions that wait for a place; more are refused.
        question_chars: characters of one question.
        body_bytes: of a request that is no upload.
        upload_bytes: of a file.
        body_s: seconds within which a body is there; an upload has ten times as many.
        send_s: seconds that a client may leave a piece of an answer unread.
        requests: of all kinds at once, those that wait included.
    """

    concurrent: int = 8
    queue: int = 32
    question_chars: int = 32_000
    body_bytes: int = 2_000_000
    upload_bytes: int = 100_000_000
    body_s: float = 30.0
    send_s: float = 30.0
    requests: int = 256

    def __post_init__(self) -> None:
        for name, value in self.to_json().items():
            if isinstance(value, bool) or not isinstance(value, int | float) or value < (0 if name == "queue" else 1):
                raise ConfigError(f"{name} must be a number, at least {0 if name == 'queue' else 1}, not {value!r}")


class Admission:
    """Places for questions, and a queue before them.

    Args:
        limits: how many.
        changed: told how many are answered and how many wait, whenever that changes.
    """

    def __init__(self, limits: Limits, changed: Callable[[int, int], None] = lambda answered, waiting: None) -> None:
        self._limits = limits
        self._places = asyncio.Semaphore(limits.concurrent)
        self._changed = changed
        self.answered = self.waiting = 0

    def place(self) -> Place:
        """A place to enter, when one is free: ``async with admission.place()``."""
        return Place(self)

    async def take(self) -> None:
        """Take a place, when one is free.

        Raises:
            APIError: the queue is full (429).
        """
        if self._places.locked() and self.waiting >= self._limits.queue:
            # a place comes free when one of those before has its answer: some seconds each, at a guess
            wait = max(1, self.waiting // self._limits.concurrent)
            raise APIError(
                429,
                f"at most {self._limits.concurrent} questions are answered at once and {self._limits.queue} wait, and "
                f"all these places are taken; try again in {wait} s",
                "rate_limit_exceeded",
                headers={"Retry-After": str(wait)},
            )
        self.waiting += 1
        self._tell()
        try:
            await self._places.acquire()
        finally:
            self.waiting -= 1
            self._tell()
        self.answered += 1
        self._tell()

    def give_back(self) -> None:
        """Let the next one have a place that was taken."""
        self.answered -= 1
        self._places.release()
        self._tell()

    def _tell(self) -> None:
        self._changed(self.answered, self.waiting)


class Place:
    """A place while a block runs. No generator: one that ends in another's end is not sure to end in time."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    async def __aenter__(self) -> None:
        await self._admission.take()

    async def __aexit__(self, *_: object) -> None:
        self._admission.give_back()
