"""Stores to be compared, documents to fill them with, and a crew without processes, for the tests of clusters."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lloco_engine import Document, Engine
from lloco_engine.cluster.pool import Crew, Pool, WorkerDied
from lloco_engine.cluster.worker import Recipe, Worker
from lloco_engine.config import ChunkConfig, CompressConfig
from lloco_engine.jobs import Job
from lloco_engine.store import Store
from lloco_engine.store.connecting import connect
from lloco_engine.testing import HashingEmbedder

SMALL = ChunkConfig(segment_tokens=80, window_tokens=40, window_overlap=8)
TIMES = {"ingested_at", "compress_s"}
WORDS = ("mill", "wheel", "keeper", "north", "flood", "sluice", "oak", "tram", "salt", "line", "harbour", "crane")


def documents(count: int, seed: int = 0) -> list[Document]:
    """Documents of one to five chunks, of seeded words; some share a chunk."""
    rng = random.Random(seed)
    shared = " ".join(rng.choices(WORDS, k=70)) + ".\n\n"
    return [
        Document(
            f"doc-{number:03d}",
            (shared if number % 5 == 0 else "") + " ".join(rng.choices(WORDS, k=rng.randrange(10, 90))) + ".",
            metadata={"number": number},
        )
        for number in range(count)
    ]


def opened(path: Path, decoder: Any, **changes: Any) -> Engine:
    options: dict[str, Any] = {"compress": CompressConfig(ratio=8), "chunk": SMALL}
    return Engine.open(path, decoder=decoder, embedder=HashingEmbedder(), **(options | changes))


def content(path: Path) -> dict[str, Any]:
    """All that a store holds, but for the times at which it was made: its files' bytes, and its catalogue's rows."""
    found: dict[str, Any] = {
        str(file.relative_to(path)): file.read_bytes()
        for folder in ("segments", "index", "adapters")
        for file in sorted((path / folder).rglob("*"))
        if file.is_file()
    }
    found["manifest.json"] = json.loads((path / "manifest.json").read_text()) | {"created": ""}
    with closing(connect(path / "catalogue.sqlite")) as connection:
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in set(tables) - {"seals", "sealed"}:  # which are made of rows with their times
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})") if row[1] not in TIMES]
            rows = connection.execute(f"SELECT {', '.join(columns)} FROM {table}").fetchall() if columns else []
            found[table] = [tuple(row) for row in rows]
    return found


def differing(path: Path, other: Path) -> list[str]:
    """What two stores hold that is not equal."""
    one, two = content(path), content(other)
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


@dataclass
class Ticket:
    """One thing that a worker was asked."""

    call: Callable[[], Any]
    answer: Any = None
    is_done: bool = False

    __hash__ = object.__hash__
    __eq__ = object.__eq__


@dataclass
class Place:
    """A worker of `Team`: its queue, and whether it lives."""

    worker: Worker
    queue: list[Ticket] = field(default_factory=list)
    is_dead: bool = False


class Team(Crew):
    """Workers in this process, which do their jobs when they are waited for, in an order that is drawn.

    Args:
        recipe: theirs.
        size: how many.
        seed: of the order.
        dies: says of a job, given the number of those done or died of, whether its worker dies of it.
        spoil: what becomes of an answer on its way.
    """

    def __init__(
        self,
        recipe: Recipe,
        size: int = 3,
        seed: int = 0,
        dies: Callable[[Job, int], bool] = lambda job, number: False,
        spoil: Callable[[Any, int], Any] = lambda answer, number: answer,
    ) -> None:
        self.size = size
        self._recipe, self._dies, self._spoil = recipe, dies, spoil
        self._rng = random.Random(seed)
        self._places: list[Place] = []
        self.hired = self.deaths = 0
        self.sent: list[str] = []
        self.most = 0  # jobs at once
        self.is_closed = False

    def hire(self) -> Place:
        self.hired += 1
        self._places.append(Place(Worker(self._recipe)))
        return self._places[-1]

    def ready(self, worker: Place) -> Ticket:
        return self._ask(worker, worker.worker.ready)

    def send(self, worker: Place, job: Job, needed: Mapping[str, bytes]) -> Ticket:
        number = len(self.sent)
        self.sent.append(job.segment_id)

        def call() -> Any:
            if self._dies(job, number):
                self.deaths += 1
                raise WorkerDied("killed")
            return self._spoil(worker.worker.make(job, needed), number)

        ticket = self._ask(worker, call)
        self.most = max(self.most, sum(len(place.queue) for place in self._places))
        return ticket

    def _ask(self, place: Place, call: Callable[[], Any]) -> Ticket:
        assert not place.is_dead
        place.queue.append(Ticket(call))
        return place.queue[-1]

    def wait(self, tickets: Sequence[Ticket], timeout: float) -> list[Ticket]:
        ready = [place for place in self._places if place.queue]
        if ready and (timeout > 0 or self._rng.random() < 0.3):
            place = self._rng.choice(ready)
            first = place.queue.pop(0)
            first.is_done = True
            try:
                first.answer = first.call()
            except WorkerDied as death:
                for ticket in (first, *place.queue):
                    ticket.answer, ticket.is_done = death, True
                place.queue.clear()
                place.is_dead = True
        return [ticket for ticket in tickets if ticket.is_done]

    def answer(self, ticket: Ticket) -> Any:
        if isinstance(ticket.answer, WorkerDied):
            raise ticket.answer
        return ticket.answer

    def close(self) -> None:
        self.is_closed = True


class TeamCluster:
    """A cluster whose workers are a `Team` of these options; the last one is kept."""

    def __init__(self, change: Callable[[Recipe], Recipe] = lambda recipe: recipe, **options: Any) -> None:
        self._change, self._options = change, options
        self.team: Team | None = None

    def maker(self, store: Store, recipe: Recipe) -> Pool:
        self.team = Team(self._change(recipe), **self._options)
        return Pool(store, self.team)
