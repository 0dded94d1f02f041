"""JSON Lines: one record, one document: ``{"doc_id", "text"}``, optionally ``"title"``, ``"source"``, and metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from lloco_engine.config import ReadConfig
from lloco_engine.documents import printable
from lloco_engine.errors import ConfigError, DocumentError
from lloco_engine.metadata import plain_metadata
from lloco_engine.readers.encodings import UnclearEncoding, decode, find_encoding, is_wide
from lloco_engine.readers.walk import open_file
from lloco_engine.types import Document, Failure, MetadataValue

__all__ = ["read_jsonl"]

_HEAD = 256 * 1024  # bytes that the encoding of a file is told from
_FIELDS = ("doc_id", "text", "title", "source")
_LEFT_OUT = "questions"  # with their answers: what adapters learn from, never what a model is told (readers/records.py)


def read_jsonl(path: Path, config: ReadConfig) -> Iterator[tuple[str, Document | Failure]]:
    """``file:line`` and the document there, line by line; a bad line is a Failure, and the rest go on.

    Fields beyond the four become metadata, whatever they hold, but for ``"questions"`` of `readers.records`.
    A record without ``source`` gets ``file:line``. Memory holds one line; a line over the limit is refused.

    Raises:
        DocumentError: the file is binary, or its encoding cannot be told.
        OSError: the file cannot be read.
    """
    most = min(config.max_bytes, 4 * config.max_text)
    with open_file(path) as handle:
        head = handle.read(_HEAD)
        encoding, mark = _encoding(head)
        handle.seek(mark)
        end = "\n".encode(encoding) if is_wide(encoding) else b"\n"
        for number, line in enumerate(_lines(handle, end, most), 1):
            where = f"{printable(path)}:{number}"
            if line is None:
                yield (
                    where,
                    Failure(where, f"a record must be at most {most:,} bytes, and this line is longer; split it"),
                )
                continue
            try:
                if (text := _decoded(line, encoding)).strip():
                    yield where, replace(_document(text, where), encoding=encoding)
            except DocumentError as error:
                yield where, Failure(where, str(error))


def _encoding(head: bytes) -> tuple[str, int]:
    """The encoding of a file's lines and the length of its mark; UTF-8 where most lines are or none can be told, so
    that one bad line does not spoil the others."""
    beyond = [line for line in head.split(b"\n")[:-1] if not line.isascii()]
    good = sum(_is_utf8(line) for line in beyond)
    try:
        encoding, mark = find_encoding(head, whole=len(head) < _HEAD)
    except UnclearEncoding:
        return "utf-8", 0
    return ("utf-8", 0) if not mark and not is_wide(encoding) and 2 * good >= len(beyond) else (encoding, mark)


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _lines(handle: BinaryIO, end: bytes, most: int) -> Iterator[bytes | None]:
    """The lines of a file that end in ``end``, None for one of more than ``most`` bytes, of which no more is held."""
    parts: list[bytes] = []
    size = 0
    while part := handle.readline(most + 1 - size if size <= most else 1 << 20):
        size += len(part)
        if size <= most:
            parts.append(part)
        else:
            parts.clear()
        ended = part.endswith(b"\n")
        if (
            ended and len(end) > 1 and (extra := -size % len(end))
        ):  # the rest of the character, or not a line end at all
            rest = handle.read(extra)
            size += len(rest)
            part += rest
            if parts:
                parts.append(rest)
        if ended and part.endswith(end) and size % len(end) == 0:
            yield b"".join(parts) if size <= most else None
            parts, size = [], 0
    if size:
        yield b"".join(parts) if size <= most else None


def _decoded(line: bytes, encoding: str) -> str:
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding == "utf-8":
            return decode(line)[0]  # one line of another encoding among many
        raise DocumentError(
            f"a text must be {encoding}, and byte {error.start} of the line is not; save it as UTF-8"
        ) from error


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
    for name in ("title", "source"):
        if not isinstance(record.get(name), str | None):
            raise DocumentError(f'a record\'s "{name}" must be a string, not {_kind(record[name])}')
    return Document(
        doc_id=record["doc_id"],
        text=record["text"],
        title=record.get("title") or "",
        source=record.get("source") or where,
        metadata=_metadata({key: value for key, value in record.items() if key not in (*_FIELDS, _LEFT_OUT)}),
    )


def _metadata(values: dict[str, Any]) -> dict[str, MetadataValue]:
    try:
        return plain_metadata(values)
    except ConfigError as error:
        raise DocumentError(f"in a record, {error}") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
