"""Four-way multiple choice about lectures (TOEFL practice, Tseng et al. 2016, in the form of L-Eval)."""

from __future__ import annotations

from collections.abc import Sequence

from lloco_engine.eval.data import Question
from lloco_engine.eval.tasks.base import Task
from lloco_engine.eval.tasks.choices import letter, options_of

__all__ = ["TPO"]


class TPO(Task):
    """Lectures of about 4k tokens; the gold answer is a letter."""

    name = "tpo"
    about = "lectures of ~4k tokens, four-way multiple choice, the answer is a letter"
    scores = ("f1", "em")
    where = "tpo"

    def options(self, question: Question) -> Sequence[str]:
        """The letters of the options."""
        return [letter(number) for number in range(len(options_of(question.question)))]
