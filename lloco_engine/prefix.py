"""Segments -> Prefix: which are placed, in which order, at which positions. Pure: no model and no store is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lloco_engine.config import PrefixConfig
from lloco_engine.errors import ConfigError, PromptTooLong
from lloco_engine.types import AnySegment, Hit, Prefix, SummarySegment

__all__ = ["Assembly", "assemble", "place"]


@dataclass(frozen=True, eq=False)
class Assembly:
    """A prefix and what became of the segments that were offered for it.

    ``kept`` are the places, in the offered order, of the segments in ``prefix``; ``dropped`` those of the rest.
    """

    prefix: Prefix
    kept: tuple[int, ...]
    dropped: tuple[int, ...] = ()


def assemble(
    segments: Sequence[AnySegment],
    config: PrefixConfig | None = None,
    *,
    template_tokens: int,
    room: int,
    window: int,
    hits: Sequence[Hit] | None = None,
    needs: Sequence[Sequence[int]] | None = None,
    scores: Sequence[float] | None = None,
    rotary: bool = True,
) -> Assembly:
    """Place segments for one prompt.

    Compact KV in parallel keeps the positions it was made at, right after the template prefix, and the text starts
    after the longest; the order does not matter. In sequence each starts where the one before ends: segments of a
    document follow their order in it, documents that of their best segment. Summaries stand in that order too, one
    vector after another, before all text.

    Args:
        segments: best first; those at the end are dropped when ``max_slots`` is short. None is ever split. Summaries
            that do not fit the window are dropped like those beyond ``max_slots``.
        config: placement (of compact KV) and budget.
        template_tokens: tokens of the template prefix.
        room: tokens of the question and of the longest answer, which follow the prefix.
        window: positions that the decoder can attend over.
        hits: where the segments come from, one each, in the same order; without, the given order is kept.
        needs: for each segment that is wanted, the places of those it is read after; the segments beyond
            ``len(needs)`` are not wanted by themselves. None: all are wanted and none needs another.
        scores: what search thinks of each segment, of which ``config.relevance`` makes priors.
        rotary: whether a summary vector takes a position, as it does where positions are rotary.

    Raises:
        ConfigError: ``max_slots`` is too small for the best segment with what it needs; or segments differ in kind.
        PromptTooLong: the positions run over the window; gives the numbers.
    """
    config = PrefixConfig() if config is None else config
    needs = [()] * len(segments) if needs is None else needs
    kinds = {isinstance(segment, SummarySegment) for segment in segments}
    if len(kinds) > 1:
        raise ConfigError("segments of one prompt must be of one kind, compact KV or summary embeddings")
    if kinds == {True}:
        free = window - template_tokens - room if rotary else None
        placed = _within_budget(segments, needs, config.max_slots, free)
        placed = placed if hits is None else _in_document_order(placed, hits)
        prefix = _summaries([segments[number] for number in placed], rotary)
        extent = prefix.start
    else:
        placed = _within_budget(segments, needs, config.max_slots)
        if config.placement == "sequence" and hits is not None:
            placed = _in_document_order(placed, hits)
        told = None if scores is None else [scores[number] for number in placed]
        prefix = place([segments[number] for number in placed], config, template_tokens=template_tokens, scores=told)
        extent = prefix.start - template_tokens
    total = template_tokens + extent + room
    if total > window:
        raise PromptTooLong(
            f"positions of the prompt and the answer must fit the decoder's window of {window}: the template takes "
            f"{template_tokens}, {len(placed)} segments in {prefix.placement} {extent}, question and answer {room}, "
            f"{total} in all; {_advice(prefix, len(placed))}"
        )
    dropped = tuple(number for number in range(len(needs)) if number not in set(placed))
    return Assembly(prefix, tuple(placed), dropped)


def place(
    segments: Sequence[AnySegment],
    config: PrefixConfig | None = None,
    *,
    template_tokens: int,
    scores: Sequence[float] | None = None,
) -> Prefix:
    """All of some segments of compact KV for one prompt, whatever the window holds; arguments as `assemble` has."""
    config = PrefixConfig() if config is None else config
    lengths = [segment.source_tokens for segment in segments]
    if config.placement == "sequence":
        offsets = tuple(sum(lengths[:number]) for number in range(len(segments)))
        return Prefix(tuple(segments), offsets, template_tokens + sum(lengths), "sequence")
    best = max(scores, default=0.0) if scores is not None else 0.0
    prior = () if scores is None else tuple(config.relevance * (score - best) for score in scores)
    start = template_tokens + max(lengths, default=0)
    return Prefix(tuple(segments), (0,) * len(segments), start, focus=config.focus, prior=prior)


def _summaries(segments: Sequence[AnySegment], rotary: bool) -> Prefix:
    slots = sum(segment.slots for segment in segments)
    return Prefix(tuple(segments), (0,) * len(segments), slots if rotary else 0, "sequence")


def _within_budget(
    segments: Sequence[AnySegment], needs: Sequence[Sequence[int]], max_slots: int, free: int | None = None
) -> list[int]:
    """The first wanted segments, each with what it needs, that have at most ``max_slots`` (0: any number) together.

    ``free`` are the positions that the window leaves for slots, where each takes one. The first segment is not dropped
    for them: that nothing fits is for the caller to say.
    """
    kept: dict[int, None] = {}
    total = 0
    for number, needed in enumerate(needs):
        more = [one for one in (*needed, number) if one not in kept]
        total += sum(segments[one].slots for one in more)
        if max_slots and total > max_slots:
            if number == 0:
                raise ConfigError(f"max_slots must hold the best segment, which has {total} slots, not {max_slots}")
            break
        if free is not None and total > free and number > 0:
            break
        kept |= dict.fromkeys(more)
    return list(kept)


def _in_document_order(numbers: Sequence[int], hits: Sequence[Hit]) -> list[int]:
    first: dict[tuple[str, str], int] = {}
    for number in sorted(numbers):
        first.setdefault((hits[number].tenant, hits[number].doc_id), number)
    return sorted(numbers, key=lambda n: (first[hits[n].tenant, hits[n].doc_id], hits[n].ordinal))


def _advice(prefix: Prefix, segments: int) -> str:
    if prefix.summaries and segments > 1:
        return "shorten the question or the answer, or ingest the document in shorter chains of segments"
    if prefix.placement == "sequence" and segments > 1:
        return "retrieve fewer segments, place them in parallel, or shorten the question or the answer"
    return "shorten the question or lower max_new_tokens"
