"""Compressors by name: the engine's own, those of installed packages, and those that a user's file registers.

A package offers its own through the entry-point group ``lloco.compressors``::

    [project.entry-points."lloco.compressors"]
    key_norm = "my_package.key_norm:KeyNorm"

A file does with `register` (`lloco_engine.plugins`).
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any, TypeVar

from lloco_engine.compress.base import Compressor
from lloco_engine.errors import ConfigError
from lloco_engine.plugins import run_plugins

__all__ = ["GROUP", "NAMES", "get", "names", "register"]

GROUP = "lloco.compressors"

_WHERE = {
    "autocompressor": ("lloco_engine.compress.summary", "SummaryEmbeddings"),
    "attention_matching": ("lloco_engine.compress.attention_matching", "AttentionMatching"),
    "kvzip": ("lloco_engine.compress.kvzip", "KVzip"),
    "snapkv": ("lloco_engine.compress.snapkv", "SnapKV"),
    "uncompressed": ("lloco_engine.compress.uncompressed", "Uncompressed"),
}
NAMES = tuple(_WHERE)  # the engine's own

_registered: dict[str, type[Compressor]] = {}

_Class = TypeVar("_Class", bound=type[Compressor])


def register(compressor: _Class) -> _Class:
    """Make a compressor known by its ``name``, in this process. Also a decorator. Returns the class.

    Raises:
        ConfigError: the class is no `Compressor`, has no name, or the name is another's.
    """
    if not isinstance(compressor, type) or not issubclass(compressor, Compressor):
        raise ConfigError(f"a compressor must be a class derived from Compressor, not {compressor!r}")
    name = getattr(compressor, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(f"a compressor's name must be letters, digits and _, not {name!r} ({compressor.__name__})")
    known = _registered.get(name)
    if name in _WHERE or (known is not None and _is_another(known, compressor)):
        raise ConfigError(f"the compressor {name!r} is there already: give {compressor.__name__} another name")
    _registered[name] = compressor
    return compressor


def names() -> list[str]:
    """Names of all compressors that can be asked for."""
    run_plugins()
    return sorted({*_WHERE, *_registered, *(point.name for point in entry_points(group=GROUP))})


def get(name: str, **settings: Any) -> Compressor:
    """The compressor of a name.

    Raises:
        ConfigError: the name or a setting is unknown, or a setting breaks its rule.
    """
    made = _class_of(name)
    try:
        return made(**settings)
    except TypeError as error:
        raise ConfigError(f"compressor {name!r}: {error}") from error


def _class_of(name: str) -> type[Compressor]:
    if name in _WHERE:
        module, attribute = _WHERE[name]
        found: type[Compressor] = getattr(importlib.import_module(module), attribute)
        return found
    run_plugins()
    if name not in _registered:
        for point in entry_points(group=GROUP, name=name):
            register(point.load())
    if name not in _registered:
        raise ConfigError(
            f"compressor must be one of {', '.join(names())}, not {name!r}; one of your own is registered by "
            "lloco_engine.register, or with `lloco --plugin FILE`"
        )
    return _registered[name]


def _is_another(known: type[Compressor], compressor: type[Compressor]) -> bool:
    """Whether two classes are not one that was defined again, as a notebook's cell does."""
    return (known.__module__, known.__qualname__) != (compressor.__module__, compressor.__qualname__)
