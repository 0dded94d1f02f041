"""``lloco report``: tables and plots out of the JSON that ``lloco eval`` and ``lloco bench`` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["report"]


def report(
    results: Annotated[list[Path], typer.Argument(metavar="RESULTS...", help="JSON files of lloco eval and bench.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write to.")] = Path("report"),
) -> None:
    """Make tables (Markdown) and plots of results.

    Writes report.md and, by what there is: quality against ratio, quality
    against prompt size, heat maps of needles, time to first token against
    source length.

    \b
    Examples:
      lloco report results/*.json --out report
      lloco report qmsum.json bench.json
    """
    from lloco_engine.eval.report import write_report

    for path in write_report(results, out):
        typer.echo(str(path))
