"""Refinement of the segments that a store holds, document by document, for as long as there is time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lloco_engine import kinds
from lloco_engine.config import RefineConfig
from lloco_engine.errors import ConfigError, DocumentError, LLoCOError, SegmentUnavailable
from lloco_engine.jobs import Job, Made, Maker, Refine, ahead
from lloco_engine.store import DocumentInfo, SegmentStats, Store
from lloco_engine.store.segments import content_id
from lloco_engine.types import Divergence, Failure

if TYPE_CHECKING:
    from lloco_engine.chunking import Chunker

__all__ = ["RefineProgress", "RefineReport", "Refining"]


@dataclass(frozen=True)
class RefineProgress:
    """Where refinement stands; given to a callback after each segment.

    ``document`` is its id; ``divergence`` that of the segment that was done; ``done`` counts segments of this run, of
    ``total`` in the documents asked for; ``seconds_left`` is for what is left, by the pace so far, within the budget.
    """

    document: str
    divergence: Divergence
    done: int
    total: int
    seconds_left: float


@dataclass(frozen=True)
class RefineReport:
    """What a run did, in segments.

    ``refined`` are better now; ``kept`` were tried, and stay as they were; ``earlier`` had been done by another run, or
    are too short to be; ``left`` were not reached. ``before`` and ``after`` are mean divergences of those that were
    tried (`Divergence`), 0 where none was. ``failed`` has documents that were passed over, and why.
    """

    refined: int = 0
    kept: int = 0
    earlier: int = 0
    left: int = 0
    before: float = 0.0
    after: float = 0.0
    failed: tuple[Failure, ...] = ()
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return asdict(self)


@dataclass
class _Tally:
    """What a report is made of, while it grows."""

    earlier: int = 0
    tried: list[Divergence] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)

    def report(self, total: int, seconds: float) -> RefineReport:
        tried, many = self.tried, max(1, len(self.tried))
        better = sum(one.after < one.before for one in tried)
        return RefineReport(
            refined=better,
            kept=len(tried) - better,
            earlier=self.earlier,
            left=total - len(tried) - self.earlier,
            before=sum(one.before for one in tried) / many,
            after=sum(one.after for one in tried) / many,
            failed=tuple(self.failed),
            seconds=seconds,
        )


@dataclass
class _Plan:
    """What there is to be made of a document, and why there is no more."""

    info: DocumentInfo
    jobs: list[Refine] = field(default_factory=list)
    fault: LLoCOError | None = None


class Refining:
    """One run over some documents. Memory holds one document and one segment; where segments are made elsewhere, as
    many documents as it takes to keep those busy who make them.

    Segments that are done are made beside the former ones, and take their place in one transaction a document, or what
    there was time for of it: whenever the process dies, each is as it was before or as it is after. What was made and
    not committed is found by the next run.

    Args:
        store: of compact KV.
        chunker: of the store's decoder and chunk sizes.
        maker: makes segments.
        config: how.
        progress: called as `RefineProgress` says; what it raises stops the run.

    Raises:
        ConfigError: the store's memory is of another kind, or no step is asked for.
    """

    def __init__(
        self,
        store: Store,
        chunker: Chunker,
        maker: Maker,
        config: RefineConfig,
        progress: Callable[[RefineProgress], None] | None = None,
    ) -> None:
        if store.manifest.memory != "compact_kv":
            held = kinds.get(store.manifest.memory).called
            raise ConfigError(f"only segments of compact KV are refined, and {store.path} holds {held}")
        if not config.steps:
            raise ConfigError("steps must be at least 1 to refine, not 0")
        self._store, self._chunker, self._maker = store, chunker, maker
        self._config, self._progress = config, progress
        self._tally = _Tally()
        self._total = 0
        self._began = time.monotonic()
        self._replaced: set[str] = set()
        self._budget: float | None = None

    def run(self, doc_ids: Sequence[str] | None = None, tenant: str = "", budget: float | None = None) -> RefineReport:
        """Refine what has not been, in document order, until the time is up.

        Args:
            doc_ids: which documents, in this order; None: all of the tenant's.
            tenant: whose.
            budget: seconds; a segment that would probably take longer is not begun. None: no limit.

        Raises:
            NotInStore: the tenant has no document of an id.
            StoreFull, StoreLocked: documents that were finished stay.
        """
        self._budget = budget
        if doc_ids is None:
            infos = self._store.documents(tenant)
        else:
            infos = [self._store.document(doc_id, tenant) for doc_id in dict.fromkeys(doc_ids)]
        self._total = sum(info.segments for info in infos)
        for plan in ahead(self._plans(infos), self._maker, self._begin):
            try:
                self._document(plan)
            except (DocumentError, SegmentUnavailable, _CutOtherwise) as error:
                self._tally.failed.append(Failure(plan.info.source or plan.info.doc_id, str(error), plan.info.doc_id))
        if self._tally.tried:
            self._store.publish()
        return self._tally.report(self._total, time.monotonic() - self._began)

    def _plans(self, infos: Sequence[DocumentInfo]) -> Iterator[_Plan]:
        """What there is to be made, document by document, for as long as there is time."""
        for info in infos:
            if not self._has_time():
                break
            plan = _Plan(info)
            try:
                plan.jobs.extend(self._pending(info))
            except (SegmentUnavailable, _CutOtherwise) as error:
                plan.fault = error
            yield plan

    def _begin(self, plan: _Plan) -> Sequence[Job]:
        for job in plan.jobs:
            self._maker.begin(job)
        return plan.jobs

    def _document(self, plan: _Plan) -> None:
        """One document's segments, and the commit of those that were done."""
        made: dict[str, SegmentStats] = {}
        try:
            for job in plan.jobs:
                if job.former in self._replaced:  # of another document too, which came before
                    self._tally.earlier += 1
                    continue
                ready = self._maker.taken(job.segment_id)
                if ready is None and not self._has_time():
                    return
                if (stats := self._segment(plan.info, job, ready)) is not None:
                    made[job.former] = stats
        finally:  # what is done is done, also where an interrupt ends the run
            if made:
                with self._store.writer(publish=False) as writer:
                    writer.replace_segments(made)
                self._replaced |= made.keys()
        if plan.fault is not None:
            raise plan.fault

    def _pending(self, info: DocumentInfo) -> Iterator[Refine]:
        """What is to be made in the place of the segments that were never refined, each once."""
        hits = self._store.chunks(info.doc_id, info.tenant)
        once = dict.fromkeys(hit.segment_id for hit in hits if not self._is_done(hit.segment_id))
        self._tally.earlier += sum(hit.segment_id not in once for hit in hits)
        if not once:
            return
        (document,) = self._store.load_documents([info.doc_id], info.tenant)
        for chunk, hit in zip(self._chunker.split(document), hits, strict=False):
            if self._store.segment_id(info.tenant, chunk.token_ids) != hit.segment_id:
                if hit.segment_id in once:
                    raise _CutOtherwise(
                        f"{info.doc_id!r} was cut into chunks otherwise than this version does: ingest it anew"
                    )
            elif hit.segment_id in once:
                del once[hit.segment_id]
                new = content_id({"refined": hit.segment_id} | self._config.to_json(), ())
                yield Refine(new, chunk.token_ids, hit.segment_id, self._config)

    def _is_done(self, segment_id: str) -> bool:
        told = self._store.divergence(segment_id)
        return told is not None and told.steps > 0

    def _segment(self, info: DocumentInfo, job: Refine, ready: Made | None) -> SegmentStats | None:
        """Refine one segment, saved beside the former one; None where it is too short."""
        stats = self._store.segment_stats(job.segment_id)  # of a run that was cut off, too
        if stats is None:
            stats = (ready or self._maker.make(job)).stats
            if stats is None:
                self._tally.earlier += 1
                return None
        self._done(info, self._store.divergence(job.segment_id))
        return stats

    def _done(self, info: DocumentInfo, divergence: Divergence | None) -> None:
        assert divergence is not None
        self._tally.tried.append(divergence)
        if self._progress is None:
            return
        done, left = len(self._tally.tried), self._total - len(self._tally.tried) - self._tally.earlier
        seconds = left * self._maker.busy_s / done
        if self._budget is not None:
            seconds = max(0.0, min(seconds, self._budget - (time.monotonic() - self._began)))
        self._progress(RefineProgress(info.doc_id, divergence, done, self._total, seconds))

    def _has_time(self) -> bool:
        """Whether another segment will probably be done within the budget."""
        if self._budget is None:
            return True
        done = len(self._tally.tried)
        return time.monotonic() - self._began + (self._maker.busy_s / done if done else 0.0) < self._budget


class _CutOtherwise(LLoCOError):
    """A document's chunks are not those that its segments were made of."""
