"""Four-way multiple choice about short stories (QuALITY, Pang et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

from lloco_engine.eval.data import Question
from lloco_engine.eval.tasks.base import Task
from lloco_engine.eval.tasks.choices import letter, options_of

__all__ = ["QuALITY"]


class QuALITY(Task):
    """Stories of about 6k tokens; the gold answer is the whole option, its letter before it."""

    name = "quality"
    about = "short stories of ~6k tokens, four-way multiple choice, the answer is the option"
    where = "quality"

    def options(self, question: Question) -> Sequence[str]:
        """The options with their letters, ``(A) ...``."""
        return [f"({letter(number)}) {text}" for number, text in enumerate(options_of(question.question))]
