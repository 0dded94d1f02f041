"""What the classes of every framework call the settings of `GenerateConfig`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lloco_engine import GenerateConfig

__all__ = ["SETTINGS", "generate_config"]

# as the frameworks' own models have it where they have it
SETTINGS = {
    "max_tokens": "max_new_tokens",
    "reasoning_tokens": "reasoning_tokens",
    "min_tokens": "min_new_tokens",
    "no_repeat_ngram": "no_repeat_ngram",
    "beams": "beams",
    "hints": "hints",
    "spelling": "spelling",
    "pointing": "pointing",
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
}


def generate_config(wanted: Callable[[str], Any], stop: str | Sequence[str]) -> GenerateConfig:
    """How tokens are chosen.

    Args:
        wanted: the value of one of `SETTINGS`.
        stop: texts that end the answer, or one.

    Raises:
        ConfigError: a value breaks its rule.
    """
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    return GenerateConfig(stop=stop, **{ours: wanted(theirs) for theirs, ours in SETTINGS.items()})
