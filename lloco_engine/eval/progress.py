"""A progress bar on stderr with the time left, shown only to a person."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Report", "bar"]

Report = Callable[[str, float, float], None]  # what is being done, how much of it is done, how much there is


@contextmanager
def bar() -> Iterator[Report | None]:
    """A function to report to, which draws one bar; None where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("starting", total=None)
        current = ""

        def report(what: str, done: float, total: float) -> None:
            nonlocal current
            if what != current:  # the rate of one kind of work says nothing of the next
                shown.reset(task)
                current = what
            shown.update(task, description=what, completed=done, total=total)

        yield report
