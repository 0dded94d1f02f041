"""Documents with questions about them, one JSON object a line: what adapters are trained on and evaluation reads.

::

    {"doc_id": str, "title": str, "text": str, "source": str,
     "questions": [{"id": str, "question": str, "answers": [str, ...]}, ...]}

``title``, ``source`` and a question's ``id`` may be left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lloco_engine.errors import DocumentError

__all__ = ["Question", "Record", "read_records"]


@dataclass(frozen=True)
class Question:
    """A question and its gold answers; the first one is the one whose loss is taken."""

    question: str
    answers: tuple[str, ...]
    id: str = ""


@dataclass(frozen=True)
class Record:
    """One document and the questions about it."""

    doc_id: str
    text: str
    questions: tuple[Question, ...]
    title: str = ""
    source: str = ""


def read_records(path: str | Path, limit: int | None = None) -> list[Record]:
    """The first ``limit`` documents of a JSON Lines file, or all; blank lines do not count.

    Raises:
        DocumentError: the file cannot be read or holds no question; or a line is not a record, named with its field.
    """
    records: list[Record] = []
    try:
        with Path(path).open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(records) >= limit:
                    break
                if line.strip():
                    records.append(_record(line, f"{path}, line {number}"))
    except OSError as error:
        raise DocumentError(f"the data file {path} cannot be read: {error.strerror}") from error
    if not any(record.questions for record in records):
        raise DocumentError(f"a data file must hold at least one question; {path} has none in {len(records)} documents")
    return records


def _record(line: bytes, where: str) -> Record:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DocumentError(f"{where}: a record must be UTF-8, and byte {error.start} of the line is not") from error
    except ValueError as error:
        raise DocumentError(f"{where}: a record must be a JSON object on one line: {error}") from error
    if not isinstance(value, dict):
        raise DocumentError(f"{where}: a record must be a JSON object, not {_shown(value)}")
    text = _text(value, "text", where)
    if not text.strip():
        raise DocumentError(f"{where}: field 'text' must not be empty")
    return Record(
        doc_id=_text(value, "doc_id", where),
        text=text,
        questions=tuple(_questions(value, where)),
        title=_text(value, "title", where, default=""),
        source=_text(value, "source", where, default=""),
    )


def _questions(record: Mapping[str, Any], where: str) -> Iterator[Question]:
    values = record.get("questions")
    if not isinstance(values, list):
        raise DocumentError(f"{where}: field 'questions' must be a list, not {_shown(values)}")
    for number, value in enumerate(values):
        place = f"{where}: field 'questions[{number}]"
        if not isinstance(value, dict):
            raise DocumentError(f"{place}' must be a JSON object, not {_shown(value)}")
        asked, answers = value.get("question"), value.get("answers")
        if not isinstance(asked, str) or not asked.strip():
            raise DocumentError(f"{place}.question' must be a text that is not empty, not {_shown(asked)}")
        if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
            raise DocumentError(f"{place}.answers' must be a list of at least one text, not {_shown(answers)}")
        identity = value.get("id", "")
        if not isinstance(identity, str):
            raise DocumentError(f"{place}.id' must be a text, not {_shown(identity)}")
        yield Question(asked, tuple(answers), identity)


def _text(record: Mapping[str, Any], field: str, where: str, default: str | None = None) -> str:
    value = record.get(field, default)
    if not isinstance(value, str):
        raise DocumentError(f"{where}: field {field!r} must be a text, not {_shown(value)}")
    return value


def _shown(value: object) -> str:
    shown = "missing" if value is None else repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
