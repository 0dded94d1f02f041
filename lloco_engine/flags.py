"""Flags that are made of settings: a new `lloco_engine.config.setting` is a flag without a line here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from functools import wraps
from typing import Annotated, Any, cast, get_origin, get_type_hints

import typer

from lloco_engine.config import Config
from lloco_engine.errors import ConfigError

__all__ = ["split", "values_of", "with_flags"]


def with_flags(
    command: Callable[..., None], like: Callable[..., None], kinds: Sequence[type[Config]], after: str = ""
) -> Callable[..., None]:
    """A command with the parameters of another function, and with a flag for each setting of some kinds.

    Args:
        command: called with what the parameters of ``like`` are given, by name, and with ``settings``: the values of
            the settings that the flags stand for, by name.
        like: whose parameters are the command's too.
        kinds: whose settings.
        after: the parameter of ``like`` that the flags come after; "" is the last.
    """
    flags = {one.name: one for kind in kinds for one in fields(kind) if "help" in one.metadata}  # type: ignore[arg-type]
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    own = list(inspect.signature(like, eval_str=True).parameters.values())
    at = next((number for number, one in enumerate(own, 1) if one.name == after), len(own))
    parameters = [*own[:at], *(_parameter(one, hints[name]) for name, one in flags.items()), *own[at:]]
    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]

    @wraps(command)
    def run(**given: Any) -> None:
        command(settings={name: _value(one, given.pop(name)) for name, one in flags.items()}, **given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def values_of(settings: Mapping[str, Any], kinds: Mapping[str, type[Config]]) -> dict[str, Config]:
    """Values of several kinds together as one object of each.

    Raises:
        typer.BadParameter: a value breaks its rule.
    """
    try:
        return {
            name: kind(**{one.name: settings[one.name] for one in fields(kind)})  # type: ignore[arg-type]
            for name, kind in kinds.items()
        }
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


def split(text: str, each: Callable[[str], Any], flag: str) -> list[Any]:
    """What stands between a text's commas.

    Raises:
        typer.BadParameter: a part is none of ``each``.
    """
    try:
        return [each(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise typer.BadParameter(f"must be numbers with commas between them, not {text!r}", param_hint=flag) from error


def _flag(one: Field[Any]) -> str:
    return f"--{one.name.replace('_', '-')}"


def _parameter(one: Field[Any], hint: Any) -> inspect.Parameter:
    """The flag of a setting as a parameter that Typer reads."""
    said = one.metadata
    name, default = _flag(one), cast("Any", one.default)
    names = (name, *said.get("flags", ()))
    if "switch" in said:
        hint, default, names = bool, False, (f"--{said['switch']}",)
    elif hint is bool:
        names = (f"{name}/--no-{name[2:]}",)
    elif "each" in said:
        hint, default = str, ",".join(f"{part:g}" if isinstance(part, int | float) else part for part in default)
    elif get_origin(hint) is tuple:
        hint, default = list[str] | None, None
    option = typer.Option(
        *names,
        help=said["help"],
        min=said.get("least"),
        max=said.get("most"),
        metavar=said.get("metavar"),
        envvar=said.get("envvar"),
    )
    return inspect.Parameter(
        one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, option]
    )


def _value(one: Field[Any], given: Any) -> Any:
    if "switch" in one.metadata:
        return one.metadata["switch"] if given else one.default
    if "each" in one.metadata:
        return tuple(split(given, one.metadata["each"], _flag(one)))
    return one.default if given is None else given
