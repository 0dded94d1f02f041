"""Tasks by name. A new one is one file and one line here."""

from __future__ import annotations

import importlib
from typing import Any

from lloco_engine.errors import ConfigError
from lloco_engine.eval.tasks.base import Task

__all__ = ["NAMES", "get"]

_WHERE = {
    "plain": "Plain",
    "wikifacts": "WikiFacts",
    "qmsum": "QMSum",
    "qasper": "Qasper",
    "quality": "QuALITY",
    "nq_long": "NQLong",
    "tpo": "TPO",
    "needle": "Needle",
}
NAMES = tuple(_WHERE)


def get(name: str, **settings: Any) -> Task:
    """The task of a name.

    Raises:
        ConfigError: the name or a setting is unknown, or a setting breaks its rule.
    """
    if name not in _WHERE:
        raise ConfigError(f"task must be one of {', '.join(NAMES)}, not {name!r}")
    try:
        made: Task = getattr(importlib.import_module(f"lloco_engine.eval.tasks.{name}"), _WHERE[name])(**settings)
    except TypeError as error:
        raise ConfigError(f"task {name!r} has no such setting: {error}") from error
    return made
