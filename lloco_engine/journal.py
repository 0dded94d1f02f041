"""What a long run has done so far, kept beside its output, so that the same command goes on from there after a kill."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from lloco_engine.atomic import write_file
from lloco_engine.errors import ConfigError

__all__ = ["Journal", "refuse_another_run"]


class Journal:
    """Results of a run in order: JSON Lines, of which the first is the run's key. Each is on the disk once it is added.

    Args:
        path: the file; None keeps results in memory only.
        key: hash of everything that the results depend on.
        another: what to do with the results of a run with another key: ``"refuse"`` them, or ``"drop"`` them.

    Attributes:
        done: the results, those of an earlier process first. A line that was cut off is not among them.

    Raises:
        ConfigError: another run left its results in the file, and they are not to be dropped.
    """

    def __init__(self, path: Path | None, key: str, another: Literal["refuse", "drop"] = "refuse") -> None:
        self._path = path
        self.done: list[Any] = []
        if path is None:
            return
        first, *rest = _read(path) or [{"key": key}]
        if first == {"key": key}:
            self.done = rest
        elif another == "refuse":
            refuse_another_run(path, "remove the file")
        write_file(path, b"".join(map(_line, ({"key": key}, *self.done))))  # what was cut off must not be added to

    def add(self, result: Any) -> None:
        """Keep one result, a JSON value."""
        self.done.append(result)
        if self._path is not None:
            with self._path.open("ab") as lines:
                lines.write(_line(result))
                lines.flush()
                os.fsync(lines.fileno())

    def finish(self) -> None:
        """Remove the file: the run is complete."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def refuse_another_run(path: Path, otherwise: str) -> None:
    """Raise the `ConfigError` for what another run left at ``path``; ``otherwise`` says how to begin anew."""
    raise ConfigError(
        f"{path} holds an unfinished run with other data or settings; finish that one with the same command, or "
        f"{otherwise}"
    )


def _read(path: Path) -> list[Any]:
    """The lines that are whole, up to the first that is not."""
    values: list[Any] = []
    try:
        *lines, _ = path.read_bytes().split(b"\n")  # by bytes: a line may be cut within a character
        for line in lines:
            values.append(json.loads(line))
    except (FileNotFoundError, ValueError):
        pass
    return values


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
