"""What a worker does: it loads what the books say, and knows by its first block which request reads what."""

from __future__ import annotations

import time

import pytest
import torch

from lloco_engine import Segment, SegmentUnavailable
from lloco_integrations.vllm.admission import Binding
from lloco_integrations.vllm.pool import Placed
from lloco_integrations.vllm.shelf import Shelf, page_bytes, pages_in

DIM = 8


class Files:
    def read(self, segment_id: str) -> Segment:
        if segment_id == "bad":
            raise SegmentUnavailable("it is damaged")
        slots = 4 if segment_id == "a" else 5
        keys = torch.full((slots, DIM), float(slots))
        return Segment(keys, keys + 1, torch.zeros(slots), torch.tensor([[slots]]), source_tokens=10 * slots)


def shelf() -> Shelf:
    return Shelf(Files(), 4, layers=1, heads=1, dim=DIM, inverse=torch.ones(DIM // 2))


def settled(one: Shelf) -> tuple[list[int], dict[int, str]]:
    loaded, lost = [], {}
    for _ in range(2000):
        some, failed = one.settle()
        loaded += some
        lost |= failed
        if not one._loading:
            return sorted(loaded), lost
        time.sleep(0.001)
    raise AssertionError("files are still being read")


def test_segments_are_loaded_and_found_by_first_block():
    one = shelf()
    one.follow([], [Placed(0, "a", ((2,),)), Placed(1, "b", ((0,),))], {})
    assert settled(one) == ([0, 1], {})
    one.follow([], [], {7: Binding((1, 0), 3, 1, (0.0, 1.0)), 8: None})
    step = one.step([8, 7], [0, 5, 10], [5, 5])
    assert step is not None and step.turned.tolist() == [8, 9]  # behind the second row's template prefix
    (part,) = step.parts
    assert part.rows.tolist() == [1] and part.shifts.tolist() == [50]
    read, _ = part.layout.read(0, one.pool, torch.zeros(1, 1, 2, DIM), 1.0)
    torch.testing.assert_close(read, torch.full_like(read, 5.0))  # of "a" alone, whose prior is the larger one
    x = torch.randn(10, 2, DIM)
    assert torch.equal(step.turn(x)[:8], x[:8]) and not torch.allclose(step.turn(x)[8:], x[8:])


def test_where_a_cpu_reads_nothing_is_put_into_pages():
    one = Shelf(Files(), 4, layers=1, heads=1, dim=DIM, inverse=torch.ones(DIM // 2), in_pages=False)
    one.follow([], [Placed(0, "a", ((2,),))], {})
    assert settled(one) == ([0], {}) and len(one.pool.keys) == 0
    one.follow([], [], {7: Binding((0,), 3, 0, ())})
    step = one.step([7], [0, 5], [5])
    assert step is not None
    (recall,) = step.parts[0].recalls
    x = torch.zeros(1, 1, 2, DIM)
    read = recall.slots.layer(0).attend(x, x, x, torch.zeros(1, 1, 2, 2), 1.0)
    torch.testing.assert_close(read, torch.full_like(read, 4 * 5 / 6))  # four slots of 5 and two tokens of 0


def test_who_has_read_what_is_dropped_is_forgotten():
    one = shelf()
    one.follow([], [Placed(0, "a", ((0,),))], {})
    settled(one)
    one.follow([], [], {7: Binding((0,), 0, 0, ())})
    one.follow([0], [], {})
    assert one.step([7], [0, 1], [1]) is None


def test_a_block_that_goes_to_another_request_forgets_the_first():
    one = shelf()
    one.follow([], [Placed(0, "a", ((0,),))], {})
    settled(one)
    one.follow([], [], {7: Binding((0,), 0, 0, ())})
    assert one.step([7], [0, 1], [1]) is not None
    one.follow([], [], {7: None})
    assert one.step([7], [0, 1], [1]) is None


def test_nothing_is_read_in_part():
    one = shelf()
    one.follow([], [Placed(0, "a", ((0,),))], {})
    settled(one)
    with pytest.raises(RuntimeError, match="has not loaded"):
        one.follow([], [], {7: Binding((0, 1), 0, 0, ())})
    one.follow([0], [], {})
    with pytest.raises(RuntimeError, match="has not loaded"):
        one.follow([], [], {7: Binding((0,), 0, 0, ())})


def test_a_file_that_cannot_be_read_is_told_and_harms_no_other():
    one = shelf()
    one.follow([], [Placed(0, "bad", ((0,),)), Placed(1, "a", ((1,),)), Placed(2, "a", ((0, 1),))], {})
    loaded, lost = settled(one)
    assert loaded == [1] and lost[0] == "it is damaged" and "cannot lie in 2" in lost[2]


def test_what_is_dropped_while_it_is_read_is_not_written():
    one = shelf()
    before = one.pool.keys.clone()
    one.follow([], [Placed(0, "a", ((0,),))], {})
    one.follow([0], [], {})
    assert settled(one) == ([], {}) and torch.equal(one.pool.keys, before)


def test_pages_of_a_pool():
    assert page_bytes(64) == 16 * (2 * 64 * 2 + 4)
    assert pages_in(1, 64) == 2**20 // page_bytes(64)
    with pytest.raises(ValueError, match="pool_mib must be room"):
        pages_in(0.001, 64)
