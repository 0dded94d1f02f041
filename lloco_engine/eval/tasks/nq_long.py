"""Natural Questions over whole pages (Kwiatkowski et al. 2019, in the form of L-Eval)."""

from __future__ import annotations

from lloco_engine.eval.tasks.base import Task

__all__ = ["NQLong"]


class NQLong(Task):
    """Encyclopaedia pages of about 25k tokens, short answers."""

    name = "nq_long"
    about = "encyclopaedia pages of ~25k tokens, short answers"
    where = "nq_long"
