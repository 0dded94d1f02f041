"""Structured logs: one JSON object a line, and no text of a question, an answer or a document in it."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime

__all__ = ["JSONLines", "install"]

_FIELDS = ("request", "method", "route", "status", "ms", "bytes_in", "tenant", "file", "vector_store", "outcome")


class JSONLines(logging.Formatter):
    """A record as one line of JSON. Of an exception its kind and where it was raised: its message may quote a text."""

    def format(self, record: logging.LogRecord) -> str:
        made: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        made |= {name: getattr(record, name) for name in _FIELDS if hasattr(record, name)}
        if record.exc_info and record.exc_info[1] is not None:
            made |= _told(record.exc_info[1])
        return json.dumps(made)


def _told(error: BaseException) -> dict[str, object]:
    frames = traceback.extract_tb(error.__traceback__)
    kinds = []
    seen: BaseException | None = error
    while seen is not None:
        kinds.append(type(seen).__name__)
        seen = seen.__cause__
    where = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames]
    return {"error": " from ".join(kinds), "where": where}


def install(level: str = "INFO") -> None:
    """Have the server's and uvicorn's loggers write JSON lines to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONLines())
    for name in ("lloco.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
