"""``lloco ask`` and ``lloco compare``: questions to the store."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lloco_engine.cli import factory
from lloco_engine.cli.filters import HELP, parse_filters
from lloco_engine.cli.options import (
    Adapter,
    AsJSON,
    CompressorName,
    Decoder,
    Device,
    Embedder,
    StoreDir,
    TemplateName,
    Tenant,
)
from lloco_engine.cli.output import answer_json, print_answer_details, print_json, print_table, safe, usage_line
from lloco_engine.config import GenerateConfig, PrefixConfig
from lloco_engine.types import Answer

__all__ = ["register"]

Question = Annotated[str, typer.Argument(help="The question, in quotes.", show_default=False)]
TopK = Annotated[int, typer.Option("--top-k", "-k", min=1, help="Segments to retrieve.")]
Filters = Annotated[
    list[str] | None,
    typer.Option(
        "--filter",
        "-f",
        metavar="TERM",
        help=HELP,
    ),
]
Neighbours = Annotated[int, typer.Option("--neighbours", min=0, help="Segments to add before and after each hit.")]
Whole = Annotated[
    str | None, typer.Option("--whole-document", metavar="ID", help="Read all of one document instead of searching.")
]
Focus = Annotated[
    int,
    typer.Option("--focus", metavar="K", min=0, help="Segments that each query of attention reads; 0: all of them."),
]
MaxNew = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]
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
Stop = Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="End the answer here; repeatable.")]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command()(ask)
    app.command()(compare)


def ask(
    question: Question,
    store: StoreDir = Path("lloco-store"),
    top_k: TopK = 4,
    filters: Filters = None,
    neighbours: Neighbours = 0,
    whole_document: Whole = None,
    focus: Focus = PrefixConfig.focus,
    max_new_tokens: MaxNew = 128,
    min_new_tokens: MinNew = 0,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    no_repeat_ngram: NoRepeat = 0,
    beams: Beams = 1,
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
      lloco ask "Who repaired the crane?" --json | jq -r .answer
    """
    wanted = _wanted(top_k, filters, neighbours, whole_document, focus, tenant, adapter)
    wanted["generate"] = _generate(
        stop,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        seed=seed,
        no_repeat_ngram=no_repeat_ngram,
        beams=beams,
    )
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
    filters: Filters = None,
    neighbours: Neighbours = 0,
    whole_document: Whole = None,
    focus: Focus = PrefixConfig.focus,
    max_new_tokens: MaxNew = 128,
    min_new_tokens: MinNew = 0,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    no_repeat_ngram: NoRepeat = 0,
    beams: Beams = 1,
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
    own text (text retrieval).

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
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        seed=seed,
        no_repeat_ngram=no_repeat_ngram,
        beams=beams,
    )
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
    columns = ["", "prompt tokens>", "slots>", "source tokens>", "first token>", "tokens/s>"]
    print_table(columns, [_row(name, answer) for name, answer in answers.items()])


def _row(name: str, answer: Answer) -> tuple[object, ...]:
    usage = answer.usage
    speed = f"{usage.tokens_per_s:.1f}"
    tokens, slots = usage.prompt_tokens, usage.prompt_slots
    return name.replace("_", " "), tokens, slots, usage.source_tokens, f"{usage.ttft_s:.2f} s", speed


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


def _generate(stop: list[str] | None, *, top_p: float, **settings: Any) -> GenerateConfig:
    if top_p <= 0:
        raise typer.BadParameter("--top-p must be above 0")
    if not all(stop or []):
        raise typer.BadParameter("--stop must not be empty")
    return GenerateConfig(stop=tuple(stop or ()), top_p=top_p, **settings)
