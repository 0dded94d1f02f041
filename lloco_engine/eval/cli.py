"""``lloco eval`` and ``lloco bench``: how good are the answers, and what do they cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lloco_engine.eval.cli_data import data
from lloco_engine.eval.cli_memories import memories
from lloco_engine.eval.cli_report import report
from lloco_engine.eval.cli_scores import scores
from lloco_engine.eval.settings import EvalConfig
from lloco_engine.eval.tasks import NAMES as TASKS
from lloco_engine.flags import Device, split, with_flags

__all__ = ["register"]

_SCORES = (
    "f1", "em", "rouge_1", "rouge_2", "rouge_l", "rouge_geometric", "accuracy", "accuracy_generated", "success",
)  # fmt: skip
_COSTS = ("prompt_slots", "prompt_tokens", "source_tokens")

Decoder = Annotated[
    str,
    typer.Option("--decoder", envvar="LLOCO_DECODER", metavar="NAME", help="'embedded', a local folder or a hub id."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command("eval")(with_flags(evaluate, _parameters, [EvalConfig], after="data_folder"))
    app.command()(bench)
    app.command()(data)
    app.command()(report)
    app.command()(memories)
    app.command()(scores)


def _parameters(
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="JSON Lines, one document with its questions a line."),
    ] = None,
    task: Annotated[
        str, typer.Option("--task", metavar="NAME", help=f"How to ask and score: {', '.join(TASKS)}.")
    ] = "plain",
    data_folder: Annotated[
        Path | None,
        typer.Option("--data-folder", envvar="LLOCO_DATA", metavar="DIR", help="Where --task finds NAME/val.jsonl."),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option("--lengths", metavar="NUMBERS", help="Task needle: tokens, such as 1k,8k,32k.")
    ] = None,
    depths: Annotated[int | None, typer.Option(metavar="N", min=1, help="Task needle: how many depths.")] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Write the result here; a run cut off goes on.")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write every answer with its scores here, as JSON Lines.")
    ] = None,
    workers: Annotated[
        int, typer.Option(metavar="N", min=1, help="Processes that measure beside each other, some documents each.")
    ] = 1,
) -> None:
    """What ``lloco eval`` takes besides the settings of an evaluation."""


def evaluate(
    data: Path | None,
    task: str,
    data_folder: Path | None,
    lengths: str | None,
    depths: int | None,
    json_out: Path | None,
    predictions: Path | None,
    workers: int,
    settings: Mapping[str, Any],
) -> None:
    """Measure answers over questions about documents.

    Prints, for each method, ratio and adapter: the gold answer's loss per
    token, the share of the full text's worth that is recovered, the scores of
    greedy answers, and which hints they had. The JSON adds confidence intervals
    (bootstrap over documents) and paired differences.

    \b
    Methods:
      none             no context
      full             the whole text in the prompt; beyond the window its middle is cut
      text_slots       the best passages of 200 tokens, as much text as kv has slots
      kv               every segment of the document, compressed
      kv_guided        the same as a whole document is read, search weighing in
      kvzip, snapkv    the same, evicted by another's rule
      text_retrieved, text_slots_retrieved, kv_retrieved, kvzip_retrieved,
      snapkv_retrieved  the same, of the --top-k best chunks only
      full@none        with one of the --adapter names only

    Segments are kept in the cache folder: another run over the same documents
    does not compress again.

    \b
    Examples:
      lloco eval --data questions.jsonl --limit 40 --json result.json
      lloco eval --data questions.jsonl --passages-per-chunk 6 --segments 4 --ratios 16
      lloco eval --task qmsum --data-folder data --methods none,full,kv,kv_retrieved,text_retrieved --ratios 30
      lloco eval --task quality --data my-stories.jsonl --adapter none,default --ratios 16
      lloco eval --task needle --data-folder data --lengths 1k,8k,32k --methods kv,kv_retrieved --ratios 16
      lloco eval --data questions.jsonl --compressor autocompressor --decoder princeton-nlp/AutoCompressor-Llama-2-7b-6k
    """
    from lloco_engine.eval import tasks
    from lloco_engine.eval.progress import bar
    from lloco_engine.eval.run import run

    own: dict[str, Any] = {}
    if lengths is not None:
        own["lengths"] = split(lengths, _length, "--lengths")
    if depths is not None:
        own["depths"] = depths
    source = data or tasks.get(task, **own).source(data_folder)
    config = EvalConfig(data="" if source is None else str(source), task=task, task_settings=own, **settings)
    with bar() as progress:
        result = run(config, output=json_out, predictions=predictions, workers=workers, progress=progress)
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
    shape: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Random weights: llama-2-7b, llama-3.1-8b, qwen3-4b or tiny."),
    ] = None,
) -> None:
    """Measure speed, size and memory.

    The first run compresses 128k tokens, which takes a while, and keeps them
    in the cache folder; one that was cut off goes on where it stopped. Ratios
    are of measurements taken in turn in this run. The last line on stdout is
    JSON.

    With --shape a decoder with random weights is made on the device, and
    what memories save there is measured: first token, decode step, users and
    tokens a second. With --json, one that was cut off goes on where it stopped.

    \b
    Examples:
      lloco bench
      lloco bench --json bench.json --plot bench.svg
      lloco bench --source-tokens 8192 --repeats 3
      lloco bench --shape llama-3.1-8b --device cuda --repeats 3 --json 8b.json
    """
    if shape is not None:
        if plot is not None or decoder != "embedded":
            raise typer.BadParameter("must be given without --plot and --decoder", param_hint="--shape")
        _bench_shape(shape, device, source_tokens, repeats, json_out)
        return
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


def _bench_shape(shape: str, device: str | None, source_tokens: int, repeats: int, json_out: Path | None) -> None:
    from lloco_engine.eval.machine import check_writable, write_json
    from lloco_engine.eval.progress import bar
    from lloco_engine.eval.shape_bench import ShapeConfig, run

    config = ShapeConfig(shape, device, source_tokens, repeats)
    if json_out is not None:
        check_writable(json_out)
    with bar() as progress:
        result = run(config, json_out, progress)
    if json_out is not None:
        write_json(json_out, result)
    for name, figures in (result["measured"] | result["over_in_context"]).items():
        typer.echo(f"{name:24} " + ", ".join(f"{key} {_ratio(value)}" for key, value in figures.items()))
    typer.echo(json.dumps(result, ensure_ascii=False))


def _length(text: str) -> int:
    """A number of tokens, such as 500 or 8k (8192)."""
    return int(text[:-1]) * 1024 if text.lower().endswith("k") else int(text)


def _print_results(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = result["results"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    scores = [name for name in _SCORES if any(row.get(name) is not None for row in rows)] or ["f1", "rouge_l"]
    adapter = ["adapter"] if len({row["adapter"] for row in rows}) > 1 else []
    hints = ["hints"] if any(row["hints"] for row in rows) else []
    names = ("method", *adapter, *hints, "ratio", "loss", "recovered", *scores, *_COSTS)
    for name in names:
        table.add_column(name.replace("_", " "), justify="left" if name in ("method", "adapter", "hints") else "right")
    for row in rows:
        table.add_row(*(_shown(row.get(name), 3 if name in ("loss", "recovered", *scores) else 0) for name in names))
    console = Console()
    if not console.is_terminal:
        console = Console(width=250)
    console.print(table)
    adapters = ", ".join(dict.fromkeys(row["adapter"] for row in rows))
    typer.echo(
        f"{rows[0]['questions']:,} questions about {rows[0]['documents']:,} documents, adapter {adapters}, "
        f"{result['config']['seconds']:,.0f} s"
    )
    for note in result["config"]["notes"]:
        typer.echo(f"note: {note}")


def _shown(value: Any, digits: int) -> str:
    if isinstance(value, list):
        return ",".join(value) or "-"
    if isinstance(value, int | float):
        return f"{value:,.{digits}f}" if value != int(value) or digits else f"{value:,.0f}"
    return "-" if value is None else str(value)


def _print_bench(result: dict[str, Any]) -> None:
    from lloco_engine.eval.tables import answered

    for name, value in result.items():
        if name == "details":
            continue
        by_length = value.items() if isinstance(value, dict) else ()
        shown = ", ".join(f"{int(length):,}: {_ratio(ratio)}" for length, ratio in by_length) or _ratio(value)
        typer.echo(f"{name:36} {shown}")
    typer.echo(answered(result["details"]))


def _ratio(value: Any) -> str:
    return f"{value:,.3g}" if isinstance(value, float) and value < 1000 else "-" if value is None else str(value)
