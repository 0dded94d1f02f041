"""Flags of commands: those that several have, and those made of settings, which are a line in their dataclass each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from functools import wraps
from typing import Annotated, Any, cast, get_args, get_origin, get_type_hints

import typer

from lloco_engine.config import Config
from lloco_engine.errors import ConfigError

__all__ = ["AsJSON", "Device", "Options", "split", "values_of", "with_flags", "with_options"]

Device = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="cpu, cuda, cuda:N or mps. Default: the best there is.")
]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else there.")]


@dataclass(frozen=True)
class Options:
    """Says of a command's parameter that it is made of several options, as ``Annotated[KIND, Options(make)]``.

    Args:
        make: its parameters are the options, and what it returns is given to the command.
    """

    make: Callable[..., Any]


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command in whose signature the options stand that its parameters are made of (`Options`)."""
    parameters: list[inspect.Parameter] = []
    made: dict[str, tuple[Callable[..., Any], list[str]]] = {}
    for one in inspect.signature(command, eval_str=True).parameters.values():
        group = next((part for part in get_args(one.annotation) if isinstance(part, Options)), None)
        parts = [one] if group is None else list(inspect.signature(group.make, eval_str=True).parameters.values())
        if group is not None:
            made[one.name] = group.make, [part.name for part in parts]
        parameters += parts

    @wraps(command)
    def run(**given: Any) -> None:
        values = {
            name: make(**{option: given.pop(option) for option in options}) for name, (make, options) in made.items()
        }
        command(**given, **values)

    return _signed(run, parameters)


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

    @wraps(command)
    def run(**given: Any) -> None:
        command(settings={name: _value(one, given.pop(name)) for name, one in flags.items()}, **given)

    return _signed(run, parameters)


def _signed(command: Callable[..., None], parameters: Sequence[inspect.Parameter]) -> Callable[..., None]:
    """Give a command, which takes anything by name, the parameters that Typer reads."""
    named = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
    command.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in named}
    return command


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
