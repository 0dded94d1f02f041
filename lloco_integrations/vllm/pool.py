"""Which pages of the pool hold which segment, and which requests read it: the books, kept by vLLM's scheduler alone.

A page is room for `PAGE` slots of one KV head in one layer. Segments are ragged, so that pages of all heads of a layer,
or all layers of a head, would mostly be empty; pages of one head are filled to more than four fifths. All requests that
read a segment share its pages. Under tensor parallelism each rank has a pool of its own for the heads that it computes.

Nothing here holds a number of a segment: workers do (`lloco_integrations.vllm.shelf`), and do as the books say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

__all__ = ["PAGE", "Placed", "Pool", "heads_of", "pages_needed"]

PAGE = 16  # slots


@dataclass(frozen=True)
class Placed:
    """A segment that workers are to load.

    Args:
        number: of this placing; a segment that is placed again gets another.
        segment: its id.
        pages: of each rank, the pages that it takes there, in order of layer and head.
    """

    number: int
    segment: str
    pages: tuple[tuple[int, ...], ...]


@dataclass(eq=False)
class _Entry:
    placed: Placed
    readers: set[str] = field(default_factory=set)
    loaded: set[int] = field(default_factory=set)  # ranks


class Pool:
    """The books of the pages of all ranks.

    Args:
        pages: of each rank.
        ranks: workers that read alike, each its own heads.
    """

    def __init__(self, pages: int, ranks: int = 1) -> None:
        if pages < 1 or ranks < 1:
            raise ValueError(f"a pool must have at least one page and one rank, not {pages} and {ranks}")
        self._pages = pages
        self._free = [list(range(pages - 1, -1, -1)) for _ in range(ranks)]  # the last is taken first
        self._entries: dict[str, _Entry] = {}
        self._idle: dict[str, None] = {}  # segments that nobody reads, the longest unread first
        self._held: dict[str, tuple[str, ...]] = {}  # segments of each reader
        self._line: dict[str, None] = {}  # readers that wait for pages, in order of asking
        self._numbers = count()
        self._placed: list[Placed] = []
        self._dropped: list[int] = []

    def too_large(self, needs: Mapping[str, Sequence[int]]) -> bool:
        """Whether segments would not fit even an empty pool; ``needs`` as `acquire` takes them."""
        return any(sum(rank) > self._pages for rank in zip(*needs.values(), strict=True))

    def acquire(self, reader: str, needs: Mapping[str, Sequence[int]]) -> bool:
        """Have a request read segments, all or none of them: those that are not there yet are given pages.

        Nobody holds a part of what he needs while he waits for the rest, so two can never wait for each other; and who
        waits for pages is served before all that ask for some later.

        Args:
            reader: id of the request.
            needs: of each of its segments, the pages that it takes on each rank.

        Returns:
            whether the request has its segments now (`ready` says when they are loaded too). If not, ask again later.
        """
        if reader in self._held:
            return True
        absent = [segment for segment in needs if segment not in self._entries]
        first = next(iter(self._line), reader)
        if absent and (first != reader or not self._make_room(needs, absent)):
            self._line[reader] = None
            return False
        self._line.pop(reader, None)
        for segment in absent:
            pages = tuple(
                tuple(free.pop() for _ in range(need)) for free, need in zip(self._free, needs[segment], strict=True)
            )
            placed = Placed(next(self._numbers), segment, pages)
            self._entries[segment] = _Entry(placed)
            self._placed.append(placed)
        for segment in needs:
            self._entries[segment].readers.add(reader)
            self._idle.pop(segment, None)
        self._held[reader] = tuple(needs)
        return True

    def release(self, reader: str) -> None:
        """A request is over, or gives up. Its segments stay until others need their pages."""
        self._line.pop(reader, None)
        for segment in self._held.pop(reader, ()):
            entry = self._entries.get(segment)
            if entry is None:
                continue
            entry.readers.discard(reader)
            if not entry.readers:
                self._idle[segment] = None

    def ready(self, reader: str) -> bool:
        """Whether every segment of a request is loaded by every rank."""
        ranks = len(self._free)
        held = self._held.get(reader)
        return held is not None and all(
            segment in self._entries and len(self._entries[segment].loaded) == ranks for segment in held
        )

    def loaded(self, number: int, rank: int) -> None:
        """A rank has loaded what was placed."""
        for entry in self._entries.values():
            if entry.placed.number == number:
                entry.loaded.add(rank)

    def lost(self, number: int) -> set[str]:
        """A rank cannot load what was placed: its pages are free again. Returns the requests that wanted to read it."""
        for segment, entry in self._entries.items():
            if entry.placed.number == number:
                self._drop(segment)
                return entry.readers
        return set()

    def numbers(self, reader: str) -> tuple[int, ...]:
        """Numbers of the placings that a request reads, in its order."""
        return tuple(self._entries[segment].placed.number for segment in self._held[reader])

    def changes(self) -> tuple[list[int], list[Placed]]:
        """What workers are to do since this was last asked: numbers to forget, and then segments to load."""
        dropped, placed = self._dropped, self._placed
        self._dropped, self._placed = [], []
        gone = set(dropped)
        return dropped, [one for one in placed if one.number not in gone]

    def _make_room(self, needs: Mapping[str, Sequence[int]], absent: Sequence[str]) -> bool:
        """Drop segments that nobody reads until those that are absent have room; drop none where that cannot be."""
        short = [sum(needs[segment][rank] for segment in absent) - len(free) for rank, free in enumerate(self._free)]
        dropped = []
        for segment in self._idle:
            if max(short) <= 0:
                break
            if segment not in needs:
                dropped.append(segment)
                pages = self._entries[segment].placed.pages
                short = [less - len(own) for less, own in zip(short, pages, strict=True)]
        if max(short) > 0:
            return False
        for segment in dropped:
            self._drop(segment)
        return True

    def _drop(self, segment: str) -> None:
        placed = self._entries.pop(segment).placed
        self._idle.pop(segment, None)
        for free, pages in zip(self._free, placed.pages, strict=True):
            free.extend(reversed(pages))
        self._dropped.append(placed.number)


def heads_of(rank: int, ranks: int, heads: int) -> range:
    """The KV heads that a rank computes, as vLLM shares them out: where ranks are more, some have the same.

    Raises:
        ValueError: neither number is a multiple of the other.
    """
    if heads % ranks and ranks % heads:
        raise ValueError(f"KV heads ({heads}) and ranks ({ranks}) must be multiples of each other")
    if ranks > heads:
        first = rank // (ranks // heads)
        return range(first, first + 1)
    each = heads // ranks
    return range(rank * each, (rank + 1) * each)


def pages_needed(lengths: Sequence[Sequence[int]], ranks: int) -> tuple[int, ...]:
    """Pages that a segment takes on each rank.

    Args:
        lengths: of each layer and KV head, the slots that it keeps.
        ranks: of tensor parallelism.
    """
    own = [heads_of(rank, ranks, len(lengths[0])) for rank in range(ranks)]
    return tuple(sum(-(-layer[head] // PAGE) for layer in lengths for head in mine) for mine in own)
