"""Short factual questions about encyclopaedia passages."""

from __future__ import annotations

from lloco_engine.eval.tasks.base import Task

__all__ = ["WikiFacts"]


class WikiFacts(Task):
    """Passages of about 150 tokens."""

    name = "wikifacts"
    about = "encyclopaedia passages of ~150 tokens, short factual questions"
    where = "wikifacts"
