"""Trials that take long: kills, flipped bytes, forged handles, odd inputs. Each adds rows to one table.

``make torture`` runs all of them; ``make torture ARGS="--kills 1000 --flips 5000"`` as many as you like.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

_ROWS: list[tuple[str, int, int, str]] = []

Report = Callable[[str, int, int, str], None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def report() -> Report:
    """Adds a row to the table at the end: what was tried, how often, how often it failed, and a note."""

    def add(trial: str, tried: int, failed: int, note: str = "") -> None:
        _ROWS.append((trial, tried, failed, note))

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _ROWS:
        return
    wide = max(len(row[0]) for row in _ROWS)
    terminalreporter.section("torture")
    terminalreporter.write_line(f"{'trial':<{wide}}  {'tried':>9}  {'failed':>6}  note")
    for trial, tried, failed, note in _ROWS:
        terminalreporter.write_line(f"{trial:<{wide}}  {tried:>9,}  {failed:>6,}  {note}")
