"""The application: its commands, and what every one of them does with an error."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lloco_engine import __version__
from lloco_engine.cli import adapters, ask, documents, ingest, maintenance, refine, serve
from lloco_engine.errors import LLoCOError

__all__ = ["app", "main"]


COMMANDS = "lloco.commands"  # entry points of installed packages, each a `typer.Typer` with one command


class _Group(TyperGroup):
    """Turns the engine's errors into one line on stderr and exit code 1, for every command; and has the commands of
    other packages beside the engine's own."""

    def list_commands(self, ctx: Any) -> list[str]:
        own = super().list_commands(ctx)
        return own + sorted(point.name for point in entry_points(group=COMMANDS) if point.name not in own)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if (own := super().get_command(ctx, cmd_name)) is not None:
            return own
        found = next(iter(entry_points(group=COMMANDS, name=cmd_name)), None)
        if found is None:
            return None
        command = typer.main.get_command(found.load())
        command.name = cmd_name
        return command

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LLoCOError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from error


app = typer.Typer(
    name="lloco",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"lloco {__version__}")
        raise typer.Exit


@app.callback()
def lloco(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    plugin: Annotated[
        list[Path] | None,
        typer.Option(
            "--plugin",
            metavar="FILE",
            help="A Python file to run first, which registers compressors; repeatable. Also $LLOCO_PLUGINS.",
        ),
    ] = None,
) -> None:
    """Ask your documents: compressed offline into memories that the decoder reads
    directly.

    \b
    Examples:
      lloco ingest docs/ notes.pdf
      lloco ask "What does the pump in hall 3 need?"

    Exit codes: 0 done, 1 something failed (the reason is on stderr), 2 wrong usage, 130 interrupted.
    """
    if plugin:  # by the environment, so that worker processes run them too
        files = [*filter(None, [os.environ.get("LLOCO_PLUGINS")]), *map(str, plugin)]
        os.environ["LLOCO_PLUGINS"] = os.pathsep.join(files)


ingest.register(app)
refine.register(app)
ask.register(app)
documents.register(app)
maintenance.register(app)
adapters.register(app)
serve.register(app)
import_module("lloco_engine.finetune.cli").register(app)
try:
    import_module("lloco_engine.eval.cli").register(app)
except ModuleNotFoundError as error:  # the measuring commands can be left out of an installation
    if error.name not in ("lloco_engine.eval", "lloco_engine.eval.cli"):
        raise


def main() -> None:
    """Run ``lloco`` with the process's arguments."""
    app(prog_name="lloco")
