"""The command that measures a result again, out of the settings that the result keeps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lloco_engine.config import HINTS
from lloco_engine.eval import tasks
from lloco_engine.eval.tables import hints_of

__all__ = ["command"]

_WIDTH = 110
_TASKS_OWN = ("max_new_tokens", "min_new_tokens", "no_repeat_ngram")


def command(kind: str, name: str, result: Mapping[str, Any]) -> str:
    """The command line, with what differs from its defaults.

    Args:
        kind: the command: ``"eval"``, ``"bench"``, ``"memories"`` or ``"scores"``.
        name: the result's file without its suffix.
        result: what was read from it.
    """
    config = dict(result.get("config") or result.get("details", {}).get("config") or result)
    if kind == "eval":
        used = dict.fromkeys(hint for row in result["results"] for hint in hints_of(row, config))
        settings = _evaluated(config | {"hints": list(used)})
    else:
        settings = config
    return _wrapped(["lloco", kind, *_flags(kind, settings | {"json_out": f"results/{name}.json"})])


def _evaluated(config: dict[str, Any]) -> dict[str, Any]:
    """An evaluation's settings as its flags have them."""
    task = config.get("task", "plain")
    own = tasks.get(task)
    settings = {name: value for name, value in config.items() if getattr(own, name, None) != value}
    settings = {name: value for name, value in settings.items() if name not in _TASKS_OWN or value is not None}
    for hint, weight in HINTS.items():
        if hint not in config["hints"] or settings.get(hint) == weight:
            settings.pop(hint, None)
    settings |= {name: config[name]["name"] for name in ("decoder", "compressor")}
    settings["task"] = task
    if task == "plain":
        settings["data"] = config["data"]
    else:
        settings.pop("data", None)
        settings["data_folder"] = "DATA"
    settings["adapter"] = _adapters(config["adapter"])
    settings["methods"] = _adapters(",".join(config["methods"]))
    settings["ratios"] = ",".join(f"{ratio:g}" for ratio in config["ratios"])
    for name, value in config.get("task_settings", {}).items():
        if value != getattr(own, name, value):
            settings[name] = value
    return settings


def _adapters(names: str) -> str:
    """Adapters by folder, which results name by content."""
    return re.sub(r"([\w-]+)@[0-9a-f]{8}\b", r"results/adapters/\1", names)


def _flags(kind: str, settings: Mapping[str, Any]) -> list[str]:
    import typer

    from lloco_engine.eval.cli import register

    app = typer.Typer()
    register(app)
    parameters = typer.main.get_command(app).commands[kind].params  # type: ignore[attr-defined]
    flags: list[str] = []
    for parameter in parameters:
        value = settings.get(parameter.name)
        if isinstance(value, list | tuple):
            value = ",".join(map(str, value))
        if value in (None, "", parameter.default):
            continue
        if isinstance(value, bool):
            flags.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            flags.append(
                f"{parameter.opts[0]} {value:g}" if isinstance(value, float) else f"{parameter.opts[0]} {value}"
            )
    return flags


def _wrapped(parts: Sequence[str]) -> str:
    """A command over lines that go on."""
    lines = [""]
    for part in parts:
        if lines[-1] and len(lines[-1]) + 1 + len(part) > _WIDTH:
            lines[-1] += " \\"
            lines.append("  " + part)
        else:
            lines[-1] += (" " if lines[-1] else "") + part
    return "\n".join(lines)
