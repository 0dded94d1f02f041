"""Segments to be made, and who makes them: this process, or the workers of a cluster (`lloco_engine.cluster`).

A job says all that a segment is made of, so it can be sent to another process, and made anew where that died: its id
stands for its content. A `Maker` has jobs done, and every segment that is made saved at once, by the one writer.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

from lloco_engine.compress.chained import compress_after
from lloco_engine.config import RefineConfig
from lloco_engine.kinds import Format
from lloco_engine.store import SegmentStats, Store
from lloco_engine.store.segments import SegmentFile, pack
from lloco_engine.types import AnySegment, Segment

if TYPE_CHECKING:
    from lloco_engine.compress.base import Compressor
    from lloco_engine.decoder.local import LocalDecoder

__all__ = ["Bench", "Compress", "Here", "Job", "Made", "Maker", "Packed", "Refine", "ahead"]

_AHEAD = 256  # documents that are held while the segments of the first of them are made

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Job(ABC):
    """A segment to be made of a chunk; ``token_ids`` are the chunk's."""

    segment_id: str
    token_ids: tuple[int, ...]

    @property
    @abstractmethod
    def needs(self) -> tuple[str, ...]:
        """The segments of the store that it is made of."""

    @abstractmethod
    def make(self, bench: Bench, needed: Sequence[AnySegment]) -> AnySegment | None:
        """The segment, of those that it needs; None where the chunk allows of none."""


@dataclass(frozen=True)
class Compress(Job):
    """A segment of the chunk and of those ``before`` it that it builds on, in document order."""

    before: tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """See `Job.needs`."""
        return self.before

    def make(self, bench: Bench, needed: Sequence[AnySegment]) -> AnySegment:
        """See `Job.make`; raises as `compress_after`."""
        (segment,) = compress_after(bench.compressor, bench.decoder, self.token_ids, [bench.ratio], needed)
        return segment


@dataclass(frozen=True)
class Refine(Job):
    """A better segment than the ``former`` one, where the chunk is long enough to tell."""

    former: str
    config: RefineConfig

    @property
    def needs(self) -> tuple[str, ...]:
        """See `Job.needs`."""
        return (self.former,)

    def make(self, bench: Bench, needed: Sequence[AnySegment]) -> Segment | None:
        """See `Job.make`."""
        from lloco_engine.compress.refinement import refine

        (former,) = needed
        assert isinstance(former, Segment)
        made = refine(bench.decoder, self.token_ids, former, self.config, rounded=bench.form.rounded)
        return None if made.divergence is None else made


@dataclass(frozen=True)
class Packed:
    """What became of a job where it was done: the segment's file, if there is to be one, and the seconds it took."""

    file: SegmentFile | None
    seconds: float


@dataclass(frozen=True)
class Bench:
    """What segments are made with.

    Args:
        decoder: reads with its base weights.
        compressor: the store's.
        ratio: source tokens per slot.
        form: of the store's segment files.
    """

    decoder: LocalDecoder
    compressor: Compressor
    ratio: float
    form: Format

    def make(self, job: Job, needed: Sequence[AnySegment]) -> Packed:
        """Do a job, with the segments that it needs; raises as the compressor, and as `pack`."""
        began = time.perf_counter()
        segment = job.make(self, needed)
        seconds = time.perf_counter() - began
        return Packed(None if segment is None else pack(segment, job.segment_id, self.form), seconds)


@dataclass(frozen=True)
class Made:
    """What became of a job, in the store: None where there was no segment to be made; ``seconds`` as in `Packed`."""

    stats: SegmentStats | None
    seconds: float


class Maker(ABC):
    """Has jobs done; a context manager. Each segment is in the store when it is said to be made.

    Args:
        store: where they go. Who makes segments elsewhere never opens it.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.tokens = 0  # of the chunks that are done

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:  # noqa: B027
        """Let go of what makes segments; jobs that are not done are dropped."""

    @property
    @abstractmethod
    def busy_s(self) -> float:
        """Seconds in which something was being made."""

    @property
    def wants_more(self) -> bool:
        """Whether jobs should be begun ahead of the one that is asked for."""
        return False

    def begin(self, job: Job) -> None:  # noqa: B027
        """Say that a segment will be asked for: it may be made meanwhile. What goes wrong is said by `make`."""

    def is_waited_for(self, job: Job) -> bool:
        """Whether a job that was begun is not done yet."""
        return False

    def taken(self, segment_id: str) -> Made | None:
        """What became of a job that was begun, if it is done; once."""
        return None

    @abstractmethod
    def make(self, job: Job) -> Made:
        """Have a segment made now, whether or not that was begun.

        Raises:
            LLoCOError: it cannot be made; as the compressor says, or it is not of the store's kind.
            SegmentUnavailable: one that it needs is missing or damaged.
            StoreFull, StoreLocked: it cannot be saved.
        """

    def _save(self, job: Job, packed: Packed) -> Made:
        stats = None
        if packed.file is not None:
            with self._store.writer(publish=False) as writer:
                stats = writer.save_file(packed.file)
        self.tokens += len(job.token_ids)
        return Made(stats, packed.seconds)


class Here(Maker):
    """Makes each segment in this process, when it is asked for.

    Args:
        store: as above.
        bench: loads what it takes; called only when there is something to do.
        one_at_a_time: a lock under which a segment is made.
    """

    def __init__(self, store: Store, bench: Callable[[], Bench], one_at_a_time: AbstractContextManager[Any]) -> None:
        super().__init__(store)
        self._bench, self._one_at_a_time = bench, one_at_a_time
        self._busy_s = 0.0

    @property
    def busy_s(self) -> float:
        """See `Maker.busy_s`."""
        return self._busy_s

    def make(self, job: Job) -> Made:
        """See `Maker.make`."""
        needed = [self._store.load_segment(one) for one in job.needs]
        bench = self._bench()
        with self._one_at_a_time:
            packed = bench.make(job, needed)
        self._busy_s += packed.seconds
        return self._save(job, packed)


def ahead(items: Iterable[_Item], maker: Maker, begin: Callable[[_Item], Sequence[Job]]) -> Iterator[_Item]:
    """Documents in order, those behind the one at hand begun while the maker wants more to do.

    One whose segments are being made is handed on when they are there, or when the maker has enough to do, and one with
    nothing to be made at once: so a run over documents that are there already holds one at a time.

    Args:
        items: read lazily.
        maker: makes segments.
        begin: begins a document's jobs, and gives them.
    """
    waiting: deque[tuple[_Item, Sequence[Job]]] = deque()
    for item in items:
        waiting.append((item, begin(item) if maker.wants_more else ()))
        while waiting and not (
            len(waiting) < _AHEAD and maker.wants_more and any(map(maker.is_waited_for, waiting[0][1]))
        ):
            yield waiting.popleft()[0]
    for item, _ in waiting:
        yield item
