"""A process that is killed in the middle of its work, again and again.

Run as ``victim.py FOLDER DECODER ADAPTER COUNT SEED``. It loads what takes long once. For each trial it forks a child
that makes changes of a store, and kills the child with SIGKILL in the last of them: half the time at a moment drawn
from the time that such a change took before, half the time at one of the child's marks, which stand before and after
every file that is named, flushed or removed and every statement to the catalogue. Then it looks at the store. A line
of JSON for each trial says where the kill fell and what was wrong; the first change of the next trial is the one that
was cut off, made anew.
"""

from __future__ import annotations

import json
import os
import random
import re
import select
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from changes import AT_REST, OFTEN, Change, Expected, Site, actual, drawn

from lloco_engine.decoder.local import LocalDecoder
from lloco_engine.store import Store, verify
from lloco_engine.store.database import Database

FILES = ("replace", "unlink", "rmdir", "link", "fsync")
# What a mark says has happened last; what comes after a commit is clean-up and the index, whatever it is.
PHASES = {"S": "before", "f": "at files", "t": "at rows", "c": "in the commit", "a": "after it", "E": "when done"}


class Marks:
    """What a child says of its work, through a pipe: a letter for each event of `PHASES`.

    Args:
        pipe: its writing end.
        fatal: at which mark of which phase of the last change the process kills itself; None for nowhere.
        changes: how many changes there will be.
    """

    def __init__(self, pipe: int, fatal: tuple[str, int] | None, changes: int) -> None:
        self._pipe, self._fatal, self._left = pipe, fatal, changes
        self._write = os.write
        self._marks = ""
        self._reached: Counter[str] = Counter()

    def __call__(self, mark: str) -> None:
        self._write(self._pipe, mark.encode())
        self._marks += mark
        here = phase(self._marks)
        self._reached[here] += 1
        if not self._left and self._fatal == (here, self._reached[here]):
            os.kill(os.getpid(), signal.SIGKILL)

    def take(self, site: Site, change: Change) -> None:
        """Make a change, and say when it begins, and when it is done and how many microseconds it took."""
        self._marks = ""
        self._reached.clear()
        self._left -= 1
        self("S")
        began = time.perf_counter()
        site.take(change)
        self(f"E{(time.perf_counter() - began) * 1e6:09.0f}")

    def place(self) -> None:
        """Set marks at every change of the file system and of the catalogue."""
        for name in FILES:
            setattr(os, name, self._around(getattr(os, name)))
        whole = Database.transaction

        @contextmanager
        def transaction(database: Database, *, write: bool = False) -> Iterator[object]:
            with whole(database, write=write) as connection:
                if write:
                    connection.set_trace_callback(lambda statement: self("c" if statement == "COMMIT" else "t"))
                yield connection
            if write:
                connection.set_trace_callback(None)
                self("a")

        Database.transaction = transaction

    def _around(self, work: Callable) -> Callable:
        def marked(*arguments, **named):
            self("f")
            made = work(*arguments, **named)
            self("f")
            return made

        return marked


def phase(marks: str) -> str:
    """Where work stood that left these marks, the first of which is S."""
    last = re.sub(r"\d", "", marks)[-1]
    return PHASES["a" if "a" in marks and last in "ft" else last]


class Victim:
    """A store, and trials on it.

    Args:
        site: where.
        rng: draws changes and moments.
    """

    def __init__(self, site: Site, rng: random.Random) -> None:
        self._site, self._rng = site, rng
        self._expected = Expected()
        self._again: list[Change] = []
        self._took: dict[str, list[tuple[float, str]]] = {}  # by kind: seconds and marks of each that was not cut off

    def trial(self) -> dict[str, str]:
        """Make changes, kill in the last, look at the store."""
        last = drawn(self._rng, self._expected, OFTEN | AT_REST)
        changes = [*self._again, last]
        shutil.rmtree(self._site.copy, ignore_errors=True)
        told, _, problem = self._killed(changes).partition("!")
        parts = re.split("(?=S)", told)[1:]
        for change, part in zip(changes, parts, strict=False):
            if "E" in part:
                self._expected.take(change)
                marks, micros = part.split("E")
                self._took.setdefault(change[0], []).append((int(micros) / 1e6, marks))
        done = told.count("E")
        self._again = changes[done:]
        try:
            problem = problem or self._problem(last, done == len(changes))
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        return {"kind": last[0], "phase": phase(parts[-1]) if parts else "", "problem": problem}

    def _killed(self, changes: list[Change]) -> str:
        """What a child said of its work before it was killed in the last change, or what went wrong after a !."""
        seconds, marks = self._rng.choice(self._took.get(changes[-1][0], [(0.05, "Sft")])[-9:])
        seconds *= 1.05 * self._rng.random()
        fatal = self._mark(marks) if self._rng.random() < 0.5 else None
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(read)
            self._work(Marks(write, fatal, len(changes)), write, changes)
        os.close(write)
        told = ""
        while told.count("S") < len(changes) and (piece := os.read(read, 65536)):
            told += piece.decode()
        if fatal is None:
            select.select([], [], [], seconds)
            os.kill(child, signal.SIGKILL)
        while piece := os.read(read, 65536):
            told += piece.decode()
        os.close(read)
        os.waitpid(child, 0)
        return told

    def _mark(self, marks: str) -> tuple[str, int] | None:
        """One of the marks of a change, if there are any: each phase is as likely as another, however long they are."""
        reached = Counter(phase(marks[:end]) for end in range(2, len(marks) + 1))
        if not reached:
            return None
        where = self._rng.choice(sorted(reached))
        return where, self._rng.randrange(reached[where]) + 1

    def _work(self, mark: Marks, pipe: int, changes: list[Change]) -> NoReturn:
        try:
            site = replace(self._site, decoder=LocalDecoder.load(str(self._site.decoder)))  # none is used after a fork
            mark.place()
            for change in changes:
                mark.take(site, change)
        except BaseException as error:
            os.write(pipe, f"!{type(error).__name__} in {changes}: {error}".encode())
        finally:
            os._exit(0)

    def _problem(self, last: Change, done: bool) -> str:
        """What is not as it must be after a kill."""
        if last[0] == "repair" and not done:
            lost = [said for said in Store.repair(self._site.store) if "ingest" in said]
            if lost:
                return f"lost by a repair that was cut off: {lost[0]}"
        with Store.open(self._site.store) as store:
            problems, state = harmful(store), actual(store)
        before = self._expected.state()
        if state != before and not done:
            self._expected.take(last)
        if state != self._expected.state():
            return f"it holds {state} after {last}, not {before} or {self._expected.state()}"
        if not problems and last[0] in ("backup", "restore") and self._site.copy.exists():
            with Store.open(self._site.copy) as copy:
                problems = harmful(copy) or [] if actual(copy) == state else ["the copy is not as the store"]
        return f"after {last}: {problems[0]}" if problems else ""


def harmful(store: Store) -> list[str]:
    """What `verify` says of a store, but for files that the next ingest may use."""
    return [f"{problem.path}: {problem.detail}" for problem in store.verify() if problem.kind != "orphan"]


def warm_up(site: Site) -> None:
    """Import and compile what changes need, which no child then does."""
    site.make()
    for change in (["put", "a", "The pump of hall nine needs oil. " * 9, ""], ["refine", "a"], ["adapter", "add"]):
        site.take(change)


def main() -> None:
    folder, decoder, adapter = map(Path, sys.argv[1:4])
    count, seed = map(int, sys.argv[4:])
    verify._LOOKS = 0  # nobody writes when it is looked at
    warm_up(Site(*(folder / "first" / name for name in ("store", "files", "copy")), str(decoder), adapter))
    site = Site(*(folder / name for name in ("store", "files", "copy")), str(decoder), adapter)
    site.make()
    victim = Victim(site, random.Random(seed))
    for _ in range(count):
        print(json.dumps(victim.trial()), flush=True)


if __name__ == "__main__":
    main()
