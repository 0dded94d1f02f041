"""Questions about scientific papers (Qasper, Dasigi et al. 2021; SCROLLS scores it by F1)."""

from __future__ import annotations

from lloco_engine.eval.tasks.base import Task

__all__ = ["Qasper"]


class Qasper(Task):
    """Papers of about 4k tokens, free-form answers."""

    name = "qasper"
    about = "scientific papers of ~4k tokens, free-form answers"
    where = "qasper"
    max_new_tokens = 48
