"""``lloco ask`` and ``lloco compare``: questions to the store."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lloco_engine.cli import factory
from lloco_engine.cli.options import (
    Adapter,
    AsJSON,
    CompressorName,
    Decoder,
    Device,
    Embedder,
    FilterTerms,
    StoreDir,
    TemplateName,
    Tenant,
    parse_filters,
)
from lloco_engine.cli.output import answer_json, print_answer_details, print_json, print_table, safe, usage_line
from lloco_engine.config import GenerateConfig, PrefixConfig, RetrieveConfig
from lloco_engine.types import Answer, Turn

__all__ = ["register"]

Question = Annotated[str, typer.Argument(help="The question, in quotes.", show_default=False)]
TopK = Annotated[int, typer.Option("--top-k", "-k", min=1, help="Segments to retrieve.")]
Neighbours = Annotated[int, typer.Option("--neighbours", min=0, help="Segments to add before and after each hit.")]
Whole = Annotated[
    str | None, typer.Option("--whole-document", metavar="ID", help="Read all of one document instead of searching.")
]
Focus = Annotated[
    int,
    typer.Option("--focus", metavar="K", min=0, help="Segments that each query of attention reads; 0: all of them."),
]
MaxNew = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]
Reasoning = Annotated[
    int,
    typer.Option("--reasoning-tokens", metavar="N", min=0, help="A decoder's thoughts, besides; 0: it does not think."),
]
MinNew = Annotated[int, typer.Option("--min-new-tokens", min=0, help="Shortest answer.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")]
TopP = Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Share of probability to sample from.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")]
NoRepeat = Annotated[
    int, typer.Option("--no-repeat-ngram", metavar="N", min=0, help="No run of N tokens comes twice; 0: it may.")
]
Beams = Annotated[
    int, typer.Option("--beams", metavar="N", min=1, help="Answers followed side by side; the likeliest is given.")
]
Hints = Annotated[
    str, typer.Option("--hints", metavar="NAMES", help="Hints that are on, with commas between: spelling,pointing.")
]
Spelling = Annotated[
    float | None,
    typer.Option("--spelling", metavar="NATS", min=0.0, help="Prefer words as the sources spell them; 0: not."),
]
Pointing = Annotated[
    float | None,
    typer.Option("--pointing", metavar="NATS", min=0.0, help="Prefer words beside the question's; 0: not."),
]
MinScore = Annotated[
    float, typer.Option("--min-score", metavar="X", min=-1.0, max=1.0, help="Cut hits with a lower score; -1: none.")
]
Floor = Annotated[
    float | None,
    typer.Option(
        "--floor",
        metavar="X",
        min=-1.0,
        max=1.0,
        help="Warn where the best score is lower; -1: never. Default: the one measured for the embedder.",
    ),
]
Refuse = Annotated[
    bool, typer.Option("--refuse", help="Say that no document answers where none seems to, instead of answering.")
]
HistoryFile = Annotated[
    Path | None,
    typer.Option(
        "--history",
        metavar="FILE",
        help='The conversation before: a JSON list of {"role": "user" or "assistant", "content": TEXT}.',
    ),
]
Stop = Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="End the answer here; repeatable.")]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command()(ask)
    app.command()(compare)


def ask(
    question: Question,
    store: StoreDir = Path("lloco-store"),
    top_k: TopK = 4,
    filters: FilterTerms = None,
    neighbours: Neighbours = 0,
    whole_document: Whole = None,
    focus: Focus = PrefixConfig.focus,
    max_new_tokens: MaxNew = 128,
    reasoning_tokens: Reasoning = GenerateConfig.reasoning_tokens,
    min_new_tokens: MinNew = 0,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    no_repeat_ngram: NoRepeat = 0,
    beams: Beams = 1,
    hints: Hints = "",
    spelling: Spelling = None,
    pointing: Pointing = None,
    min_score: MinScore = RetrieveConfig.min_score,
    floor: Floor = None,
    refuse: Refuse = False,
    history: HistoryFile = None,
    adapter: Adapter = "auto",
    tenant: Tenant = "",
    decoder: Decoder = None,
    compressor: CompressorName = None,
    template: TemplateName = None,
    embedder: Embedder = None,
    device: Device = None,
    as_json: AsJSON = False,
) -> None:
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
    wanted = _wanted(top_k, filters, neighbours, whole_document, focus, tenant, adapter)
    wanted["generate"] = _generate(
        stop,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        reasoning_tokens=reasoning_tokens,
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        seed=seed,
        no_repeat_ngram=no_repeat_ngram,
        beams=beams,
        hints=hints,
        spelling=spelling,
        pointing=pointing,
    )
    wanted |= _relevance(min_score, floor, refuse) | _history(history)
    with factory.open_engine(
        store, decoder=decoder, compressor=compressor, template=template, embedder=embedder, device=device
    ) as engine:
        if as_json:
            print_json(answer_json(question, engine.ask(question, **wanted)))
            return
        stream = engine.stream(question, **wanted)
        for piece in stream:
            typer.echo(safe(piece), nl=False)
            sys.stdout.flush()
        typer.echo()
        print_answer_details(stream.answer)


def compare(
    question: Question,
    store: StoreDir = Path("lloco-store"),
    top_k: TopK = 4,
    filters: FilterTerms = None,
    neighbours: Neighbours = 0,
    whole_document: Whole = None,
    focus: Focus = PrefixConfig.focus,
    max_new_tokens: MaxNew = 128,
    reasoning_tokens: Reasoning = GenerateConfig.reasoning_tokens,
    min_new_tokens: MinNew = 0,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    no_repeat_ngram: NoRepeat = 0,
    beams: Beams = 1,
    hints: Hints = "",
    spelling: Spelling = None,
    pointing: Pointing = None,
    min_score: MinScore = RetrieveConfig.min_score,
    floor: Floor = None,
    refuse: Refuse = False,
    history: HistoryFile = None,
    adapter: Adapter = "auto",
    tenant: Tenant = "",
    decoder: Decoder = None,
    compressor: CompressorName = None,
    template: TemplateName = None,
    embedder: Embedder = None,
    device: Device = None,
    as_json: AsJSON = False,
) -> None:
    """Answer from memories, beside answers from raw text.

    Three answers: from the retrieved segments; by the same decoder from the
    raw text in context, cut to its window; and from the retrieved segments'
    own text (text retrieval). All have the same adapter and settings.

    \b
    Examples:
      lloco compare "Who repaired the crane?"
      lloco compare "Who repaired the crane?" --top-k 2 --json
    """
    wanted = _wanted(top_k, filters, neighbours, whole_document, focus, tenant, adapter)
    wanted["generate"] = _generate(
        stop,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        reasoning_tokens=reasoning_tokens,
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        seed=seed,
        no_repeat_ngram=no_repeat_ngram,
        beams=beams,
        hints=hints,
        spelling=spelling,
        pointing=pointing,
    )
    wanted |= _relevance(min_score, floor, refuse) | _history(history)
    with factory.open_engine(
        store, decoder=decoder, compressor=compressor, template=template, embedder=embedder, device=device
    ) as engine:
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


def _row(name: str, answer: Answer) -> tuple[object, ...]:
    usage = answer.usage
    speed = f"{usage.tokens_per_s:.1f}"
    tokens, slots = usage.prompt_tokens, usage.prompt_slots
    return name.replace("_", " "), answer.adapter, tokens, slots, usage.source_tokens, f"{usage.ttft_s:.2f} s", speed


def _wanted(
    top_k: int,
    filters: list[str] | None,
    neighbours: int,
    whole_document: str | None,
    focus: int,
    tenant: str,
    adapter: str,
) -> dict[str, Any]:
    if whole_document is not None and filters:
        raise typer.BadParameter("--whole-document reads one document and takes no --filter")
    return {
        "top_k": top_k,
        "filters": parse_filters(filters or []),
        "neighbours": neighbours,
        "whole_document": whole_document,
        "prefix": PrefixConfig(focus=focus),
        "tenant": tenant,
        "adapter": adapter,
    }


def _relevance(min_score: float, floor: float | None, refuse: bool) -> dict[str, Any]:
    return {"min_score": min_score, "floor": floor, "when_nothing": "refuse" if refuse else "answer"}


def _history(path: Path | None) -> dict[str, Any]:
    """The turns in a file; `typer.BadParameter` where there are none."""
    if path is None:
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        turns = [(turn["role"], turn["content"]) for turn in said]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise typer.BadParameter(f"--history must name a file with a JSON list of turns, not {path}: {error}") from None
    if bad := next((turn for turn in turns if turn[0] not in ("user", "assistant") or not isinstance(turn[1], str)), 0):
        raise typer.BadParameter(
            f"--history: a turn has a role, 'user' or 'assistant', and a text as content, not {bad}"
        )
    return {"history": tuple(Turn(role, text) for role, text in turns)}


def _generate(stop: list[str] | None, *, top_p: float, **settings: Any) -> GenerateConfig:
    if top_p <= 0:
        raise typer.BadParameter("--top-p must be above 0")
    if not all(stop or []):
        raise typer.BadParameter("--stop must not be empty")
    return GenerateConfig(stop=tuple(stop or ()), top_p=top_p, **settings)
