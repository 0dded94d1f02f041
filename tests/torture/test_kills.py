"""A writer is killed at any time: what it had said was done is there, the rest is there wholly or not at all."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

from adapter_cases import adapter
from victim import CHUNK

from lloco_engine.adapters.registry import Registry
from lloco_engine.decoder.local import LocalDecoder
from lloco_engine.store import Store

STEPS = 6
WORDS = ("the", "pump", "of", "hall", "nine", "needs", "oil", "before", "crane", "Orne", "lifts", "green", "tram")


class Expected:
    """What the store holds after each step."""

    def __init__(self) -> None:
        self.documents: dict[str, tuple[str, str]] = {}
        self.versions: tuple[int, ...] = ()
        self.current = self.newest = 0

    def state(self) -> tuple:
        return tuple(sorted(self.documents.items())), self.versions, self.current

    def take(self, step: list) -> None:
        kind, *rest = step
        if kind == "put":
            self.documents[rest[0]] = (rest[1], rest[2])
        elif kind == "file":
            self.documents[rest[0]] = (rest[1], Path(rest[0]).stem)
        elif kind == "delete":
            self.documents.pop(rest[0], None)
        elif rest[0] == "add":
            self.newest += 1
            self.versions, self.current = (*self.versions, self.newest), self.newest
        elif rest[0] == "rm":
            self.versions, self.current = (), 0
        elif earlier := [number for number in self.versions if number < self.current]:
            self.current = earlier[-1]


def actual(store: Store) -> tuple:
    documents = {info.doc_id: (store.document_text(info.doc_id, info.tenant), info.title) for info in store.documents()}
    kept = Registry(store).kept()
    current = next((one.version for one in kept if one.current), 0)
    return tuple(sorted(documents.items())), tuple(one.version for one in kept), current


def steps_of(rng: random.Random, expected: Expected) -> list[list]:
    made: list[list] = []
    for _ in range(STEPS):
        kind = rng.choices(("put", "file", "delete", "adapter"), (5, 3, 2, 2))[0]
        text = " ".join(rng.choices(WORDS, k=rng.randrange(5, 120)))
        if kind == "put":
            made.append(["put", f"d{rng.randrange(8)}", text, rng.choice(("", "A title", "Another"))])
        elif kind == "file":
            made.append(["file", f"f{rng.randrange(6)}.txt", text])
        elif kind == "delete":
            there = [doc_id for doc_id in sorted(expected.documents) if not doc_id.endswith(".txt")]
            made.append(["delete", rng.choice(there or ["d0"])])
        else:
            made.append(["adapter", rng.choice(("add", "add", "rm", "back"))])
    return made


def test_nothing_that_was_done_is_lost_and_nothing_is_half_done(request, report, tmp_path, tiny_folder):
    kills, seed = request.config.getoption("--kills"), request.config.getoption("--seed")
    rng = random.Random(seed)
    made = adapter(tmp_path / "adapter", LocalDecoder.load(str(tiny_folder)))
    store, files = tmp_path / "store", tmp_path / "files"
    files.mkdir()
    command = [sys.executable, str(Path(__file__).with_name("victim.py")), store, tiny_folder, made, files]
    victim = subprocess.Popen(
        list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
    )
    assert json.loads(victim.stdout.readline()) == "ready"
    expected, finished, half, failed = Expected(), 0, 0, []
    longest = 1.0
    try:
        for number in range(kills):
            steps = steps_of(rng, expected)
            victim.stdin.write(json.dumps({"steps": steps, "after": rng.random() * longest}) + "\n")
            victim.stdin.flush()
            answer = json.loads(victim.stdout.readline())
            done = answer["done"]
            longest = longest * 1.02 if done < STEPS else longest * 0.9  # most kills fall into the work
            for step in steps[:done]:
                expected.take(step)
            with Store.open(store) as opened:
                problems = [problem for problem in opened.verify() if problem.kind != "orphan"]
                state = actual(opened)
            before = expected.state()
            if state != before and done < STEPS:  # then the step that was at work must have been taken
                expected.take(steps[done])
            if state == before:
                finished += 1
            else:
                half += 1
            if problems or state not in (before, expected.state()):
                failed.append((number, steps, done, problems))
                break
    finally:
        victim.kill()
        victim.wait()
        victim.stdin.close()
        victim.stdout.close()
    report("kill -9 of a writer", number + 1, len(failed), f"{finished} before and {half} after the step at work")
    assert not failed, failed[0]
    assert CHUNK.segment_tokens < 120  # so that documents have several segments
