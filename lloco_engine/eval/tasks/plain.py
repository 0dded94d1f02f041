"""Any file of records: open questions, short answers."""

from __future__ import annotations

from pathlib import Path

from lloco_engine.errors import ConfigError
from lloco_engine.eval.tasks.base import Task

__all__ = ["Plain"]


class Plain(Task):
    """Questions are asked as they stand."""

    name = "plain"
    about = "any file of records, named with --data: open questions, short answers"
    where = ""

    def source(self, folder: Path | None) -> Path | None:
        """There is no such file in a folder of data.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"name the file to read with --data, or a task with --task; --data-folder is {folder}")
