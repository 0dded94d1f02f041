"""The books of the pool: pages, references, eviction, and requests that wait for each other."""

from __future__ import annotations

import random

import pytest

from lloco_integrations.vllm.pool import PAGE, Pool, heads_of, pages_needed


def load(pool: Pool) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Do what workers do; returns what was placed."""
    _, placed = pool.changes()
    for one in placed:
        for rank in range(len(one.pages)):
            pool.loaded(one.number, rank)
    return {one.segment: one.pages for one in placed}


def test_requests_share_a_segment():
    pool = Pool(10)
    assert pool.acquire("one", {"a": (3,), "b": (2,)})
    assert not pool.ready("one")
    placed = load(pool)
    assert sorted(placed["a"][0] + placed["b"][0]) == [0, 1, 2, 3, 4]
    assert pool.ready("one")
    assert pool.acquire("two", {"b": (2,)}) and pool.ready("two")
    assert pool.changes() == ([], [])
    assert pool.numbers("two") == pool.numbers("one")[1:]


def test_what_nobody_reads_makes_room_the_longest_unread_first():
    pool = Pool(6)
    for name in "abc":
        pool.acquire(name, {name: (2,)})
    load(pool)
    for name in "bca":
        pool.release(name)
    assert pool.acquire("d", {"d": (3,)})
    dropped, placed = pool.changes()
    assert dropped == [1, 2] and len(placed) == 1  # b and c
    assert pool.acquire("again", {"a": (2,)}) and pool.ready("again")


def test_what_is_read_is_never_dropped_and_nobody_holds_a_part():
    pool = Pool(4)
    assert pool.acquire("one", {"a": (2,)})
    assert not pool.acquire("two", {"b": (2,), "c": (2,)})
    load(pool)
    assert pool.changes() == ([], [])  # neither b nor c was placed
    pool.release("one")
    assert pool.acquire("two", {"b": (2,), "c": (2,)})
    dropped, placed = pool.changes()
    assert dropped == [0] and [one.segment for one in placed] == ["b", "c"]


def test_a_segment_that_the_request_itself_reads_is_not_dropped_for_it():
    pool = Pool(4)
    pool.acquire("one", {"a": (2,)})
    pool.acquire("two", {"b": (2,)})
    load(pool)
    pool.release("one")
    pool.release("two")
    assert pool.acquire("three", {"a": (2,), "c": (2,)})
    assert pool.changes()[0] == [1]  # b, though a is longer unread


def test_who_waits_is_served_before_those_who_come_later():
    pool = Pool(4)
    pool.acquire("one", {"a": (2,)})
    assert not pool.acquire("large", {"b": (4,)})
    assert not pool.acquire("small", {"c": (2,)})  # two pages are free, and large is before
    assert pool.acquire("shares", {"a": (2,)})
    pool.release("large")
    assert pool.acquire("small", {"c": (2,)})


def test_ranks_are_counted_apart():
    pool = Pool(4, ranks=2)
    assert not pool.too_large({"a": (4, 1), "b": (0, 3)})
    assert pool.too_large({"a": (4, 1), "b": (1, 0)})
    assert pool.acquire("one", {"a": (4, 1)})
    assert not pool.acquire("two", {"b": (1, 1)})
    _, (placed,) = pool.changes()
    pool.loaded(placed.number, 0)
    assert not pool.ready("one")
    pool.loaded(placed.number, 1)
    assert pool.ready("one")


def test_what_is_lost_is_free_and_names_its_readers():
    pool = Pool(2)
    pool.acquire("one", {"a": (2,)})
    pool.acquire("two", {"a": (2,)})
    _, (placed,) = pool.changes()
    assert pool.lost(placed.number) == {"one", "two"} and pool.lost(placed.number) == set()
    assert not pool.ready("one")
    assert pool.acquire("three", {"a": (2,)})
    again = pool.changes()[1][0]
    assert again.number != placed.number
    pool.loaded(again.number, 0)
    pool.release("one")
    pool.release("two")
    assert pool.ready("three") and not pool.acquire("four", {"b": (1,)})


def test_a_segment_dropped_before_workers_hear_of_it_is_not_loaded():
    pool = Pool(2)
    pool.acquire("one", {"a": (2,)})
    pool.release("one")
    pool.acquire("two", {"b": (2,)})
    dropped, placed = pool.changes()
    assert dropped == [0] and [one.segment for one in placed] == ["b"]


def test_pages_are_never_given_twice_whatever_happens():
    draw, pool = random.Random(0), Pool(12, ranks=2)
    needs = {name: (draw.randint(0, 4), draw.randint(1, 4)) for name in "abcdefgh"}
    readers: dict[str, list[str]] = {}
    there: dict[int, tuple[tuple[int, ...], ...]] = {}
    numbers: dict[str, int] = {}
    for step in range(3000):
        if readers and draw.random() < 0.5:
            reader = draw.choice(list(readers))
            del readers[reader]
            pool.release(reader)
        else:
            wanted = draw.sample("abcdefgh", draw.randint(1, 3))
            if pool.acquire(str(step), {name: needs[name] for name in wanted}):
                readers[str(step)] = wanted
            else:
                pool.release(str(step))
        dropped, placed = pool.changes()
        for number in dropped:
            there.pop(number, None)
        for one in placed:
            there[one.number], numbers[one.segment] = one.pages, one.number
            for rank in (0, 1):
                pool.loaded(one.number, rank)
        for rank in (0, 1):
            taken = [page for pages in there.values() for page in pages[rank]]
            assert len(taken) == len(set(taken)) and all(0 <= page < 12 for page in taken)
        for reader, wanted in readers.items():
            assert pool.ready(reader) and pool.numbers(reader) == tuple(numbers[name] for name in wanted)
            assert all(numbers[name] in there for name in wanted)


def test_pages_of_a_segment_by_rank():
    lengths = [[1, PAGE, PAGE + 1, 0], [3 * PAGE, 0, 2, 2]]
    assert pages_needed(lengths, 1) == (9,)
    assert pages_needed(lengths, 2) == (5, 4)
    assert pages_needed(lengths, 8) == (4, 4, 1, 1, 3, 3, 1, 1)  # two ranks have one head
    assert [list(heads_of(rank, 2, 4)) for rank in (0, 1)] == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="multiples of each other"):
        heads_of(0, 3, 4)


def test_a_pool_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one page"):
        Pool(0)
