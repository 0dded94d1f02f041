"""``python -m lloco_engine.demo``: LLoCO's answers beside those of the same decoder reading the text itself.

All answer with the same adapter, but for LLoCO's without it.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lloco_engine import Engine
from lloco_engine.baselines import text_retrieval
from lloco_engine.config import CompressConfig, GenerateConfig
from lloco_engine.demo import Question, documents_folder, questions
from lloco_engine.errors import LLoCOError, StoreMismatch
from lloco_engine.models import cache_folder
from lloco_engine.types import Answer, Document, Failure, Usage

if TYPE_CHECKING:
    from rich.console import Console

    from lloco_engine.engine import Progress

__all__ = ["main", "run"]

_RATIO = 16.0
_GENERATE = GenerateConfig(max_new_tokens=48)
_QUOTE_CHARS = 300
_INDENT = " " * 19
_SOURCES = 2  # segments read, and shown with their text: so small a decoder mixes up more (docs/log.md)


@dataclass(frozen=True)
class _Row:
    """One question with its answers; ``kept`` says that the one in context was measured in an earlier run.

    ``untuned`` is LLoCO's without its adapter; None where there is no adapter for the decoder.
    """

    question: Question
    lloco: Answer
    untuned: Answer | None
    text_retrieval: Answer
    in_context: Answer
    kept: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    try:
        return run(arguments)
    except LLoCOError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def run(arguments: Sequence[str] | None = None, **engine_options: Any) -> int:
    """The demo, with other models or settings than its own where ``engine_options``, of `Engine.open`, say so.

    Raises:
        LLoCOError: as the engine does.
    """
    from rich.console import Console

    chosen = _parser().parse_args(arguments)
    console = Console(highlight=False, markup=False)
    began = time.perf_counter()
    paths = sorted(path for path in documents_folder().iterdir() if path.is_file())
    if chosen.quick:
        paths = [min(paths, key=lambda path: path.stat().st_size)]
    options = {"compress": CompressConfig(ratio=chosen.ratio)} | engine_options
    home = cache_folder() / "demo"
    own = chosen.store is None
    place = home / f"store-{chosen.ratio:g}" if own else chosen.store
    with _open(place, own, options, console) as engine:
        documents = _ingest(engine, paths, console)
        rows = _ask(engine, documents, _chosen_questions(documents, chosen.quick), home / "in_context.json", console)
    _print_table(console, rows)
    console.print(f"\nThe store is {place}. All of it took {time.perf_counter() - began:.0f} s.", soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lloco_engine.demo", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the smallest document and two questions only")
    parser.add_argument("--store", type=Path, metavar="DIR", help="where to keep the memories (default: the cache)")
    parser.add_argument("--ratio", type=float, default=_RATIO, metavar="R", help="source tokens per slot (16)")
    return parser


def _open(place: Path, own: bool, options: dict[str, Any], console: Console) -> Engine:
    try:
        return Engine.open(place, **options)
    except StoreMismatch as error:
        if not own:
            raise
        console.print(f"The demo's store is made again: {error}", soft_wrap=True)
        shutil.rmtree(place)
        return Engine.open(place, **options)


# -- documents -------------------------------------------------------------------------------------------------------


def _ingest(engine: Engine, paths: Sequence[Path], console: Console) -> list[Document]:
    from lloco_engine.readers import read_paths

    items = list(read_paths(paths))
    documents = [item for item in items if isinstance(item, Document)]
    if failures := [item for item in items if isinstance(item, Failure)]:
        raise LLoCOError(f"the demo's own {failures[0].source} cannot be read: {failures[0].reason}")
    console.print(f"{len(documents)} documents to compress, {engine.manifest.ratio:g} source tokens to a slot")
    with _progress(documents, console) as progress:
        report = engine.ingest(documents, progress=progress)
    if report.failed:
        raise LLoCOError(f"{report.failed[0].source} was not ingested: {report.failed[0].reason}")
    wanted = {document.doc_id for document in documents}
    infos = [info for info in engine.documents("") if info.doc_id in wanted]
    tokens, slots = sum(info.source_tokens for info in infos), sum(info.slots for info in infos)
    console.print(
        f"In the store: {tokens:,} source tokens as {slots:,} slots, {sum(i.bytes for i in infos) / 1e6:.1f} MB"
    )
    if report.segments:
        rate = report.source_tokens / report.compress_s
        console.print(f"Compressed {report.source_tokens:,} tokens in {report.compress_s:.1f} s ({rate:,.0f} tokens/s)")
    else:
        console.print("Nothing had to be compressed: it was done in an earlier run")
    return documents


@contextmanager
def _progress(documents: Sequence[Document], console: Console) -> Iterator[Callable[[Progress], None]]:
    """A bar where there is a terminal, else a line a document."""
    before, chars, total = {}, {}, 0
    for document in documents:
        before[document.doc_id], chars[document.doc_id] = total, len(document.text)
        total += len(document.text)
    if not console.is_terminal:

        def lines(state: Progress) -> None:
            if state.done_segments == state.total_segments_of_document:
                rate = f", {state.tokens_per_s:,.0f} tokens/s" if state.tokens_per_s else ""
                console.print(f"  {state.document}: {state.done_segments} segments{rate}", soft_wrap=True)

        yield lines
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total, rate="")

        def show(state: Any) -> None:
            share = state.done_segments / max(state.total_segments_of_document, 1)
            bar.update(
                task,
                description=state.document[-30:],
                completed=before[state.document] + share * chars[state.document],
                rate=f"{state.tokens_per_s:,.0f} tokens/s" if state.tokens_per_s else "",
            )

        yield show


# -- questions -------------------------------------------------------------------------------------------------------


def _chosen_questions(documents: Sequence[Document], quick: bool) -> list[Question]:
    """The first question about every file; in a quick run two about the one."""
    known = {document.doc_id for document in documents}
    about = [question for question in questions() if question.doc_id in known]
    if quick:
        return about[:2]
    first: dict[str, Question] = {}
    for question in about:
        first.setdefault(question.id.rsplit("-", 1)[0], question)
    return list(first.values())


def _ask(
    engine: Engine, documents: Sequence[Document], asked: Sequence[Question], kept_file: Path, console: Console
) -> list[_Row]:
    from lloco_engine.demo.in_context import InContext

    texts = [document.text for document in documents]
    filters = {"doc_id": tuple(document.doc_id for document in documents)}
    in_context = InContext(
        engine.local_decoder, texts, [question.question for question in asked], _GENERATE, kept_file, console.print
    )
    held, cut = len(in_context.text.ids), in_context.text.left_out
    if cut:
        console.print(
            f"In context, the decoder's window of {engine.decoder.shape.window:,} holds {held:,} of the text's "
            f"{held + cut:,} tokens: the middle is cut out",
            soft_wrap=True,
        )
    rows = []
    for number, question in enumerate(asked, 1):
        answer = engine.ask(question.question, top_k=_SOURCES, filters=filters, generate=_GENERATE)
        console.print(f"\n[{number}] {question.question}", style="bold", soft_wrap=True)
        console.print(f"    {'expected':<14} {question.answers[0]}", soft_wrap=True)
        _print_answer(console, "LLoCO", answer, f", adapter {answer.adapter}")
        _print_sources(console, answer)
        untuned = None
        if answer.adapter != "none":
            untuned = engine.ask(question.question, hits=answer.hits, generate=_GENERATE, adapter="none")
            _print_answer(console, "no adapter", untuned, "")
        text = text_retrieval(engine.decoder, answer.hits, question.question, _GENERATE, adapter=answer.adapter)
        _print_answer(console, "text retrieval", text, ", of the same sources")
        other, kept = in_context.ask(question.question, answer.adapter)
        _print_answer(console, "in context", other, ", from the first run" if kept else "")
        rows.append(_Row(question, answer, untuned, text, other, kept))
    return rows


def _print_answer(console: Console, name: str, answer: Answer, remark: str) -> None:
    console.print(f"    {name:<14} {' '.join(answer.text.split())}", soft_wrap=True)
    console.print(f"{_INDENT}({_cost(answer.usage)}{remark})", style="dim", soft_wrap=True)
    for warning in answer.warnings:
        console.print(f"{_INDENT}warning: {warning}", soft_wrap=True)


def _cost(usage: Usage) -> str:
    prompt = f"prompt {usage.prompt_tokens:,} tokens"
    if usage.prompt_slots:
        prompt += f" + {usage.prompt_slots:,} slots for {usage.source_tokens:,} source tokens"
    speed = f", then {usage.tokens_per_s:.1f} tokens/s" if usage.tokens_per_s else ""
    return f"{prompt}, first token after {usage.ttft_s:.2f} s{speed}"


def _print_sources(console: Console, answer: Answer) -> None:
    for hit in answer.hits:
        span = hit.windows[0] if hit.windows else hit.span
        quote = " ".join(hit.quote(span).split())
        shown = quote if len(quote) <= _QUOTE_CHARS else quote[:_QUOTE_CHARS].rsplit(None, 1)[0] + " [...]"
        console.print(
            f"    {'source':<14} {hit.doc_id}, characters {span.start:,} to {span.end:,}, score {hit.score:.2f}"
        )
        console.print(f'{_INDENT}"{shown}"', style="dim", soft_wrap=True)


def _print_table(console: Console, rows: Sequence[_Row]) -> None:
    from rich.table import Table

    table = Table(title="All questions together (medians)", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    kept = " (first run)" if all(row.kept for row in rows) else ""
    sides: dict[str, _Side] = {"LLoCO": [(row.question, row.lloco) for row in rows]}
    if untuned := [(row.question, row.untuned) for row in rows if row.untuned is not None]:
        sides["no adapter"] = untuned
    sides["text retrieval"] = [(row.question, row.text_retrieval) for row in rows]
    sides[f"in context{kept}"] = [(row.question, row.in_context) for row in rows]
    for name in sides:
        table.add_column(name, justify="right")
    for label, cell in _LINES:
        table.add_row(label, *(cell(side) for side in sides.values()))
    console.print()
    console.print(table)


_Side = list[tuple[Question, Answer]]


def _right(side: _Side) -> str:
    found = sum(any(gold.lower() in answer.text.lower() for gold in question.answers) for question, answer in side)
    return f"{found} of {len(side)}"


def _median(read: Callable[[Usage], float], form: str) -> Callable[[_Side], str]:
    return lambda side: form.format(statistics.median(read(answer.usage) for _, answer in side))


def _adapters(side: _Side) -> str:
    return ", ".join(dict.fromkeys(answer.adapter for _, answer in side))


_LINES: tuple[tuple[str, Callable[[_Side], str]], ...] = (
    ("adapter", _adapters),
    ("expected answer given", _right),
    ("prompt tokens", _median(lambda usage: usage.prompt_tokens, "{:,.0f}")),
    ("prompt slots", _median(lambda usage: usage.prompt_slots, "{:,.0f}")),
    ("source tokens replaced", _median(lambda usage: usage.source_tokens, "{:,.0f}")),
    ("first token after", _median(lambda usage: usage.ttft_s, "{:.2f} s")),
    ("tokens/s after that", _median(lambda usage: usage.tokens_per_s, "{:.1f}")),
)


if __name__ == "__main__":
    sys.exit(main())
