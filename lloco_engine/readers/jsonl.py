"""JSON Lines: one record, one document: ``{"doc_id", "text"}``, optionally ``"title"``, ``"source"``, and metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from lloco_engine.errors import DocumentError
from lloco_engine.readers.formats import decode_utf8
from lloco_engine.readers.walk import printable
from lloco_engine.types import Document, Failure

__all__ = ["read_jsonl"]

_FIELDS = ("doc_id", "text", "title", "source")


def read_jsonl(path: Path, max_bytes: int) -> Iterator[tuple[str, Document | Failure]]:
    """``file:line`` and the document there, line by line; a bad line is a Failure, and the rest go on.

    Scalar fields beyond the four become metadata; lists, objects and nulls (``"questions"``) are left out.
    A record without ``source`` gets ``file:line``. Memory holds one line; a line over ``max_bytes`` is refused.

    Raises:
        DocumentError: the file is binary.
        OSError: the file cannot be read.
    """
    with path.open("rb") as handle:
        if b"\0" in handle.read(8192):  # else every line of it would be a Failure of its own
            raise DocumentError(
                "a text must not be binary, and this file holds NUL bytes; if it is UTF-16, save it as UTF-8"
            )
        handle.seek(0)
        number = 0
        while line := handle.readline(max_bytes + 1):
            number += 1
            where = f"{printable(path)}:{number}"
            if len(line) > max_bytes:
                yield (
                    where,
                    Failure(where, f"a record must be at most {max_bytes:,} bytes, and this line is longer; split it"),
                )
                while line and not line.endswith(b"\n"):
                    line = handle.readline(1 << 20)
                continue
            try:
                if line.strip(b" \t\r\n\xef\xbb\xbf"):
                    yield where, _document(decode_utf8(line), where)
            except DocumentError as error:
                yield where, Failure(where, str(error))


def _document(line: str, where: str) -> Document:
    try:
        record = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"a line must be one JSON record, and this is not: {error}") from error
    if not isinstance(record, dict):
        raise DocumentError(f"a line must be a JSON object, not {_kind(record)}")
    for name in ("doc_id", "text"):
        if not isinstance(record.get(name), str):
            found = _kind(record[name]) if name in record else "missing"
            raise DocumentError(f'a record needs "{name}" as a string, and it is {found}')
    if not record["doc_id"].strip():
        raise DocumentError('a record\'s "doc_id" must not be empty')
    for name in ("title", "source"):
        if not isinstance(record.get(name), str | None):
            raise DocumentError(f'a record\'s "{name}" must be a string, not {_kind(record[name])}')
    return Document(
        doc_id=record["doc_id"],
        text=record["text"],
        title=record.get("title") or "",
        source=record.get("source") or where,
        metadata={
            key: value
            for key, value in record.items()
            if key not in _FIELDS and isinstance(value, str | int | float | bool)
        },
    )


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
