"""``lloco report``: a page of tables and plots out of the JSON that measurements wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["report"]


def report(
    results: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RESULTS...", help="JSON files of lloco eval, bench, memories and scores."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.md", help="The page; its plots go into a folder beside it.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail where the page is not what the results say.")
    ] = False,
) -> None:
    """Make a page of results: tables, commands and plots.

    Every result has its table with 95% intervals (bootstrap over documents),
    what it is worth beside its baselines, the command that made it and, by
    what there is, plots: loss against ratio and against prompt size, heat maps
    of needles, time to first token against source length.

    Without RESULTS it is docs/results.md of results/*.json, in the order that
    results/page.toml gives.

    \b
    Examples:
      lloco report
      lloco report --check
      lloco report qmsum.json bench.json --out report.md
    """
    from lloco_engine.eval.report import check_report, read_report, write_report

    page = out or Path("report.md" if results else "docs/results.md")
    made = read_report(results or sorted(Path("results").glob("*.json")), page)
    if check:
        check_report(made)
        typer.echo(f"{page} is what {len(made.text.splitlines()):,} lines of results say")
        return
    for path in write_report(made):
        typer.echo(str(path))
