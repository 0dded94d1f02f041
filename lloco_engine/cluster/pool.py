"""A pool of workers that make segments: who gets which job, what becomes of one whose worker died, when one waits.

The workers are a `Crew`'s, whatever they run on. A job that was in flight when its worker died is done by another, and
the worker is replaced; all that was made before is in the store. Each worker has a job and one that waits for it, so it
goes on while this process embeds and commits.
"""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lloco_engine.cluster.worker import Outcome, Refused
from lloco_engine.errors import DocumentError, LLoCOError
from lloco_engine.jobs import Job, Made, Maker, Packed
from lloco_engine.store import Store
from lloco_engine.store.files import Layout
from lloco_engine.store.segments import SegmentFiles, received

__all__ = ["Crew", "Pool", "WorkerDied"]

_QUEUE = 2  # jobs of a worker: the one that it does, and the next
_AHEAD = 2  # jobs that wait for a worker, for each of its own
_LIVES = 3  # workers that may die of a job, or before their first one in a row
_PATIENCE_S = 60.0  # without any worker, until it is said what is waited for


class WorkerDied(Exception):
    """A worker's process ended; the message says what is known of it."""


class Crew(ABC):
    """Workers somewhere. A ticket stands for what a worker was asked: hashable, of the crew's own kind."""

    size: int  # workers at once

    @abstractmethod
    def hire(self) -> Any:
        """A new worker, which may not run yet."""

    @abstractmethod
    def ready(self, worker: Any) -> Any:
        """Ask a worker for `Worker.ready`; returns the ticket."""

    @abstractmethod
    def send(self, worker: Any, job: Job, needed: Mapping[str, bytes]) -> Any:
        """Ask a worker for `Worker.make`; returns the ticket. Its jobs are done in the order in which they come."""

    @abstractmethod
    def wait(self, tickets: Sequence[Any], timeout: float) -> Sequence[Any]:
        """Those that are done, in their order: at least one, unless the time is up."""

    @abstractmethod
    def answer(self, ticket: Any) -> Any:
        """What a worker answered to a ticket that is done.

        Raises:
            WorkerDied: it died before that.
        """

    def dismiss(self, worker: Any) -> None:  # noqa: B027
        """Let go of a worker that died, or does not answer."""

    def lacks(self) -> str:
        """What workers wait for, where they do not begin."""
        return "no worker has begun"

    def close(self) -> None:  # noqa: B027
        """End all workers."""


@dataclass(eq=False)
class _Seat:
    """A worker and its jobs, by ticket, in the order in which it does them; None stands for its start."""

    worker: Any
    jobs: dict[Any, Job | None] = field(default_factory=dict)
    has_begun: bool = False


class Pool(Maker):
    """Has jobs done by a crew; see `Maker`.

    Args:
        store: where segments go.
        crew: does the jobs.
    """

    def __init__(self, store: Store, crew: Crew) -> None:
        super().__init__(store)
        self._files = SegmentFiles.of(Layout(store.path), store.manifest.form)
        self._crew = crew
        self._seats: list[_Seat] = []
        self._waiting: deque[Job] = deque()
        self._pending: dict[str, Job] = {}  # waiting, or with a worker
        self._made: dict[str, Made] = {}
        self._failed: dict[str, Exception] = {}
        self._deaths: Counter[str] = Counter()
        self._false_starts = 0
        self._busy_s, self._since = 0.0, 0.0
        self._patient_until = 0.0

    def close(self) -> None:
        """See `Maker.close`."""
        self._crew.close()

    @property
    def busy_s(self) -> float:
        """See `Maker.busy_s`."""
        return self._busy_s + (time.perf_counter() - self._since if self._pending else 0.0)

    @property
    def wants_more(self) -> bool:
        """See `Maker.wants_more`."""
        self._turn(0.0)
        return len(self._pending) < _QUEUE * (1 + _AHEAD) * self._crew.size

    def begin(self, job: Job) -> None:
        """See `Maker.begin`."""
        if any(job.segment_id in those for those in (self._pending, self._made, self._failed)):
            return
        if not self._pending:
            self._since = time.perf_counter()
        self._pending[job.segment_id] = job
        self._waiting.append(job)

    def is_waited_for(self, job: Job) -> bool:
        """See `Maker.is_waited_for`."""
        return job.segment_id in self._pending

    def taken(self, segment_id: str) -> Made | None:
        """See `Maker.taken`."""
        return self._made.pop(segment_id, None)

    def make(self, job: Job) -> Made:
        """See `Maker.make`.

        Raises:
            DocumentError: several workers died of this job.
        """
        name = job.segment_id
        self.begin(job)
        if job in self._waiting:  # first of all, then
            self._waiting.remove(job)
            self._waiting.appendleft(job)
        while name in self._pending:
            self._turn(1.0)
        if (error := self._failed.pop(name, None)) is not None:
            raise error
        return self._made.pop(name)

    def _turn(self, timeout: float) -> None:
        """Give jobs to workers, and take what is done."""
        if not self._pending:
            return
        while len(self._seats) < min(self._crew.size, len(self._pending)):
            self._hire()
        self._give()
        for ticket in self._crew.wait([ticket for seat in self._seats for ticket in seat.jobs], timeout):
            seat = next((one for one in self._seats if ticket in one.jobs), None)
            if seat is not None:  # its worker has not died meanwhile
                self._take(seat, ticket)
        self._give()
        self._complain()

    def _hire(self) -> None:
        seat = _Seat(self._crew.hire())
        seat.jobs[self._crew.ready(seat.worker)] = None
        self._seats.append(seat)
        self._patient_until = time.monotonic() + _PATIENCE_S

    def _give(self) -> None:
        """Hand out jobs, each to who has least to do. One that a worker died of goes to who has nothing else."""
        for job in list(self._waiting):
            free = [seat for seat in self._seats if seat.has_begun and self._has_room(seat, job)]
            if not free:
                return
            if any(one in self._pending for one in job.needs):
                continue
            self._waiting.remove(job)
            try:
                needed = {one: self._files.data(one) for one in job.needs}
            except LLoCOError as error:
                self._end(job, error)
                continue
            seat = min(free, key=lambda seat: len(seat.jobs))
            seat.jobs[self._crew.send(seat.worker, job, needed)] = job

    def _has_room(self, seat: _Seat, job: Job) -> bool:
        if any(one is not None and self._deaths[one.segment_id] for one in seat.jobs.values()):
            return False
        return len(seat.jobs) < (1 if self._deaths[job.segment_id] else _QUEUE)

    def _take(self, seat: _Seat, ticket: Any) -> None:
        try:
            answer = self._crew.answer(ticket)
        except WorkerDied as death:
            self._bury(seat, str(death))
            return
        except Exception as error:  # of a library's code, on a worker: said where the segment is asked for
            job = seat.jobs.pop(ticket)
            if job is None:
                raise
            self._end(job, error)
            return
        job = seat.jobs.pop(ticket)
        if job is None:
            if isinstance(answer, Refused):
                raise answer.raised()
            seat.has_begun, self._false_starts = True, 0
        elif isinstance(answer, Refused):
            self._end(job, answer.raised())
        else:
            self._keep(job, answer)

    def _keep(self, job: Job, answer: Outcome) -> None:
        try:
            file = None if answer.data is None else received(answer.data, job.segment_id, self._files.form)
        except LLoCOError as error:
            self._end(job, error)
            return
        self._made[job.segment_id] = self._save(job, Packed(file, answer.seconds))
        self._end(job)

    def _bury(self, seat: _Seat, reason: str) -> None:
        """A worker died: its first job is what it died of, and the others only waited for it."""
        self._seats.remove(seat)
        self._crew.dismiss(seat.worker)
        first, *others = seat.jobs.values()
        self._waiting.extendleft(job for job in reversed(others) if job is not None)
        if first is None:
            self._false_starts += 1
            if self._false_starts >= _LIVES:
                raise LLoCOError(f"workers must live to load the decoder, and {_LIVES} in a row died before: {reason}")
            return
        self._deaths[first.segment_id] += 1
        if self._deaths[first.segment_id] < _LIVES:
            self._waiting.appendleft(first)
            return
        self._end(
            first,
            DocumentError(
                f"a chunk of {len(first.token_ids)} tokens must leave its worker alive, and {_LIVES} died of it "
                f"({reason}); give workers more memory, or lower segment_tokens in a new store"
            ),
        )

    def _end(self, job: Job, error: Exception | None = None) -> None:
        del self._pending[job.segment_id]
        if not self._pending:
            self._busy_s += time.perf_counter() - self._since
        if error is not None:
            self._failed[job.segment_id] = error

    def _complain(self) -> None:
        """Say what is waited for, where no worker begins for long."""
        now = time.monotonic()
        if now < self._patient_until or any(seat.has_begun for seat in self._seats):
            return
        self._patient_until = now + _PATIENCE_S
        print(f"lloco: waiting for workers: {self._crew.lacks()}", file=sys.stderr)
