"""HotpotQA, distractor setting (Yang et al. 2018): one JSON list.

``[{"_id", "question", "answer", "context": [[title, [sentence, ...]], ...]}, ...]``: ten paragraphs a question, two of
which hold the answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lloco_engine.errors import DocumentError
from lloco_engine.eval.published.base import Bad, Published, shown, text_of
from lloco_engine.readers.records import Question, Record

__all__ = ["HotpotQA"]


class HotpotQA(Published):
    """A document is the ten paragraphs of a question, each after its title."""

    name = "hotpotqa"
    about = "hotpot_SPLIT_distractor_v1.json or hotpot_train_v1.1.json, or the folder with them"
    splits = ("dev", "train")

    def read(self, source: Path, split: str) -> Iterator[Record | Bad]:
        """See `Published.read`."""
        path = source
        if source.is_dir():
            path = source / ("hotpot_dev_distractor_v1.json" if split == "dev" else "hotpot_train_v1.1.json")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DocumentError(f"the data file {path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise DocumentError(f"the data file {path} must be JSON in UTF-8: {error}") from error
        if not isinstance(values, list):
            raise DocumentError(f"the data file {path} must be a JSON list, not {shown(values)}")
        for number, value in enumerate(values):
            try:
                yield _record(value, f"{path.name}, record {number}")
            except DocumentError as error:
                yield Bad(str(error))


def _record(value: Any, where: str) -> Record:
    identity, question, answer = (text_of(value, name, where) for name in ("_id", "question", "answer"))
    context = value.get("context")
    if not isinstance(context, list) or not context:
        raise DocumentError(f"{where}: field 'context' must be a list of paragraphs, not {shown(context)}")
    paragraphs = [_paragraph(each, f"{where}, context[{number}]") for number, each in enumerate(context)]
    return Record(identity, "\n\n".join(paragraphs), (Question(question, (answer,), identity),), source="HotpotQA")


def _paragraph(value: Any, where: str) -> str:
    match value:
        case [str() as title, [*sentences]] if all(isinstance(each, str) for each in sentences):
            return f"{title}\n{''.join(sentences).strip()}"
    raise DocumentError(f"{where} must be a title and a list of sentences, not {shown(value)}")
