"""``lloco eval`` and ``lloco bench``: how good are the answers, and what do they cost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from lloco_engine.config import PrefixConfig
from lloco_engine.eval.cli_data import data
from lloco_engine.eval.cli_memories import memories
from lloco_engine.eval.cli_report import report
from lloco_engine.eval.cli_scores import scores
from lloco_engine.eval.tasks import NAMES as TASKS

__all__ = ["register"]

T = TypeVar("T")

_SCORES = (
    "f1", "em", "rouge_1", "rouge_2", "rouge_l", "rouge_geometric", "accuracy", "accuracy_generated", "success",
)  # fmt: skip
_COSTS = ("prompt_slots", "prompt_tokens", "source_tokens")

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
    app.command()(data)
    app.command()(report)
    app.command()(memories)
    app.command()(scores)


def evaluate(
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="JSON Lines, one document with its questions a line."),
    ] = None,
    task: Annotated[
        str, typer.Option("--task", metavar="NAME", help=f"How to ask and score: {', '.join(TASKS)}.")
    ] = "plain",
    data_folder: Annotated[
        Path | None,
        typer.Option(
            "--data-folder",
            envvar="LLOCO_DATA",
            metavar="DIR",
            help="Where --task finds NAME/val.jsonl.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="DOCS", min=1, help="Read only the first documents.")
    ] = None,
    methods: Annotated[str, typer.Option(metavar="NAMES", help="What the decoder reads; see below.")] = "none,full,kv",
    ratios: Annotated[str, typer.Option(metavar="NUMBERS", help="Source tokens per slot, for kv.")] = "8,16,32",
    passages_per_chunk: Annotated[
        int, typer.Option(metavar="K", min=1, help="Join the texts of K consecutive documents into one chunk.")
    ] = 1,
    segments: Annotated[
        int, typer.Option(metavar="K", min=1, help="Compress K consecutive chunks apart and place them together.")
    ] = 1,
    top_k: Annotated[int, typer.Option(metavar="K", min=1, help="Chunks that the _retrieved methods read.")] = 4,
    focus: Annotated[
        int, typer.Option(metavar="K", min=0, help="Segments of a prompt that each query reads; 0: all of them.")
    ] = PrefixConfig.focus,
    relevance: Annotated[
        float,
        typer.Option(metavar="X", min=0.0, help="How much search weighs in where queries choose segments; 0: nothing."),
    ] = PrefixConfig.relevance,
    adapter: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Adapters, a block of rows each: none, default, a folder; auto: the shipped one that fits.",
        ),
    ] = "auto",
    answers: Annotated[
        bool, typer.Option("--answers/--no-answers", help="Also generate answers and score them.")
    ] = True,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Longest answer. Default: the task's own.")
    ] = None,
    min_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Shortest answer. Default: the task's own.")
    ] = None,
    no_repeat_ngram: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="No run of N tokens comes twice in an answer. Default: the task's own."),
    ] = None,
    beams: Annotated[
        int, typer.Option(metavar="N", min=1, help="Answers followed side by side; the likeliest is given.")
    ] = 1,
    hints: Annotated[
        str, typer.Option(metavar="NAMES", help="Hints that are on, with commas between them: spelling,pointing.")
    ] = "",
    spelling: Annotated[
        float | None, typer.Option(metavar="X", min=0.0, help="Weight of the hint spelling. Default: its own.")
    ] = None,
    pointing: Annotated[
        float | None,
        typer.Option(metavar="X", min=0.0, help="How much words that a question asks for are preferred; 0: nothing."),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="Task needle: haystack lengths in tokens, such as 1k,8k,32k.")
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
    compressor: Annotated[
        str, typer.Option(metavar="NAME", help="What makes kv: attention_matching, or autocompressor (summaries).")
    ] = "attention_matching",
    decoder: Decoder = "embedded",
    device: Device = None,
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
    from lloco_engine.eval.run import EvalConfig, run

    settings: dict[str, Any] = {}
    if lengths is not None:
        settings["lengths"] = _parts(lengths, _length, "--lengths")
    if depths is not None:
        settings["depths"] = depths
    source = data or tasks.get(task, **settings).source(data_folder)
    config = EvalConfig(
        data="" if source is None else str(source),
        task=task,
        task_settings=settings,
        limit=limit,
        methods=tuple(_parts(methods, str, "--methods")),
        ratios=tuple(_parts(ratios, float, "--ratios")),
        passages_per_chunk=passages_per_chunk,
        segments=segments,
        top_k=top_k,
        focus=focus,
        relevance=relevance,
        adapter=adapter,
        answers=answers,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        no_repeat_ngram=no_repeat_ngram,
        beams=beams,
        hints=tuple(_parts(hints, str, "--hints")),
        spelling=spelling,
        pointing=pointing,
        compressor=compressor,
        decoder=decoder,
        device=device,
    )
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
