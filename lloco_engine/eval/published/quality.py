"""QuALITY v1.0.1 (Pang et al. 2022): JSON Lines, an article with one writer's questions a line.

``{"article_id", "title", "article", "questions": [{"question", "question_unique_id", "options", "gold_label"}, ...]}``;
several writers wrote about one article.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lloco_engine.errors import DocumentError
from lloco_engine.eval.published.base import Bad, Documents, Published, json_lines, shown, text_of
from lloco_engine.eval.tasks.choices import letter, with_options
from lloco_engine.readers.records import Question, Record

__all__ = ["QuALITY"]


class QuALITY(Published):
    """Options are written into the question, and the gold answer is the right one with its letter."""

    name = "quality"
    about = "QuALITY.v1.0.1.htmlstripped.SPLIT, or the folder with it"
    splits = ("train", "dev")

    def read(self, source: Path, split: str) -> Iterator[Record | Bad]:
        """See `Published.read`."""
        path = source / f"QuALITY.v1.0.1.htmlstripped.{split}" if source.is_dir() else source
        documents = Documents()
        for where, line in json_lines(path):
            try:
                doc_id, article = text_of(line, "article_id", where), text_of(line, "article", where)
                questions = line.get("questions")
                if not isinstance(questions, list):
                    raise DocumentError(f"{where}: field 'questions' must be a list, not {shown(questions)}")
            except DocumentError as error:
                yield Bad(str(error))
                continue
            for number, value in enumerate(questions):
                try:
                    question = _question(value, f"{where}, questions[{number}]")
                except DocumentError as error:
                    yield Bad(str(error))
                else:
                    title = str(line.get("title") or "")
                    documents.add(doc_id, article, question, title=title, source="QuALITY v1.0.1")
        yield from documents.records()


def _question(value: Any, where: str) -> Question:
    asked, identity = text_of(value, "question", where), text_of(value, "question_unique_id", where)
    options, gold = value.get("options"), value.get("gold_label")
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(each, str) for each in options):
        raise DocumentError(f"{where}: field 'options' must be a list of at least two texts, not {shown(options)}")
    if not isinstance(gold, int) or not 1 <= gold <= len(options):
        raise DocumentError(f"{where}: field 'gold_label' must be 1 to {len(options)}, not {shown(gold)}")
    options = [" ".join(each.split()) for each in options]  # an option is one line
    return Question(with_options(asked, options), (f"({letter(gold - 1)}) {options[gold - 1]}",), identity)
