"""``lloco scores``: what the scores of search tell."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["scores"]


def scores(
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="JSON Lines of documents with questions, beside the demo."),
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write the result here too.")] = None,
    embedder: Annotated[str, typer.Option("--embedder", metavar="NAME", help="Whose scores.")] = "embedded",
) -> None:
    """Measure which best scores answered questions have.

    Asks stores questions that they answer and questions that they cannot
    answer, and gives the floor below which at most 1 in 20 of the former are
    (docs/scores.md). Also how follow-ups are best searched for. A minute.

    \b
    Examples:
      lloco scores --data wikifacts/val.jsonl --json results/scores.json
      lloco scores --embedder ./my-embedder
    """
    from rich.console import Console
    from rich.table import Table

    from lloco_engine.eval.machine import check_writable, write_json
    from lloco_engine.eval.scores import measure

    if json_out is not None:
        check_writable(json_out)
    result = measure(data, embedder)
    console = Console()
    console = console if console.is_terminal else Console(width=200)
    table = Table("questions", "answered", box=None, pad_edge=False, header_style="bold")
    for name in ("count", "lowest", "median", "highest", f"below {result['floor']:.2f}"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        numbers = (f"{row[name]:.2f}" for name in ("lowest", "median", "highest"))
        answered = "yes" if row["answered"] else "no"
        table.add_row(row["questions"], answered, str(row["count"]), *numbers, str(row["below_floor"]))
    console.print(table)
    table = Table("questions", "searched", box=None, pad_edge=False, header_style="bold")
    for name in ("count", "document first", "evidence in 4"):
        table.add_column(name, justify="right")
    for row in result["follow_ups"]:
        counts = (str(row[name]) for name in ("count", "document_first", "evidence_in_4"))
        table.add_row(row["questions"], row["searched"], *counts)
    console.print()
    console.print(table)
    if json_out is not None:
        write_json(json_out, result)
