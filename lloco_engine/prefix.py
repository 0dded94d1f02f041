"""Segments -> Prefix: which are placed, in which order, at which positions. Pure: no model and no store is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lloco_engine import kinds
from lloco_engine.config import PrefixConfig
from lloco_engine.errors import ConfigError, PromptTooLong
from lloco_engine.kinds import MemoryKind, Room
from lloco_engine.types import AnySegment, Hit, Prefix

__all__ = ["Assembly", "Room", "assemble", "place"]


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
    room: Room,
    hits: Sequence[Hit] | None = None,
    needs: Sequence[Sequence[int]] | None = None,
    scores: Sequence[float] | None = None,
) -> Assembly:
    """Place segments for one prompt, as their kind does.

    Where the order matters, segments of a document follow their order in it, documents that of their best segment.

    Args:
        segments: best first; those at the end are dropped when ``max_slots`` is short. None is ever split. Those whose
            slots each take a position are dropped too where the window is full.
        config: placement and budget.
        room: the prompt's positions.
        hits: where the segments come from, one each, in the same order; without, the given order is kept.
        needs: for each segment that is wanted, the places of those it is read after; the segments beyond
            ``len(needs)`` are not wanted by themselves. None: all are wanted and none needs another.
        scores: what search thinks of each segment.

    Raises:
        ConfigError: ``max_slots`` is too small for the best segment with what it needs; segments differ in kind; or the
            decoder cannot read them as they are to be placed.
        PromptTooLong: the positions run over the window; gives the numbers.
    """
    config = PrefixConfig() if config is None else config
    needs = [()] * len(segments) if needs is None else needs
    kind = _kind_of(segments)
    placed = _within_budget(segments, needs, config.max_slots, kind.free(room))
    if kind.is_ordered(config) and hits is not None:
        placed = _in_document_order(placed, hits)
    told = None if scores is None else [scores[number] for number in placed]
    prefix = kind.place([segments[number] for number in placed], config, room, told)
    before = room.template if prefix.embeddings is None else 0  # else the template prefix is a part of the text
    total = prefix.start - before + room.template + room.text
    if total > room.window:
        raise PromptTooLong(
            f"positions of the prompt and the answer must fit the decoder's window of {room.window}: the template "
            f"takes {room.template}, {len(placed)} segments in {prefix.placement} {prefix.start - before}, question "
            f"and answer {room.text}, {total} in all; {kind.advice(config, len(placed))}"
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
    """All of some segments for one prompt, whatever the window holds; arguments as `assemble` has."""
    room = Room(template_tokens, 0, 0)
    return _kind_of(segments).place(segments, PrefixConfig() if config is None else config, room, scores)


def _kind_of(segments: Sequence[AnySegment]) -> MemoryKind:
    found = dict.fromkeys(kinds.of(segment) for segment in segments)
    if len(found) > 1:
        raise ConfigError(
            f"segments of one prompt must be of one kind, not {' and '.join(kind.called for kind in found)}"
        )
    return next(iter(found), kinds.get("compact_kv"))


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
