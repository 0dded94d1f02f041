"""``lloco memories``: what compact KV and summary embeddings cost beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["memories"]


def memories(
    json_out: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write the result here too.")] = None,
    segments: Annotated[int, typer.Option(metavar="N", min=1, help="Segments that are read together.")] = 4,
    segment_tokens: Annotated[int, typer.Option(metavar="N", min=64, help="Tokens of each.")] = 1536,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Measurements of each time.")] = 5,
    decoder: Annotated[
        str, typer.Option("--decoder", envvar="LLOCO_DECODER", metavar="NAME", help="As elsewhere: its shape counts.")
    ] = "embedded",
    device: Annotated[str | None, typer.Option("--device", metavar="NAME", help="cpu, cuda, cuda:N or mps.")] = None,
) -> None:
    """Compare what compact KV and summaries cost.

    Bytes on disk, time to first token with the files read, and seconds of
    compressing, on one decoder. Its summary tokens are random numbers: size
    and speed do not depend on them, and quality is not measured.

    \b
    Examples:
      lloco memories
      lloco memories --segments 2 --json memories.json
    """
    from rich.console import Console
    from rich.table import Table

    from lloco_engine.config import NUMBERS
    from lloco_engine.eval.machine import check_writable, write_json
    from lloco_engine.eval.memories import MemoriesConfig, run
    from lloco_engine.eval.progress import bar

    if json_out is not None:
        check_writable(json_out)
    config = MemoriesConfig(decoder, device, segments, segment_tokens, repeats=repeats)
    with bar() as progress:
        result = run(config, progress=progress)
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = ["memory", "slots", *NUMBERS, "bytes/token", "first token", "of no context", "compress"]
    for name in names:
        table.add_column(name, justify="left" if name == "memory" else "right")
    for row in result["rows"]:
        table.add_row(
            row["memory"],
            str(row["slots_per_segment"]),
            *(_bytes(row["bytes_per_segment"][dtype]) for dtype in NUMBERS),
            f"{row['bytes_per_source_token']['float16']:.4g}",
            f"{row['ttft_s']:.3f} s",
            f"{row['ttft_over_no_context']:.2f}x",
            f"{row['compress_s_per_segment']:.2f} s",
        )
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)
    large = result["llama_2_7b"]
    sizes = ", ".join(f"{name.replace('_', ' ')} {_bytes(large[name])}" for name in large if name != "note")
    typer.echo(f"a segment of Llama-2-7B, computed: {sizes}")
    typer.echo(f"{segments} segments of {segment_tokens:,} tokens; summary tokens: random numbers")
    if json_out is not None:
        write_json(json_out, result)


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
