"""Compressors by name: the engine's own, those of installed packages, and those that a user's file registers.

A package offers its own through the entry-point group ``lloco.compressors``::

    [project.entry-points."lloco.compressors"]
    key_norm = "my_package.key_norm:KeyNorm"

A file does with `register`; the command line and its worker processes run the files that ``$LLOCO_PLUGINS`` names
(``lloco --plugin FILE``), and nothing that a store or a document names.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from lloco_engine.compress.base import Compressor
from lloco_engine.errors import ConfigError

__all__ = ["GROUP", "NAMES", "PLUGINS", "get", "names", "register", "run_plugin"]

GROUP = "lloco.compressors"
PLUGINS = "LLOCO_PLUGINS"

_WHERE = {
    "autocompressor": ("lloco_engine.compress.summary", "SummaryEmbeddings"),
    "attention_matching": ("lloco_engine.compress.attention_matching", "AttentionMatching"),
    "kvzip": ("lloco_engine.compress.kvzip", "KVzip"),
    "snapkv": ("lloco_engine.compress.snapkv", "SnapKV"),
    "uncompressed": ("lloco_engine.compress.uncompressed", "Uncompressed"),
}
NAMES = tuple(_WHERE)  # the engine's own

_registered: dict[str, type[Compressor]] = {}
_run: set[Path] = set()  # plugins

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
    _run_plugins()
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


def run_plugin(path: str | Path) -> None:
    """Run a Python file of the user's, which registers compressors. A file is run once.

    Raises:
        ConfigError: it cannot be read, or fails.
    """
    file = Path(path).expanduser().resolve()
    if file in _run:
        return
    name = f"lloco_plugin_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file) if file.suffix == ".py" else None
    if spec is None or spec.loader is None:
        raise ConfigError(f"a plugin must be a Python file (.py), not {str(path)!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        del sys.modules[name]
        raise ConfigError(f"the plugin {path} failed: {type(error).__name__}: {error}") from error
    _run.add(file)


def _run_plugins() -> None:
    for path in filter(None, os.environ.get(PLUGINS, "").split(os.pathsep)):
        run_plugin(path)


def _class_of(name: str) -> type[Compressor]:
    if name in _WHERE:
        module, attribute = _WHERE[name]
        found: type[Compressor] = getattr(importlib.import_module(module), attribute)
        return found
    _run_plugins()
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
