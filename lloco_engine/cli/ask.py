"""``lloco ask`` and ``lloco compare``: questions to the store."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lloco_engine.cli import stores
from lloco_engine.cli.options import (
    Adapter,
    AsJSON,
    FilterTerms,
    Models,
    StoreDir,
    Tenant,
    parse_filters,
)
from lloco_engine.cli.output import answer_json, print_answer_details, print_json, print_table, safe, usage_line
from lloco_engine.flags import values_of, with_flags, with_options
from lloco_engine.request import SETTINGS
from lloco_engine.types import Answer, Turn

if TYPE_CHECKING:
    from lloco_engine.engine import Engine

__all__ = ["register"]

Question = Annotated[str, typer.Argument(help="The question, in quotes.", show_default=False)]
Whole = Annotated[
    str | None, typer.Option("--whole-document", metavar="ID", help="Read all of one document instead of searching.")
]
HistoryFile = Annotated[
    Path | None,
    typer.Option(
        "--history",
        metavar="FILE",
        help='The conversation before: a JSON list of {"role": "user" or "assistant", "content": TEXT}.',
    ),
]

# answers a question: of an engine, as asked for, as JSON or not
Answering = Callable[["Engine", str, Mapping[str, Any], bool], None]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command()(_command(ask))
    app.command()(_command(compare))


def ask(engine: Engine, question: str, wanted: Mapping[str, Any], as_json: bool) -> None:
    """Answer a question from the store.

    The answer is streamed; its sources, word for word, and its cost follow.

    \b
    Examples:
      lloco ask "Who repaired the crane?"
      lloco ask "What changed?" --filter 'year>=2020' --filter team=pumps -k 2
      lloco ask "What failed?" --filter 'season in spring,autumn' --filter 'fixed missing'
      lloco ask "Sum it up." --whole-document report.pdf --min-new-tokens 48 --no-repeat-ngram 3 --beams 4
      lloco ask "Who repaired the crane?" --min-score 0.3 --refuse
      lloco ask "And when?" --history conversation.json
      lloco ask "Who repaired the crane?" --json | jq -r .answer
    """
    if as_json:
        print_json(answer_json(question, engine.ask(question, **wanted)))
        return
    stream = engine.stream(question, **wanted)
    for piece in stream:
        typer.echo(safe(piece), nl=False)
        sys.stdout.flush()
    typer.echo()
    print_answer_details(stream.answer)


def compare(engine: Engine, question: str, wanted: Mapping[str, Any], as_json: bool) -> None:
    """Answer from memories, beside answers from raw text.

    Three answers: from the retrieved segments; by the same decoder from the
    raw text in context, cut to its window; and from the retrieved segments'
    own text (text retrieval). All have the same adapter and settings.

    \b
    Examples:
      lloco compare "Who repaired the crane?"
      lloco compare "Who repaired the crane?" --top-k 2 --json
    """
    answers: dict[str, Answer] = engine.compare(question, **wanted)
    if as_json:
        print_json({name: answer_json(question, answer) for name, answer in answers.items()})
        return
    for name, answer in answers.items():
        typer.echo(f"== {name.replace('_', ' ')}\n{safe(answer.text).strip()}\n   ({usage_line(answer.usage)})\n")
        for warning in answer.warnings:
            typer.echo(f"warning: {name}: {safe(warning)}", err=True)
    columns = ["", "adapter", "prompt tokens>", "slots>", "source tokens>", "first token>", "tokens/s>"]
    print_table(columns, [_row(name, answer) for name, answer in answers.items()])


def _command(answer: Answering) -> Callable[..., None]:
    """A command that answers a question in this way; its help is what ``answer`` says of itself."""

    def parameters(
        *,
        question: Question,
        store: StoreDir = Path("lloco-store"),
        filters: FilterTerms = None,
        whole_document: Whole = None,
        history: HistoryFile = None,
        adapter: Adapter = "auto",
        tenant: Tenant = "",
        models: Models,
        as_json: AsJSON = False,
    ) -> None:
        """What both commands take besides the settings of a question."""

    @wraps(answer)
    def run(
        question: str,
        store: Path,
        filters: list[str] | None,
        whole_document: str | None,
        history: Path | None,
        adapter: str,
        tenant: str,
        models: Mapping[str, Any],
        as_json: bool,
        settings: Mapping[str, Any],
    ) -> None:
        if whole_document is not None and filters:
            raise typer.BadParameter("--whole-document reads one document and takes no --filter")
        wanted = {
            "filters": parse_filters(filters or []),
            "whole_document": whole_document,
            "history": _history(history),
            "adapter": adapter,
            "tenant": tenant,
            **values_of(settings, SETTINGS),
        }
        with stores.open_engine(store, **models) as engine:
            answer(engine, question, wanted, as_json)

    return with_options(with_flags(run, parameters, list(SETTINGS.values())))


def _row(name: str, answer: Answer) -> tuple[object, ...]:
    usage = answer.usage
    speed = f"{usage.tokens_per_s:.1f}"
    tokens, slots = usage.prompt_tokens, usage.prompt_slots
    return name.replace("_", " "), answer.adapter, tokens, slots, usage.source_tokens, f"{usage.ttft_s:.2f} s", speed


def _history(path: Path | None) -> tuple[Turn, ...]:
    """The turns in a file; `typer.BadParameter` where there are none."""
    if path is None:
        return ()
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        turns = [(turn["role"], turn["content"]) for turn in said]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise typer.BadParameter(f"--history must name a file with a JSON list of turns, not {path}: {error}") from None
    if bad := next((turn for turn in turns if turn[0] not in ("user", "assistant") or not isinstance(turn[1], str)), 0):
        raise typer.BadParameter(
            f"--history: a turn has a role, 'user' or 'assistant', and a text as content, not {bad}"
        )
    return tuple(Turn(role, text) for role, text in turns)
