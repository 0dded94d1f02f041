"""The part of a long run that is done, kept beside its output so that the same command can go on from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["Partial"]


class Partial:
    """Results by number, one JSON line each in ``OUT.partial.jsonl``; without an output file, only in memory.

    Args:
        output: the run's output file, or None.
        key: hash of everything the results depend on; what another key left is dropped.
    """

    def __init__(self, output: Path | None, key: str) -> None:
        self.path = None if output is None else output.with_name(output.name + ".partial.jsonl")
        self.done: dict[int, Any] = {}
        if self.path is None:
            return
        self._read(key)
        # Written anew: a line that was cut off must not be appended to.
        lines = [{"key": key}, *({"number": number, "value": value} for number, value in self.done.items())]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def _read(self, key: str) -> None:
        assert self.path is not None
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
            if not lines or json.loads(lines[0]) != {"key": key}:
                return
            for line in lines[1:]:
                entry = json.loads(line)
                self.done[int(entry["number"])] = entry["value"]
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError):  # the process was killed while it wrote the last line
            return

    def add(self, number: int, value: Any) -> None:
        """Keep one result."""
        self.done[number] = value
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"number": number, "value": value}) + "\n")

    def finish(self) -> None:
        """Remove the file: the run is complete."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
