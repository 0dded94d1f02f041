"""``lloco eval`` and ``lloco bench``: how good are the answers, and what do they cost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

__all__ = ["register"]

T = TypeVar("T")

Decoder = Annotated[
    str,
    typer.Option("--decoder", envvar="LLOCO_DECODER", metavar="NAME", help="'embedded', a local folder or a hub id."),
]
Device = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="cpu, cuda, cuda:N or mps. Default: the best there is.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command("eval")(evaluate)
    app.command()(bench)


def evaluate(
    data: Annotated[
        Path, typer.Option("--data", metavar="FILE", help="JSON Lines, one document with its questions a line.")
    ],
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="DOCS", min=1, help="Read only the first documents.")
    ] = None,
    methods: Annotated[
        str, typer.Option(metavar="NAMES", help="Of none (no context), full (text in the prompt), kv (compressed).")
    ] = "none,full,kv",
    ratios: Annotated[str, typer.Option(metavar="NUMBERS", help="Source tokens per slot, for kv.")] = "8,16,32",
    passages_per_chunk: Annotated[
        int, typer.Option(metavar="K", min=1, help="Join the texts of K consecutive documents into one chunk.")
    ] = 1,
    segments: Annotated[
        int, typer.Option(metavar="K", min=1, help="Compress K consecutive chunks apart and place them together.")
    ] = 1,
    adapter: Annotated[str, typer.Option(metavar="NAME", help="LoRA adapter to answer with, or 'none'.")] = "none",
    answers: Annotated[
        bool, typer.Option("--answers/--no-answers", help="Also generate answers and score them (F1, ROUGE-L).")
    ] = True,
    json_out: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Write the result here; a run cut off goes on.")
    ] = None,
    decoder: Decoder = "embedded",
    device: Device = None,
) -> None:
    """Measure answers over a file of questions.

    Prints, for no context, the full text and compressed memories at each
    ratio: the gold answer's loss per token, the share of the full text's
    worth that is recovered, and the scores of greedy answers.

    \b
    Examples:
      lloco eval --data questions.jsonl --limit 40 --json result.json
      lloco eval --data questions.jsonl --passages-per-chunk 6 --segments 4 --ratios 16
      lloco eval --data questions.jsonl --methods none,full --no-answers
    """
    from lloco_engine.eval.progress import bar
    from lloco_engine.eval.run import EvalConfig, run

    config = EvalConfig(
        data=str(data),
        limit=limit,
        methods=tuple(_parts(methods, str, "--methods")),
        ratios=tuple(_parts(ratios, float, "--ratios")),
        passages_per_chunk=passages_per_chunk,
        segments=segments,
        adapter=adapter,
        answers=answers,
        decoder=decoder,
        device=device,
    )
    with bar() as progress:
        result = run(config, output=json_out, progress=progress)
    _print_results(result)
    if json_out is not None:
        typer.echo(f"written to {json_out}", err=True)


def bench(
    json_out: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write the result here too.")] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="OUT", help="Draw it here; .png or .svg by the suffix.")
    ] = None,
    source_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Longest source; less is quicker and says less.")
    ] = 131072,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Measurements of each kind; the median counts.")] = 7,
    decoder: Decoder = "embedded",
    device: Device = None,
) -> None:
    """Measure speed, size and memory.

    The first run compresses 128k tokens, which takes a while, and keeps them
    in the cache folder; one that was cut off goes on where it stopped. Ratios
    are of measurements taken in turn in this run. The last line on stdout is
    JSON.

    \b
    Examples:
      lloco bench
      lloco bench --json bench.json --plot bench.svg
      lloco bench --source-tokens 8192 --repeats 3
    """
    from lloco_engine.eval.bench import BenchConfig, run
    from lloco_engine.eval.machine import check_writable, write_json
    from lloco_engine.eval.plot import check_suffix, draw
    from lloco_engine.eval.progress import bar

    config = BenchConfig(source_tokens=source_tokens, repeats=repeats, decoder=decoder, device=device)
    if plot is not None:
        check_suffix(plot)
    for path in (json_out, plot):
        if path is not None:
            check_writable(path)
    with bar() as progress:
        result = run(config, progress=progress)
    if json_out is not None:
        write_json(json_out, result)
    if plot is not None:
        draw(result, plot)
    _print_bench(result)
    typer.echo(json.dumps(result, ensure_ascii=False))


def _parts(text: str, kind: Callable[[str], T], option: str) -> list[T]:
    try:
        return [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise typer.BadParameter(
            f"must be numbers with commas between them, not {text!r}", param_hint=option
        ) from error


def _print_results(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = result["results"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = ("method", "ratio", "loss", "recovered", "f1", "rouge_l", "prompt_slots", "prompt_tokens", "source_tokens")
    for name in names:
        table.add_column(name.replace("_", " "), justify="left" if name == "method" else "right")
    digits = dict.fromkeys(("loss", "recovered", "f1", "rouge_l"), 3)
    for row in rows:
        table.add_row(*(_shown(row[name], digits.get(name, 0)) for name in names))
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)
    typer.echo(
        f"{rows[0]['questions']:,} questions about {rows[0]['documents']:,} documents, adapter {rows[0]['adapter']}, "
        f"{result['config']['seconds']:,.0f} s"
    )
    for note in result["config"]["notes"]:
        typer.echo(f"note: {note}")


def _shown(value: Any, digits: int) -> str:
    if isinstance(value, int | float):
        return f"{value:,.{digits}f}" if value != int(value) or digits else f"{value:,.0f}"
    return "-" if value is None else str(value)


def _print_bench(result: dict[str, Any]) -> None:
    for name, value in result.items():
        if name == "details":
            continue
        by_length = value.items() if isinstance(value, dict) else ()
        shown = ", ".join(f"{int(length):,}: {_ratio(ratio)}" for length, ratio in by_length) or _ratio(value)
        typer.echo(f"{name:36} {shown}")


def _ratio(value: Any) -> str:
    return f"{value:,.3g}" if isinstance(value, float) and value < 1000 else "-" if value is None else str(value)
