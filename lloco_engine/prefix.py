"""Segments -> Prefix: which are placed, in which order, at which positions. Pure: no model and no store is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lloco_engine.config import PrefixConfig
from lloco_engine.errors import ConfigError, PromptTooLong
from lloco_engine.types import Hit, Prefix, Segment

__all__ = ["Assembly", "assemble"]


@dataclass(frozen=True, eq=False)
class Assembly:
    """A prefix and what became of the segments that were offered for it.

    ``kept`` are the places, in the offered order, of the segments in ``prefix``; ``dropped`` those of the rest.
    """

    prefix: Prefix
    kept: tuple[int, ...]
    dropped: tuple[int, ...] = ()


def assemble(
    segments: Sequence[Segment],
    config: PrefixConfig | None = None,
    *,
    template_tokens: int,
    room: int,
    window: int,
    hits: Sequence[Hit] | None = None,
) -> Assembly:
    """Place segments for one prompt.

    In parallel every segment keeps the positions it was made at, right after the template prefix, and the text starts
    after the longest; the order does not matter. In sequence each starts where the one before ends: segments of a
    document follow their order in it, documents that of their best segment.

    Args:
        segments: best first; those at the end are dropped when ``max_slots`` is short. None is ever split.
        config: placement and budget.
        template_tokens: tokens of the template prefix.
        room: tokens of the question and of the longest answer, which follow the prefix.
        window: positions that the decoder can attend over.
        hits: where the segments come from, one each, in the same order; without, a sequence keeps the given order.

    Raises:
        ConfigError: ``max_slots`` is too small for the best segment.
        PromptTooLong: the positions run over the window; gives the numbers.
    """
    config = PrefixConfig() if config is None else config
    kept = _within_budget(segments, config.max_slots)
    placed = list(kept)
    if config.placement == "sequence" and hits is not None:
        placed = _in_document_order(kept, hits)
    lengths = [segments[number].source_tokens for number in placed]
    if config.placement == "parallel":
        offsets, extent = [0] * len(placed), max(lengths, default=0)
    else:
        offsets = [sum(lengths[:number]) for number in range(len(placed))]
        extent = sum(lengths)
    start = template_tokens + extent
    if start + room > window:
        raise PromptTooLong(
            f"positions of the prompt and the answer must fit the decoder's window of {window}: the template takes "
            f"{template_tokens}, {len(placed)} segments in {config.placement} {extent}, question and answer {room}, "
            f"{start + room} in all; {_advice(config, len(placed))}"
        )
    prefix = Prefix(tuple(segments[number] for number in placed), tuple(offsets), start, config.placement)
    return Assembly(prefix, tuple(placed), tuple(range(len(kept), len(segments))))


def _within_budget(segments: Sequence[Segment], most: int) -> range:
    """The first segments that have ``most`` slots together (0: all of them)."""
    total = 0
    for number, segment in enumerate(segments):
        total += segment.slots
        if most and total > most:
            if number == 0:
                raise ConfigError(f"max_slots must hold the best segment, which has {total} slots, not {most}")
            return range(number)
    return range(len(segments))


def _in_document_order(numbers: Sequence[int], hits: Sequence[Hit]) -> list[int]:
    first: dict[tuple[str, str], int] = {}
    for number in numbers:
        first.setdefault((hits[number].tenant, hits[number].doc_id), number)
    return sorted(numbers, key=lambda n: (first[hits[n].tenant, hits[n].doc_id], hits[n].ordinal))


def _advice(config: PrefixConfig, segments: int) -> str:
    if config.placement == "sequence" and segments > 1:
        return "retrieve fewer segments, place them in parallel, or shorten the question or the answer"
    return "shorten the question or lower max_new_tokens"
