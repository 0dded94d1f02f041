"""What commands print: JSON for scripts, text for people."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import typer

from lloco_engine.types import Answer, Hit, Page, Span, Usage

__all__ = ["answer_json", "human_bytes", "print_answer_details", "print_json", "print_table", "safe", "usage_line"]

_QUOTE_CHARS = 320


def print_json(value: Any) -> None:
    """One JSON value on stdout, indented."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def safe(text: str) -> str:
    """Text for a terminal: control characters of a document, which could steer it, become ``\ufffd``."""
    return "".join(char if char in "\n\t" or char.isprintable() or char.isspace() else "\ufffd" for char in text)


def human_bytes(count: float) -> str:
    """Bytes with a unit that keeps the number short."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "") -> None:
    """A table on stdout; columns named with a trailing ``>`` are right-aligned."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column.endswith(">")
        table.add_column(column.rstrip(">"), justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=100_000)  # a file has no edge to wrap at
    console.print(table)


@contextmanager
def counted(what: str, *, show: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr, moved by what is given: called with things done and things in all. None when not shown."""
    if not show:
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _cell(value: object) -> Any:
    from rich.text import Text

    return Text(f"{value:,}" if isinstance(value, int) else safe(str(value)).replace("\n", " "))


def hit_json(hit: Hit) -> dict[str, Any]:
    """A hit as JSON-ready values, its windows with their verbatim text."""
    return {
        "doc_id": hit.doc_id,
        "title": hit.title,
        "source": hit.source,
        "tenant": hit.tenant,
        "version": hit.version,
        "segment_id": hit.segment_id,
        "ordinal": hit.ordinal,
        "score": hit.score,
        "source_tokens": hit.source_tokens,
        "span": asdict(hit.span),
        "pages": _pages_json(hit.pages),
        "windows": [
            asdict(window)
            | {"text": hit.quote(window)}
            | ({"pages": _pages_json(hit.pages_of(window))} if hit.pages else {})
            for window in hit.windows
        ],
        "metadata": dict(hit.metadata),
        "also_in": list(hit.also_in),
    }


def _pages_json(pages: Sequence[Page]) -> list[dict[str, Any]]:
    return [{"page": page.number, "page_label": page.name} for page in pages]


def _cited(hit: Hit, span: Span) -> str:
    """The document, and the pages of a part of it: ``report.pdf, p. 3``."""
    pages = hit.pages_of(span)
    if not pages:
        return hit.doc_id
    first, last = pages[0].name, pages[-1].name
    return f"{hit.doc_id}, p. {first}" if first == last else f"{hit.doc_id}, pp. {first}-{last}"


def answer_json(question: str, answer: Answer) -> dict[str, Any]:
    """An answer as JSON-ready values."""
    return {
        "question": question,
        "answer": answer.text,
        "reasoning": answer.reasoning,
        "finish": answer.finish,
        "adapter": answer.adapter,
        "hints": list(answer.hints),
        "sources": [hit_json(hit) for hit in answer.hits],
        "usage": asdict(answer.usage) | {"tokens_per_s": answer.usage.tokens_per_s},
        "warnings": list(answer.warnings),
    }


def usage_line(usage: Usage) -> str:
    """The cost of one question, in one line."""
    parts = [f"prompt {usage.prompt_tokens:,} tokens"]
    if usage.prompt_slots:
        parts[0] += f" + {usage.prompt_slots:,} slots for {usage.source_tokens:,} source tokens"
    parts.append(f"first token {usage.ttft_s:.2f} s")
    parts.append(f"{usage.completion_tokens:,} tokens" + (f" at {usage.tokens_per_s:.1f}/s" if usage.decode_s else ""))
    if usage.peak_memory:
        parts.append(f"peak memory {human_bytes(usage.peak_memory)}")
    return ", ".join(parts)


def print_answer_details(answer: Answer) -> None:
    """Sources with their verbatim passages, and the usage, on stdout; warnings on stderr."""
    if answer.hits:
        typer.echo("\nSources")
    for number, hit in enumerate(answer.hits, 1):
        title = f'  "{safe(hit.title)}"' if hit.title else ""
        span = hit.windows[0] if hit.windows else hit.span
        typer.echo(f"[{number}] {safe(_cited(hit, span))}, segment {hit.ordinal}, score {hit.score:.2f}{title}")
        quote = hit.quote(span)
        shown = quote if len(quote) <= _QUOTE_CHARS else quote[:_QUOTE_CHARS].rsplit(None, 1)[0] + " [...]"
        typer.echo(f"    characters {span.start:,} to {span.end:,}:")
        typer.echo("\n".join(f"    | {line}" for line in safe(shown).strip().splitlines()))
    hints = f", hints {' and '.join(answer.hints)}" if answer.hints else ""
    typer.echo(f"\nUsage: {usage_line(answer.usage)}, adapter {safe(answer.adapter)}{hints}")
    if answer.finish == "length":
        typer.echo("note: the answer was cut off at --max-new-tokens", err=True)
    for warning in answer.warnings:
        typer.echo(f"warning: {safe(warning)}", err=True)
