"""A run that goes on after a kill."""

from __future__ import annotations

import pytest

from lloco_engine.errors import ConfigError
from lloco_engine.journal import Journal

RESULTS = [{"text": "größer\u2028漢字"}, [1, None], "x"]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "made" / "partial"
    journal = Journal(path, "key")
    for result in RESULTS:
        journal.add(result)
    return path


def test_the_same_run_goes_on_and_ends(path):
    journal = Journal(path, "key")
    assert journal.done == RESULTS
    journal.add("more")
    assert Journal(path, "key").done == [*RESULTS, "more"]
    journal.finish()
    assert not path.exists() and Journal(path, "key").done == []


def test_a_kill_at_any_byte_loses_no_more_than_the_line_it_was_in(path):
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = Journal(path, "key")
        assert kept.done == RESULTS[: max(0, whole[:cut].count(b"\n") - 1)], cut
        kept.add("more")
        assert Journal(path, "key").done == kept.done, cut


def test_another_run_is_refused_or_dropped(path):
    with pytest.raises(ConfigError, match=r"other data or settings; .* or remove the file"):
        Journal(path, "other")
    assert Journal(path, "key").done == RESULTS
    assert Journal(path, "other", another="drop").done == []
    assert Journal(path, "other").done == []


def test_without_a_file_results_are_in_memory(tmp_path):
    journal = Journal(None, "key")
    journal.add(1)
    journal.finish()
    assert journal.done == [1] and not list(tmp_path.iterdir())
