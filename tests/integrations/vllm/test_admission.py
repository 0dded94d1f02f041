"""Who is let in: signed requests whose segments are all loaded, and nobody else; nobody's failure is another's."""

from __future__ import annotations

import logging
import random
import time
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import pytest
import torch
from forgery_cases import forged, outdated

from lloco_engine import Segment, SegmentUnavailable
from lloco_integrations.vllm.admission import Admission, Binding, Verdict
from lloco_integrations.vllm.params import FIELD, Memory, sign
from lloco_integrations.vllm.pool import Pool

KEY = b"k" * 32
STORE = "5" * 64
ONE, TWO, THREE = ("1" * 32, "2" * 32, "3" * 32)


class Files:
    """Segments of one layer and head, of so many slots; a number below 0 is a damaged file."""

    def __init__(self) -> None:
        self.slots = {ONE: 20, TWO: 40, THREE: 16}
        self.asked: list[str] = []

    def read(self, segment_id: str) -> Segment:
        self.asked.append(segment_id)
        many = self.slots.get(segment_id, -1)
        if many < 0:
            raise SegmentUnavailable(f"segment {segment_id} cannot be used")
        rows = torch.zeros(many, 4)
        return Segment(rows, rows, torch.zeros(many), torch.tensor([[many]]), source_tokens=100)


def memory(*segments: str, **changes: Any) -> Memory:
    made = Memory(STORE, segments or (ONE,), template=4, tenant="red", expires=int(time.time()) + 60)
    return replace(made, **changes)


def door(pages: int = 16, files: Files | None = None) -> tuple[Admission, Pool, Files]:
    files, pool = files or Files(), Pool(pages)
    return Admission(files, pool, ranks=1, keys=[KEY], store=STORE, window=1000), pool, files


def arrive(admission: Admission, name: str, given: Memory, tokens: int = 50) -> str:
    return admission.arrive(name, sign(given, [KEY]), tokens=tokens)


def settled(admission: Admission, name: str) -> Verdict:
    """What is said once threads have looked at files."""
    for _ in range(2000):
        if (said := admission.verdict(name)) is not Verdict.WAIT or not admission._measured:
            return said
        time.sleep(0.001)
    raise AssertionError("files are still being read")


def load(admission: Admission, pool: Pool) -> list[str]:
    _, placed = pool.changes()
    for one in placed:
        admission.loaded(one.number, 0)
    return [one.segment for one in placed]


def test_a_request_without_a_memory_is_none_of_its_business():
    admission, *_ = door()
    for params in (None, {}, {"do_remote_prefill": False}):
        assert admission.arrive("plain", params, tokens=3) == ""
        assert admission.verdict("plain") is Verdict.PLAIN and admission.binding("plain") is None
    assert admission.read_by("plain") == 0


def test_a_request_waits_until_all_its_segments_are_loaded():
    admission, pool, files = door()
    assert arrive(admission, "a", memory(ONE, TWO, focus=1, priors=(0.0, -1.0)))
    assert admission.verdict("a") is Verdict.WAIT and settled(admission, "a") is Verdict.WAIT
    _, placed = pool.changes()
    assert [one.segment for one in placed] == [ONE, TWO] and [len(one.pages[0]) for one in placed] == [2, 3]
    admission.loaded(placed[0].number, 0)
    assert admission.verdict("a") is Verdict.WAIT
    with pytest.raises(RuntimeError, match="must not be answered"):
        admission.binding("a")
    admission.loaded(placed[1].number, 0)
    assert admission.verdict("a") is Verdict.READ
    assert admission.binding("a") == Binding((0, 1), 4, 1, (0.0, -1.0)) and admission.read_by("a") == 2
    arrive(admission, "b", memory(TWO))
    assert settled(admission, "b") is Verdict.READ and files.asked.count(TWO) == 1


def test_what_is_not_signed_is_refused_and_keeps_nobody_waiting():
    admission, pool, files = door()
    good = sign(memory(), [KEY])
    bad = {
        "another key": sign(memory(), [b"x" * 32]),
        "expired": sign(memory(expires=int(time.time()) - 1), [KEY]),
        "another store": sign(memory(store="6" * 64), [KEY]),
        "another segment": {FIELD: {**good[FIELD], "segments": (TWO,)}},
        "another tenant": {FIELD: {**good[FIELD], "tenant": "blue"}},
        "a path": {FIELD: {**good[FIELD], "segments": ("../../etc/passwd",)}},
        "no signature": {FIELD: {name: value for name, value in good[FIELD].items() if name != "signature"}},
        "no object": {FIELD: 7},
        "nothing": {FIELD: None},
        "deep": {FIELD: {**good[FIELD], "focus": [[[]]]}},
        "odd keys": {FIELD: {1: 2, "x": 3}},
    }
    salts = {admission.arrive(name, params, tokens=9) for name, params in bad.items()}
    assert len(salts) == len(bad) and "" not in salts
    assert arrive(admission, "good", memory()) not in salts
    for name in bad:
        assert admission.verdict(name) is Verdict.REFUSED, name
        with pytest.raises(RuntimeError, match="must not be answered"):
            admission.binding(name)
        assert admission.read_by(name) == 0
    settled(admission, "good")
    load(admission, pool)
    assert admission.verdict("good") is Verdict.READ and files.asked == [ONE]


@pytest.mark.parametrize("raised", [RuntimeError("?"), RecursionError(), MemoryError()])
def test_no_surprise_while_a_request_is_checked_goes_further(monkeypatch, raised):
    admission, *_ = door()

    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr("lloco_integrations.vllm.admission.verify", fail)
    assert arrive(admission, "a", memory()) and admission.verdict("a") is Verdict.REFUSED


def test_a_segment_that_cannot_be_read_refuses_those_alone_who_want_it():
    files = Files()
    files.slots[TWO] = -1
    admission, pool, _ = door(files=files)
    for name, segments in (("bad", (ONE, TWO)), ("good", (ONE,)), ("missing", ("4" * 32,))):
        arrive(admission, name, memory(*segments))
    assert settled(admission, "bad") is Verdict.REFUSED and settled(admission, "missing") is Verdict.REFUSED
    settled(admission, "good")
    assert load(admission, pool) == [ONE] and admission.verdict("good") is Verdict.READ
    files.slots[TWO] = 8  # it was ingested again
    admission.leave("bad")
    arrive(admission, "bad", memory(ONE, TWO))
    assert settled(admission, "bad") is Verdict.WAIT
    load(admission, pool)
    assert admission.verdict("bad") is Verdict.READ


def test_a_segment_that_a_worker_cannot_load_refuses_its_readers_and_frees_its_pages():
    admission, pool, _ = door(pages=5)
    for name, segments in (("one", (ONE, TWO)), ("two", (TWO,))):
        arrive(admission, name, memory(*segments))
        settled(admission, name)
    _, placed = pool.changes()
    admission.loaded(placed[0].number, 0)
    admission.lost(placed[1].number, "damaged since")
    assert admission.verdict("one") is Verdict.REFUSED and admission.verdict("two") is Verdict.REFUSED
    arrive(admission, "three", memory(TWO))
    assert settled(admission, "three") is Verdict.WAIT and load(admission, pool) == [TWO]
    assert admission.verdict("three") is Verdict.READ


def test_what_never_fits_is_refused_and_what_fits_later_waits():
    admission, pool, _ = door(pages=3)
    arrive(admission, "never", memory(ONE, TWO))
    assert settled(admission, "never") is Verdict.REFUSED
    for name, segment in (("first", ONE), ("second", TWO)):
        arrive(admission, name, memory(segment))
        settled(admission, name)
    assert load(admission, pool) == [ONE] and admission.verdict("first") is Verdict.READ
    assert admission.verdict("second") is Verdict.WAIT and pool.changes() == ([], [])
    admission.leave("first")
    assert admission.verdict("second") is Verdict.WAIT and load(admission, pool) == [TWO]
    assert admission.verdict("second") is Verdict.READ


@pytest.mark.parametrize("tokens, verdict", [(900, Verdict.WAIT), (901, Verdict.REFUSED)])
def test_positions_must_fit_the_window(tokens, verdict):
    admission, *_ = door()
    arrive(admission, "a", memory(), tokens)
    assert settled(admission, "a") is verdict


def test_the_prefix_cache_is_kept_apart_by_memory_tenant_and_the_clients_salt():
    admission, *_ = door()
    kinds = [memory(), memory(TWO), memory(tenant="blue"), memory(focus=1), memory(template=5), memory(priors=(0.5,))]
    salts = {arrive(admission, str(n), one) for n, one in enumerate(kinds)}
    salts.add(admission.arrive("salted", sign(memory(), [KEY]), tokens=9, salt="mine"))
    assert len(salts) == len(kinds) + 1
    assert arrive(admission, "again", memory(expires=int(time.time()) + 99)) in salts  # when it expires is no matter


def test_who_leaves_is_forgotten():
    admission, pool, _ = door()
    arrive(admission, "a", memory())
    settled(admission, "a")
    admission.leave("a")
    admission.leave("a")
    assert admission.verdict("a") is Verdict.PLAIN
    assert pool.acquire("x", {TWO: (16,)})  # the whole pool


def test_no_forged_or_altered_request_is_let_in_or_reaches_a_file(request, caplog):
    """``--forgeries`` of them."""
    caplog.set_level(logging.ERROR, "lloco_integrations.vllm")  # else each is a line
    admission, pool, files = door()
    good = sign(memory(ONE, TWO, priors=(0.0, 1.0)), [KEY])[FIELD]
    other = sign(memory(THREE, tenant="blue", focus=1, template=7), [KEY])[FIELD]
    made = forged(good, other, random.Random(request.config.getoption("--seed")))
    for value in chain(outdated(good, KEY), islice(made, request.config.getoption("--forgeries"))):
        assert admission.arrive("forged", {FIELD: value}, tokens=9) == "refused forged", value
        assert admission.verdict("forged") is Verdict.REFUSED and admission.read_by("forged") == 0, value
        admission.leave("forged")
    assert files.asked == [] and pool.changes() == ([], [])
    for name, value in (("good", good), ("other", other)):
        admission.arrive(name, {FIELD: value}, tokens=9)
        assert settled(admission, name) is Verdict.WAIT
    assert load(admission, pool) == [ONE, TWO, THREE]
