"""Files that are broken, huge, deep or meant to harm: each is a document or a named failure, soon and within bounds."""

from __future__ import annotations

import json
import random
import select
import subprocess
import sys
from pathlib import Path

from odd_inputs import MAKERS

MOST_SECONDS = 60
MOST_MEMORY = 1_500_000_000  # bytes, of the process that ingests and the one that reads for it


class Eater:
    """The process that ingests, started again where a file ended it."""

    def __init__(self, store: Path, decoder: Path, errors: Path) -> None:
        self._command = [sys.executable, str(Path(__file__).with_name("eater.py")), str(store), str(decoder)]
        self._errors = errors
        self._process: subprocess.Popen[str] | None = None

    def tell(self, line: object, seconds: float) -> dict | None:
        """The answer to one line; None where the process ended, or had to be ended."""
        if self._process is None:
            with self._errors.open("a") as errors:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    cwd=Path(__file__).parent,
                )
            seconds += 120  # to start
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        ready = select.select([self._process.stdout], [], [], seconds)[0]
        answer = self._process.stdout.readline() if ready else ""
        if not answer:
            self.end()
            return None
        return json.loads(answer)

    def end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


def wrong(answer: dict | None) -> str:
    """What of the rule an answer breaks; "" for nothing."""
    if answer is None:
        return f"ended the process that ingests, or took it over {2 * MOST_SECONDS} s"
    if answer["seconds"] > MOST_SECONDS:
        return f"took {answer['seconds']:.0f} s"
    if answer["memory"] > MOST_MEMORY:
        return f"took {answer['memory'] / 1e6:,.0f} MB"
    if not answer["documents"] and not answer["failed"]:
        return "vanished in silence"
    for source, reason in answer["failed"]:
        if not source or not 20 < len(reason) < 2_000 or "Traceback" in reason:
            return f"failed with no reason to read: {source!r}: {reason[:300]!r}"
    return ""


def test_every_bad_input_is_a_document_or_a_named_failure(request, report, tmp_path, tiny_folder):
    count, seed = request.config.getoption("--inputs"), request.config.getoption("--seed")
    kinds = sorted(MAKERS)
    random.Random(seed).shuffle(kinds)
    errors = tmp_path / "errors"
    eater = Eater(tmp_path / "store", tiny_folder, errors)
    failed: list[str] = []
    slowest = largest = (0.0, "")
    documents = 0
    try:
        for number in range(count):
            kind = kinds[number % len(kinds)]
            name, data = MAKERS[kind](random.Random(f"{seed} {number}"))
            folder = tmp_path / "in" / str(number)
            folder.mkdir(parents=True)
            path = folder / (f"f{number}{name}" if name.startswith(".") and name.count(".") == 1 else name)
            path.write_bytes(data)
            answer = eater.tell(str(path), 2 * MOST_SECONDS)
            if problem := wrong(answer):
                failed.append(f"{kind} ({number}): {problem}")
            if answer is not None:
                documents += answer["documents"]
                slowest = max(slowest, (answer["seconds"], kind))
                largest = max(largest, (answer["memory"], kind))
            path.unlink()
        last = eater.tell(None, 600)
    finally:
        eater.end()
    note = f"{documents} documents; slowest {slowest[0]:.1f} s ({slowest[1]}), most memory {largest[0] / 1e6:,.0f} MB"
    report("bad files", count, len(failed), f"{note} ({largest[1]})")
    assert not failed, "\n".join(failed)
    assert last is not None
    assert last["problems"] == []
    assert last["hits"] > 0
    assert "Traceback" not in errors.read_text()
