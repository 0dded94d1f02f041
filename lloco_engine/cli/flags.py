"""Flags that are made of the settings of a question: a new setting is a flag without a line here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from functools import wraps
from typing import Annotated, Any, get_origin, get_type_hints

import typer

from lloco_engine.config import Config
from lloco_engine.errors import ConfigError
from lloco_engine.request import SETTINGS

__all__ = ["with_settings"]


def with_settings(command: Callable[..., None], like: Callable[..., None]) -> Callable[..., None]:
    """A command with the parameters of another function, and with a flag for each setting of a question.

    Args:
        command: called with what the parameters of ``like`` are given, by name, and with ``settings``: the keyword
            arguments of `Engine.ask` that the flags stand for, `lloco_engine.request.SETTINGS`.
        like: whose parameters are the command's too.
    """
    flags = {one.name: one for kind in SETTINGS.values() for one in fields(kind)}
    hints = {name: hint for kind in SETTINGS.values() for name, hint in get_type_hints(kind).items()}
    own = list(inspect.signature(like, eval_str=True).parameters.values())
    derived = [_parameter(one, hints[name]) for name, one in flags.items()]

    @wraps(command)
    def run(**given: Any) -> None:
        values = {name: given.pop(name) for name in flags}
        command(**given, settings=_settings(values))

    run.__signature__ = inspect.Signature([*own, *derived])  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in (*own, *derived)}
    return run


def _parameter(one: Field[Any], hint: Any) -> inspect.Parameter:
    """The flag of a setting as a parameter that Typer reads."""
    said = one.metadata
    name = f"--{one.name.replace('_', '-')}"
    default = one.default
    names = (name, *said.get("flags", ()))
    if "switch" in said:
        hint, default, names = bool, False, (f"--{said['switch']}",)
    elif hint is bool:
        names = (f"{name}/--no-{name[2:]}",)
    elif get_origin(hint) is tuple:
        hint, default = list[str] | None, None
    option = typer.Option(
        *names, help=said["help"], min=said.get("least"), max=said.get("most"), metavar=said.get("metavar")
    )
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(one.name, kind, default=default, annotation=Annotated[hint, option])


def _settings(values: Mapping[str, Any]) -> dict[str, Config]:
    """What the flags say, as settings.

    Raises:
        typer.BadParameter: a value breaks its rule.
    """
    made: dict[str, Config] = {}
    for name, kind in SETTINGS.items():
        own = {one.name: _value(one, values[one.name]) for one in fields(kind)}
        try:
            made[name] = kind(**own)
        except ConfigError as error:
            raise typer.BadParameter(str(error)) from error
    return made


def _value(one: Field[Any], given: Any) -> Any:
    if "switch" in one.metadata:
        return one.metadata["switch"] if given else one.default
    return one.default if given is None else given
