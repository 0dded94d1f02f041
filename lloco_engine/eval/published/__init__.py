"""Published data sets, as they are published, turned into records. A new one is one file and one line here."""

from __future__ import annotations

import importlib

from lloco_engine.errors import ConfigError
from lloco_engine.eval.published.base import Bad, Published

__all__ = ["NAMES", "Bad", "Published", "get"]

_WHERE = {
    "quality": ("lloco_engine.eval.published.quality", "QuALITY"),
    "qasper": ("lloco_engine.eval.published.scrolls", "Qasper"),
    "qmsum": ("lloco_engine.eval.published.scrolls", "QMSum"),
    "narrative_qa": ("lloco_engine.eval.published.scrolls", "NarrativeQA"),
    "hotpotqa": ("lloco_engine.eval.published.hotpotqa", "HotpotQA"),
    "narrativeqa_csv": ("lloco_engine.eval.published.narrativeqa", "NarrativeQACSV"),
}
NAMES = tuple(_WHERE)


def get(name: str) -> Published:
    """The data set of a name.

    Raises:
        ConfigError: the name is unknown.
    """
    if name not in _WHERE:
        raise ConfigError(f"a data set must be one of {', '.join(NAMES)}, not {name!r}")
    module, attribute = _WHERE[name]
    made: Published = getattr(importlib.import_module(module), attribute)()
    return made
