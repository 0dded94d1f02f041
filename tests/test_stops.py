"""The paths of one question and of one document, as docs/architecture.md draws them: followed as they really run."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from places import ROOT

import lloco_engine
from lloco_engine import Document, Engine
from lloco_engine.testing import HashingEmbedder

PACKAGE = Path(lloco_engine.__file__).parent
# Values that everybody hands around, and the rules that they keep: no place where one stays.
VALUES = {
    "atomic",
    "config",
    "documents",
    "errors",
    "filters",
    "graphemes",
    "journal",
    "metadata",
    "process",
    "request",
}
VALUES |= {"shape", "types", "unicode"}


def path_drawn(title: str) -> tuple[list[str], set[str]]:
    """The stops of a table, in order, and what is asked on the way."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text[text.index(f"### {title}") :].split("\n#")[0]
    rows = re.findall(r"^\| \d+ \| `(\w+)` \|.*\|([^|]*)\|$", section, re.MULTILINE)
    return [stop for stop, _ in rows], {name for _, tools in rows for name in re.findall(r"`(\w+)`", tools)}


def path_run(call: Callable[[], object]) -> set[str]:
    """The parts of the engine that a call enters."""
    entered: set[str] = set()

    def profile(frame, event, _):
        if event == "call" and (path := Path(frame.f_code.co_filename)).is_relative_to(PACKAGE):
            part = path.relative_to(PACKAGE).with_suffix("").parts[0]
            entered.add("embedder" if part == "testing" else part)

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered - VALUES


@pytest.fixture
def engine(tmp_path, tiny_folder) -> Iterator[Engine]:
    with Engine.open(tmp_path / "store", decoder=str(tiny_folder), embedder=HashingEmbedder()) as made:
        made.ingest(Document("first", "The pump in hall two is red. Anna Vogt repaired it in spring."))
        made.ask("Who repaired the pump?")  # what is loaded once is no part of a path
        yield made


def first_token(engine: Engine) -> None:
    with engine.stream("Who repaired the crane?") as stream:
        next(iter(stream))


def one_document(engine: Engine) -> None:
    engine.ingest(Document("second", "The crane in hall three fell in March. Edwin Marsh repaired it."))


@pytest.mark.parametrize(
    ("title", "most", "walk"),
    [("The path of one question", 8, first_token), ("The path of one document", 7, one_document)],
)
def test_a_path_is_the_one_that_is_drawn(engine, title, most, walk):
    stops, asked = path_drawn(title)
    entered = path_run(lambda: walk(engine))
    assert 4 < len(stops) <= most
    assert set(stops) <= entered, "a stop is drawn where the path does not lead"
    assert entered <= {*stops, *asked}, "the path leads to what docs/architecture.md does not draw"
