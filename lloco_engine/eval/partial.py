"""The part of a long run that is done, kept beside its output so that the same command can go on from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lloco_engine.journal import Journal

__all__ = ["Partial"]


class Partial:
    """Results by number, in ``OUT.partial.jsonl``; without an output file, only in memory.

    Args:
        output: the run's output file, or None.
        key: hash of everything the results depend on; what another key left is dropped.
    """

    def __init__(self, output: Path | None, key: str) -> None:
        path = None if output is None else output.with_name(output.name + ".partial.jsonl")
        self._journal = Journal(path, key, another="drop")
        self.done: dict[int, Any] = {int(entry["number"]): entry["value"] for entry in self._journal.done}

    def add(self, number: int, value: Any) -> None:
        """Keep one result."""
        self.done[number] = value
        self._journal.add({"number": number, "value": value})

    def finish(self) -> None:
        """Remove the file: the run is complete."""
        self._journal.finish()
