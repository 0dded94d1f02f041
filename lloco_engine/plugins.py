"""A user's Python files, which register compressors and kinds of memory of their own.

The command line and its worker processes run the files that ``$LLOCO_PLUGINS`` names (``lloco --plugin FILE``), and
nothing that a store or a document names.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from lloco_engine.errors import ConfigError

__all__ = ["PLUGINS", "run_plugin", "run_plugins"]

PLUGINS = "LLOCO_PLUGINS"

_run: set[Path] = set()


def run_plugin(path: str | Path) -> None:
    """Run a Python file of the user's. A file is run once.

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


def run_plugins() -> None:
    """Run the files that ``$LLOCO_PLUGINS`` names."""
    for path in filter(None, os.environ.get(PLUGINS, "").split(os.pathsep)):
        run_plugin(path)
