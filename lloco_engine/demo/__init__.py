"""A corpus to try the engine on, and questions about it that only its documents can answer.

Every place, firm, person and machine in it is invented, so a decoder cannot know the answers beforehand.
Run it with ``python -m lloco_engine.demo``. SOURCES.md says who wrote the documents and under which licence.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Question", "documents_folder", "hard_questions", "questions"]

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Question:
    """One question about the corpus.

    ``answers`` are accepted short answers, best first; ``evidence`` is the sentence of the document ``doc_id`` that
    holds each of them, verbatim.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    doc_id: str
    evidence: str


def documents_folder() -> Path:
    """The folder to ingest, in four formats. Ingested as a whole, its ids are those in `Question.doc_id`."""
    return _HERE / "documents"


def questions() -> list[Question]:
    """All questions, in the order of the file: each document's own stand together."""
    records = json.loads((_HERE / "questions.json").read_text(encoding="utf-8"))
    return [Question(**{**record, "answers": tuple(record["answers"])}) for record in records]


def hard_questions() -> dict[str, Any]:
    """What search must not take for one of `questions`.

    Returns:
        ``"foreign"``, questions about the world; ``"near"``, about what the documents are about, which they do not
        answer; ``"follow_ups"``, each with the turn ``before`` it and that one's ``answer``, else as a `Question`.
    """
    read: dict[str, Any] = json.loads((_HERE / "hard_questions.json").read_text(encoding="utf-8"))
    return read
