"""Query-focused summaries of meetings (QMSum, Zhong et al. 2021; SCROLLS scores it by ROUGE)."""

from __future__ import annotations

from lloco_engine.eval.tasks.base import Task

__all__ = ["QMSum"]


class QMSum(Task):
    """Meetings of about 14k tokens; an answer is a summary of a few sentences."""

    name = "qmsum"
    about = "meetings of ~14k tokens, query-focused summaries"
    where = "qmsum"
    scores = ("f1", "rouge")
    max_new_tokens = 96
    min_new_tokens = 48  # gold summaries have 83 on average, and this decoder would be content with a sentence
    no_repeat_ngram = 3  # greedy summaries of a small decoder go round in circles, whatever it reads
