"""The settings of a question as parameters of the frameworks' classes: a new one is a parameter without a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_origin, get_type_hints

from lloco_engine import GenerateConfig, PrefixConfig, RetrieveConfig

__all__ = ["ANSWER", "SEARCH", "Setting", "ask_options", "check_search", "pydantic_fields"]

_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}  # as the frameworks' own models have it


@dataclass(frozen=True)
class Setting:
    """A parameter of a framework's class.

    Args:
        name: in the engine.
        hint: its type.
        default: None says nothing: it is as the engine was opened.
        help: what it does.
    """

    name: str
    hint: Any
    default: Any
    help: str


def _of(kind: type, without: str, *, own: bool) -> dict[str, Setting]:
    """The settings of a dataclass by the parameter that a framework has; ``own``: with its defaults, not the engine's.

    Args:
        kind: of the engine's settings.
        without: those that say something of this only are left out.
        own: whether a class has the defaults of its own.
    """
    hints, made = get_type_hints(kind), {}
    for one in fields(kind):
        if one.metadata.get("only") == without:
            continue
        hint = hints[one.name] | str if get_origin(hints[one.name]) is tuple else hints[one.name]
        if not own:
            hint = hint | None
        name = _NAMES.get(one.name, one.name)
        made[name] = Setting(one.name, hint, one.default if own else None, one.metadata["help"])
    return made


_GENERATE = _of(GenerateConfig, "search", own=True)
# of what asks a model, and of what searches
ANSWER = _GENERATE | _of(PrefixConfig, "search", own=False) | _of(RetrieveConfig, "search", own=False)
SEARCH = _of(RetrieveConfig, "answer", own=False)


def pydantic_fields(settings: Mapping[str, Setting]) -> dict[str, Any]:
    """The fields of a pydantic model that has these parameters, as `pydantic.create_model` takes them."""
    from pydantic import Field

    return {name: (one.hint, Field(default=one.default, description=one.help)) for name, one in settings.items()}


def ask_options(wanted: Callable[[str], Any], stop: str | Sequence[str] = ()) -> dict[str, Any]:
    """What `Engine.ask` takes for the parameters of a class.

    Args:
        wanted: the value of one of `ANSWER`.
        stop: texts that end the answer, or one.

    Raises:
        ConfigError: a value breaks its rule.
    """
    values = {one.name: wanted(name) for name, one in ANSWER.items() if name != "stop"}
    generate = {one.name: values.pop(one.name) for name, one in _GENERATE.items() if name != "stop"}
    _ = PrefixConfig().but(values), RetrieveConfig().but(values)  # what a class was given is refused where it is made
    return {"generate": GenerateConfig(**generate, stop=(stop,) if isinstance(stop, str) else tuple(stop)), **values}


def check_search(options: Mapping[str, Any]) -> None:
    """Refuse settings of a search that break their rule.

    Raises:
        ConfigError: one does.
    """
    RetrieveConfig().but(options)
