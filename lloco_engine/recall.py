"""A question to the memory that it is answered from: segments found, read and placed before it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypedDict

from lloco_engine.config import GenerateConfig, PrefixConfig
from lloco_engine.errors import ConfigError, SegmentUnavailable
from lloco_engine.prefix import assemble
from lloco_engine.store import Filters, Store
from lloco_engine.types import AnySegment, Hit, Prefix, Turn

if TYPE_CHECKING:
    from lloco_engine.decoder.local import LocalDecoder
    from lloco_engine.opening import Setup

__all__ = ["AskOptions", "Asked", "Recall", "Recalled"]


class AskOptions(TypedDict, total=False):
    """What every way of asking takes besides the question.

    hits: segments to read, best first, from `Engine.retrieve`; None (the default) searches for them.
    top_k: segments to search for, 4 by default.
    filters: as in `Store.search`: metadata key, doc_id, source or title, to a value or a collection of them.
    neighbours: segments to add before and after each, 0 by default.
    whole_document: id of a document to read all of, instead of a search.
    tenant: whose documents, "" by default.
    adapter: "auto" (the default, and None) takes that of the hits' group, as `lloco_engine.adapters.choosing` says;
        "none" answers with the base weights; else a group, or the name of a loaded adapter.
    generate: how tokens are chosen.
    prefix: placement and budget of the segments; None takes the engine's own.
    context: raw text to read after the segments, "" by default.
    history: earlier turns of the conversation, oldest first; the segments stand before them.
    verbatim: the question brings its own instructions, so the engine writes none before it; False by default.
    """

    hits: Sequence[Hit] | None
    top_k: int
    filters: Filters | None
    neighbours: int
    whole_document: str | None
    tenant: str
    adapter: str | None
    generate: GenerateConfig | None
    prefix: PrefixConfig | None
    context: str
    history: Sequence[Turn]
    verbatim: bool


@dataclass(frozen=True)
class Asked:
    """`AskOptions` with their defaults."""

    hits: Sequence[Hit] | None = None
    top_k: int = 4
    filters: Filters | None = None
    neighbours: int = 0
    whole_document: str | None = None
    tenant: str = ""
    adapter: str | None = "auto"
    generate: GenerateConfig | None = None
    prefix: PrefixConfig | None = None
    context: str = ""
    history: Sequence[Turn] = ()
    verbatim: bool = False


@dataclass(frozen=True)
class Recalled:
    """What a question found: hits, their segments placed, how long that took, and what went wrong on the way."""

    hits: tuple[Hit, ...]
    prefix: Prefix | None
    retrieve_s: float
    load_s: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Read:
    """A hit with its segment and, in document order, those that this one is read after; ``wanted`` for itself."""

    hit: Hit
    segment: AnySegment
    after: tuple[_Read, ...] = ()
    wanted: bool = True


class Recall:
    """Finds, reads and places segments for an engine.

    Args:
        store: holds them.
        setup: what the store was made with.
    """

    def __init__(self, store: Store, setup: Setup) -> None:
        self._store, self._setup = store, setup

    def recall(
        self,
        question: str,
        asked: Asked,
        search: Callable[..., list[Hit]],
        decoder: LocalDecoder,
        config: PrefixConfig,
        room: int,
    ) -> Recalled:
        """Find, read and place the segments for a question.

        Args:
            question, asked: what is asked, and how.
            search: `Engine.retrieve`, for when no hits are given.
            decoder: will read them.
            config: placement and budget.
            room: positions of the window to leave to the question and its answer.

        Raises:
            SegmentUnavailable: every segment that was found is damaged.
            NotInStore: there is no such document to read whole.
            ConfigError: the hits are another tenant's.
        """
        began = time.perf_counter()
        found = self._find(question, asked, search)
        retrieved = time.perf_counter()
        read, warnings = self._load(found)
        if not read:
            if asked.hits is None:  # otherwise none were given
                warnings.append("no segment matched the question: the answer is the decoder's own")
            return Recalled((), None, retrieved - began, time.perf_counter() - retrieved, tuple(warnings))
        # Those that were found come first, best first; what they are read after follows.
        places = {own.hit.segment_id: number for number, own in enumerate(read)}
        for earlier in [earlier for own in read for earlier in own.after]:
            if earlier.hit.segment_id not in places:
                places[earlier.hit.segment_id] = len(read)
                read.append(earlier)
        wanted = [own for own in read if own.wanted]
        assembly = assemble(
            [own.segment for own in read],
            config,
            template_tokens=decoder.template_tokens,
            room=room,
            window=decoder.shape.window,
            hits=[own.hit for own in read],
            needs=[[places[earlier.hit.segment_id] for earlier in own.after] for own in wanted],
            scores=_scores([own.hit for own in read]),
            rotary=decoder.shape.rotary,
        )
        if assembly.dropped:
            budget = f"max_slots is {config.max_slots}" if config.max_slots else "the decoder's window is full"
            warnings.append(f"{budget}: the {len(assembly.dropped)} worst of {len(wanted)} segments were left out")
        used = tuple(read[number].hit for number in sorted(assembly.kept))
        return Recalled(used, assembly.prefix, retrieved - began, time.perf_counter() - retrieved, tuple(warnings))

    def _find(self, question: str, asked: Asked, search: Callable[..., list[Hit]]) -> list[Hit]:
        """Hits for a question, each segment once."""
        if asked.hits is not None:
            hits = list(asked.hits)
            if strangers := [hit for hit in hits if hit.tenant != asked.tenant]:
                raise ConfigError(
                    f"hits must be of the tenant that asks, {asked.tenant!r}, and one is of {strangers[0].tenant!r}"
                )
        elif asked.whole_document is not None:
            hits = self._whole(question, asked.whole_document, asked.tenant, search)
        else:
            hits = search(
                question,
                top_k=asked.top_k,
                filters=asked.filters,
                neighbours=asked.neighbours,
                tenant=asked.tenant,
            )
        once: dict[str, Hit] = {}
        for hit in hits:
            once.setdefault(hit.segment_id, hit)
        return list(once.values())

    def _whole(self, question: str, doc_id: str, tenant: str, search: Callable[..., list[Hit]]) -> list[Hit]:
        """Every segment of a document, in order, with what search thinks of it: 0 where it has no window to find."""
        hits = self._store.chunks(doc_id, tenant)
        if len(hits) == 1:
            return hits
        found = search(question, top_k=len(hits), filters={"doc_id": doc_id}, tenant=tenant)
        of = {hit.segment_id: hit for hit in found}
        return [
            replace(hit, score=of[hit.segment_id].score, windows=of[hit.segment_id].windows)
            if hit.segment_id in of
            else replace(hit, score=0.0)
            for hit in hits
        ]

    def _load(self, hits: Sequence[Hit]) -> tuple[list[_Read], list[str]]:
        """The hits whose segments can be used, with these, and a warning for each of the others."""
        good: list[_Read] = []
        warnings: list[str] = []
        for hit in hits:
            read = self.read(hit)
            if isinstance(read, SegmentUnavailable):
                warnings.append(f"segment {hit.ordinal} of {hit.doc_id!r} was left out: {read}")
            else:
                good.append(read)
        if hits and not good:
            raise SegmentUnavailable(f"none of the {len(hits)} segments found can be used; {warnings[0]}")
        return good, warnings

    def read(self, hit: Hit) -> _Read | SegmentUnavailable:
        """A hit's segment with all that it is read after; or what is wrong with one of them."""
        after: list[_Read] = []
        for earlier in self.earlier(hit):
            segment = self._try_segment(earlier)
            if isinstance(segment, SegmentUnavailable):
                return SegmentUnavailable(f"it is read after segment {earlier.ordinal}, which is not there: {segment}")
            after.append(_Read(earlier, segment, wanted=False))
        segment = self._try_segment(hit)
        return segment if isinstance(segment, SegmentUnavailable) else _Read(hit, segment, tuple(after))

    def earlier(self, hit: Hit) -> list[Hit]:
        """The hits whose segments a hit's segment is read after, first to last."""
        return self._store.earlier(hit) if self._reads_chain else []

    @cached_property
    def _reads_chain(self) -> bool:
        facts: Any = self._setup.facts  # has what is read of a decoder
        return self._setup.compressor.reads_chain(facts)

    def _try_segment(self, hit: Hit) -> AnySegment | SegmentUnavailable:
        """A hit's segment, or what is wrong with it."""
        try:
            return self._store.load_segment(hit.segment_id)
        except SegmentUnavailable as error:
            return error


def _scores(hits: Sequence[Hit]) -> list[float]:
    """What search thinks of segments that are read together; those it did not find count as the worst that it did."""
    worst = min((hit.score for hit in hits if hit.score), default=0.0)
    return [hit.score or worst for hit in hits]
