"""Prefix assembly: positions, order, budget, window."""

from __future__ import annotations

import pytest
import torch

from lloco_engine.config import PrefixConfig
from lloco_engine.errors import ConfigError, PromptTooLong
from lloco_engine.prefix import Room, assemble
from lloco_engine.types import Hit, Segment, Span

SEQUENCE = PrefixConfig(placement="sequence")


def segment(source_tokens: int, slots: int) -> Segment:
    lengths = torch.full((2, 2), slots, dtype=torch.int64)
    count = int(lengths.sum())
    return Segment(torch.zeros(count, 4), torch.zeros(count, 4), torch.zeros(count), lengths, source_tokens)


SEGMENTS = [segment(100, 10), segment(60, 6), segment(80, 8)]


def place(segments=SEGMENTS, config=None, **changes):
    sizes = {name: changes.pop(name) for name in ("window", "immovable") if name in changes}
    return assemble(segments, config, room=Room(**{"template": 7, "text": 30, "window": 1000} | sizes), **changes)


def hit(doc_id: str, ordinal: int) -> Hit:
    return Hit(f"{doc_id}{ordinal}", doc_id, ordinal, Span(0, 1), "x", 1, 0.5)


def test_parallel_keeps_every_segment_where_it_was_made_and_starts_after_the_longest():
    made = place()
    assert made.prefix.offsets == (0, 0, 0)
    assert made.prefix.start == 7 + 100
    assert made.prefix.placement == "parallel"
    assert (made.prefix.slots, made.prefix.source_tokens) == (24, 240)
    assert (made.kept, made.dropped) == ((0, 1, 2), ())
    assert all(one is other for one, other in zip(made.prefix.segments, SEGMENTS, strict=True))


def test_sequence_puts_each_after_the_one_before():
    made = place(config=SEQUENCE)
    assert made.prefix.offsets == (0, 100, 160)
    assert made.prefix.start == 7 + 240


def test_scores_become_priors_and_only_parallel_segments_are_chosen_among():
    made = place(config=PrefixConfig(focus=1, relevance=10), scores=[0.5, 0.9, 0.2]).prefix
    assert made.focus == 1 and made.prior == pytest.approx((-4.0, 0.0, -7.0))
    assert place().prefix.prior == () and place().prefix.focus == PrefixConfig.focus
    kept = place(config=PrefixConfig(max_slots=16), scores=[0.5, 0.4, 0.9])
    assert kept.kept == (0, 1) and kept.prefix.prior == pytest.approx((0.0, -0.1 * PrefixConfig.relevance))
    in_sequence = place(config=SEQUENCE, scores=[0.5, 0.9, 0.2]).prefix
    assert (in_sequence.focus, in_sequence.prior) == (0, ())


@pytest.mark.parametrize("wrong", [{"focus": -1}, {"relevance": -0.5}])
def test_a_focus_or_relevance_below_zero_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        PrefixConfig(**wrong)


def test_a_sequence_follows_the_documents_documents_by_their_best_hit():
    made = place(config=SEQUENCE, hits=[hit("b", 2), hit("a", 5), hit("b", 0)])
    assert made.kept == (2, 0, 1)
    assert made.prefix.offsets == (0, 80, 180)
    assert place(hits=[hit("b", 2), hit("a", 5), hit("b", 0)]).kept == (0, 1, 2)  # parallel has no order to keep


@pytest.mark.parametrize(("budget", "kept"), [(0, 3), (24, 3), (23, 2), (16, 2), (15, 1), (10, 1)])
@pytest.mark.parametrize("placement", ["parallel", "sequence"])
def test_the_budget_drops_whole_segments_worst_first(budget, kept, placement):
    made = place(config=PrefixConfig(placement, budget))
    assert made.kept == tuple(range(kept))
    assert made.dropped == tuple(range(kept, 3))
    assert budget == 0 or made.prefix.slots <= budget


def test_a_budget_is_filled_in_the_order_of_rank():
    made = place([segment(10, 4), segment(10, 9), segment(10, 1)], PrefixConfig(max_slots=6))
    assert made.dropped == (1, 2)  # the third would fit, but it is worse than the second


def test_a_budget_too_small_for_the_best_segment_is_refused():
    with pytest.raises(ConfigError, match="10 slots, not 9"):
        place(config=PrefixConfig(max_slots=9))


def test_the_window_is_counted_in_positions():
    assert place(window=7 + 100 + 30).prefix.start == 107
    with pytest.raises(PromptTooLong, match=r"window of 136: the template takes 7, 3 segments in parallel 100, .* 137"):
        place(window=136)
    assert place(config=SEQUENCE, window=7 + 240 + 30).prefix.start == 247
    with pytest.raises(PromptTooLong, match=r"window of 276: .* 3 segments in sequence 240, .* 30, 277 in all"):
        place(config=SEQUENCE, window=276)


def test_what_the_budget_drops_takes_no_positions():
    assert place(config=PrefixConfig("sequence", 10), window=7 + 100 + 30).prefix.start == 107


def test_no_segments_make_an_empty_prefix():
    made = place([])
    assert (made.prefix.segments, made.prefix.start, made.prefix.slots) == ((), 7, 0)
