"""The contract of a published data set: its files in, records out, and what was wrong with those left out."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lloco_engine.errors import DocumentError
from lloco_engine.readers.records import Question, Record

__all__ = ["Bad", "Documents", "Published", "json_lines", "shown", "text_of"]


@dataclass(frozen=True)
class Bad:
    """A record that was left out: where it stands, and the rule that it broke."""

    reason: str


class Published(ABC):
    """Reads one data set.

    name    : what ``lloco data`` calls it.
    about   : one line for ``--help``: what is read.
    splits  : names of its parts.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    splits: ClassVar[tuple[str, ...]]

    @abstractmethod
    def read(self, source: Path, split: str) -> Iterator[Record | Bad]:
        """The records of a part of the data set.

        Args:
            source: its file, or the folder it was unpacked to.
            split: of `splits`.

        Raises:
            DocumentError: a file cannot be read at all.
        """

    def fetch(self, split: str) -> Path:
        """The data set's file from the hub.

        Raises:
            DocumentError: it is not on the hub in this form, or the hub cannot be reached.
        """
        raise DocumentError(
            f"{self.name} is not on the hub in the form that is read here: download it and name it ({self.about})"
        )


@dataclass
class Documents:
    """Documents in the making, where the questions about one are spread over several records."""

    made: dict[str, _Document] = field(default_factory=dict)

    def add(self, doc_id: str, text: str, question: Question, *, title: str = "", source: str = "") -> None:
        """A question; the same one again (by its id) brings further answers."""
        document = self.made.setdefault(doc_id, _Document(text, title, source))
        kept = document.questions.get(question.id)
        if kept is not None:
            question = Question(kept.question, tuple(dict.fromkeys((*kept.answers, *question.answers))), kept.id)
        document.questions[question.id] = question

    def records(self) -> Iterator[Record]:
        """The documents, in the order of their first questions."""
        for doc_id, each in self.made.items():
            yield Record(doc_id, each.text, tuple(each.questions.values()), each.title, each.source)


@dataclass
class _Document:
    text: str
    title: str
    source: str
    questions: dict[str, Question] = field(default_factory=dict)


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each line stands, and its JSON value, or a `DocumentError` in its place.

    Raises:
        DocumentError: the file cannot be read.
    """
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{path.name}, line {number}"
                    try:
                        yield where, json.loads(line.decode("utf-8-sig"))
                    except (UnicodeDecodeError, ValueError) as error:
                        yield where, DocumentError(f"{where}: a record must be a JSON object in UTF-8: {error}")
    except OSError as error:
        raise DocumentError(f"the data file {path} cannot be read: {error.strerror}") from error


def text_of(record: Any, name: str, where: str) -> str:
    """A field that must be a text with something in it.

    Raises:
        DocumentError: it is not, or the record is no JSON object.
    """
    if isinstance(record, DocumentError):
        raise record
    if not isinstance(record, Mapping):
        raise DocumentError(f"{where}: a record must be a JSON object, not {shown(record)}")
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DocumentError(f"{where}: field {name!r} must be a text that is not empty, not {shown(value)}")
    return value


def shown(value: object) -> str:
    """A value for a message, cut short."""
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
