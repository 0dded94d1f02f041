"""Compressors by name. A new method is one file and one line here."""

from __future__ import annotations

import importlib
from typing import Any

from lloco_engine.compress.base import Compressor
from lloco_engine.errors import ConfigError

__all__ = ["NAMES", "get"]

_WHERE = {
    "autocompressor": ("lloco_engine.compress.summary", "SummaryEmbeddings"),
    "attention_matching": ("lloco_engine.compress.attention_matching", "AttentionMatching"),
    "kvzip": ("lloco_engine.compress.kvzip", "KVzip"),
    "snapkv": ("lloco_engine.compress.snapkv", "SnapKV"),
    "uncompressed": ("lloco_engine.compress.uncompressed", "Uncompressed"),
}
NAMES = tuple(_WHERE)


def get(name: str, **settings: Any) -> Compressor:
    """The compressor of a name.

    Raises:
        ConfigError: the name or a setting is unknown, or a setting breaks its rule.
    """
    if name not in _WHERE:
        raise ConfigError(f"compressor must be one of {', '.join(NAMES)}, not {name!r}")
    module, attribute = _WHERE[name]
    try:
        made: Compressor = getattr(importlib.import_module(module), attribute)(**settings)
    except TypeError as error:
        raise ConfigError(f"compressor {name!r}: {error}") from error
    return made
