"""A question to the context that it is answered from: segments found, read and placed before it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from lloco_engine.compress.chained import reads_chain
from lloco_engine.config import GenerateConfig, PrefixConfig, RetrieveConfig
from lloco_engine.errors import ConfigError, SegmentUnavailable
from lloco_engine.prefix import Room, assemble
from lloco_engine.relevance import doubt, floor_of
from lloco_engine.request import AskRequest
from lloco_engine.retrieve import Retriever, with_history
from lloco_engine.store import Store
from lloco_engine.types import AnySegment, Hit, Prefix, SegmentReference

if TYPE_CHECKING:
    from lloco_engine.decoder.answering import AnsweringDecoder
    from lloco_engine.decoder.prompt import Prompt
    from lloco_engine.store_setup import Setup

__all__ = ["Context", "ContextBuilder", "Found", "Prepared"]

_NO_HIT = "no segment matched the question"


@dataclass(frozen=True)
class Found:
    """The hits for a question, how long finding them took, and what is to be said about them.

    ``nothing`` says why no document seems to answer the question, if none does.
    """

    hits: tuple[Hit, ...]
    seconds: float
    warnings: tuple[str, ...] = ()
    nothing: str | None = None


@dataclass(frozen=True)
class Context:
    """What a question is answered from: hits, their segments placed, how long that took, what went wrong on the way."""

    hits: tuple[Hit, ...]
    prefix: Prefix | None
    load_s: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Prepared:
    """A question ready for the decoder: what `Engine.ask` gives to it, and what was done until then.

    ``seconds`` are those from the question on.
    """

    prompt: Prompt
    generate: GenerateConfig
    adapter: str | None
    memory: Context
    retrieve_s: float
    seconds: float


@dataclass(frozen=True)
class _Read:
    """A hit with its segment and, in document order, those that this one is read after; ``wanted`` for itself."""

    hit: Hit
    segment: AnySegment
    after: tuple[_Read, ...] = ()
    wanted: bool = True


class ContextBuilder:
    """Finds, reads and places segments for an engine.

    Args:
        store: holds them.
        setup: what the store was made with.
    """

    def __init__(self, store: Store, setup: Setup) -> None:
        self._store, self._setup = store, setup
        self._retriever = Retriever(store, setup.embedder)

    def search(self, request: AskRequest) -> list[Hit]:
        """What a search for a request's question finds, in its conversation.

        Raises:
            StoreMismatch: the embedder's vectors are not of the store's length.
        """
        config = request.retrieve

        def search(text: str) -> list[Hit]:
            return self._retriever.retrieve(text, config, request.filters, request.tenant)

        return with_history(search, request.question, request.history, config.top_k, config.neighbours)

    def find(self, request: AskRequest) -> Found:
        """The hits for a question, each segment once: those that were given, a document's, or what a search finds.

        Raises:
            NotInStore: there is no such document to read whole.
            ConfigError: the hits are another tenant's.
            SegmentUnavailable: hits were given, and none of them is in the store any more.
        """
        began = time.perf_counter()
        warnings: list[str] = []
        nothing = None
        if request.whole_document is not None:
            ids = request.whole_document
            hits = self._whole(request, [ids] if isinstance(ids, str) else ids)
        else:
            given = request.hits is not None
            hits = self.search(request) if request.hits is None else self._given(request, request.hits, warnings)
            nothing = doubt(hits, self._floor(request.retrieve)) if hits or given else _NO_HIT
        once: dict[str, Hit] = {}
        for hit in hits:
            first = once.setdefault(hit.segment_id, hit)
            if first.doc_id != hit.doc_id:
                once[hit.segment_id] = replace(first, also_in=tuple(dict.fromkeys((*first.also_in, hit.doc_id))))
        return Found(tuple(once.values()), time.perf_counter() - began, tuple(warnings), nothing)

    def _floor(self, config: RetrieveConfig) -> float:
        return floor_of(config, self._store.manifest.embedder_fingerprint)

    def _given(self, request: AskRequest, hits: Sequence[Hit], warnings: list[str]) -> list[Hit]:
        tenant, least = request.tenant, request.retrieve.min_score
        if strangers := [hit for hit in hits if hit.tenant != tenant]:
            raise ConfigError(
                f"hits must be of the tenant that asks, {tenant!r}, and one is of {strangers[0].tenant!r}"
            )
        if low := [hit for hit in hits if hit.windows and hit.score < least]:  # a neighbour has no score of its own
            warnings.append(f"{len(low)} of {len(hits)} segments scored below min_score ({least}) and were not read")
        return self._still_there([hit for hit in hits if hit not in low], warnings)

    def _still_there(self, hits: Sequence[Hit], warnings: list[str]) -> list[Hit]:
        """The hits as the store has them now, with a warning about those that it has no more."""
        now = self._store.current(hits)
        if gone := [hit.doc_id for hit, found in zip(hits, now, strict=True) if found is None]:
            names = ", ".join(map(repr, dict.fromkeys(gone)))
            warning = f"{len(gone)} of {len(hits)} segments are not in the store any more and were not read: {names} "
            warning += "was replaced or deleted since; retrieve again"
            if len(gone) == len(hits):
                raise SegmentUnavailable(warning)
            warnings.append(warning)
        return [hit for hit in now if hit is not None]

    def place(self, found: Found, decoder: AnsweringDecoder, config: PrefixConfig, room: int) -> Context:
        """Read the segments of what was found, or refer to them where the decoder reads them itself, and place them.

        Args:
            found: from `find`.
            decoder: will read them.
            config: placement and budget.
            room: positions of the window to leave to the question and its answer.

        Raises:
            SegmentUnavailable: no segment that was found can be used.
        """
        began = time.perf_counter()
        read, warnings = self._load(found.hits, by_id=decoder.reads_by_id and not self._setup.kind.embeds)
        warnings = [*found.warnings, *warnings]
        if found.nothing:
            warnings.append(found.nothing if read else f"{found.nothing}: the answer is the decoder's own")
        if not read:
            return Context((), None, time.perf_counter() - began, tuple(warnings))
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
            room=Room.of(decoder, room),
            hits=[own.hit for own in read],
            needs=[[places[earlier.hit.segment_id] for earlier in own.after] for own in wanted],
            scores=_scores([own.hit for own in read]),
        )
        if assembly.dropped:
            budget = f"max_slots is {config.max_slots}" if config.max_slots else "the decoder's window is full"
            warnings.append(f"{budget}: the {len(assembly.dropped)} worst of {len(wanted)} segments were left out")
        used = tuple(read[number].hit for number in sorted(assembly.kept))
        return Context(used, assembly.prefix, time.perf_counter() - began, tuple(warnings))

    def _whole(self, request: AskRequest, doc_ids: Sequence[str]) -> list[Hit]:
        """Every segment of documents, in order, with what search thinks of it: 0 where it has no window to find."""
        hits = [hit for doc_id in dict.fromkeys(doc_ids) for hit in self._store.chunks(doc_id, request.tenant)]
        if len(hits) < 2:
            return hits
        config = replace(request.retrieve, top_k=len(hits), neighbours=0, min_score=-1.0)
        of_these = {"doc_id": tuple(doc_ids)}
        # what the question itself finds, whatever was said before
        found = self.search(replace(request, retrieve=config, whole_document=None, filters=of_these, history=()))
        of = {hit.segment_id: hit for hit in found}
        return [
            replace(hit, score=of[hit.segment_id].score, windows=of[hit.segment_id].windows)
            if hit.segment_id in of
            else replace(hit, score=0.0)
            for hit in hits
        ]

    def _load(self, hits: Sequence[Hit], *, by_id: bool = False) -> tuple[list[_Read], list[str]]:
        """The hits whose segments can be used, with these, and warnings about the others.

        Whether a document is still there is asked after its segments were read: so all that is read was in the store
        at one moment, and what a writer took away meanwhile is named.
        """
        read = {} if by_id else {hit.segment_id: self.read(hit) for hit in hits}
        warnings: list[str] = []
        hits = self._still_there(hits, warnings)
        good: list[_Read] = []
        for hit in hits:
            own = read.get(hit.segment_id) or self.read(hit, by_id=by_id)  # a better one may have taken its place
            if isinstance(own, SegmentUnavailable):
                warnings.append(f"segment {hit.ordinal} of {hit.doc_id!r} was left out: {own}")
            else:
                good.append(replace(own, hit=hit))
        if hits and not good:
            raise SegmentUnavailable(f"none of the {len(hits)} segments found can be used; {warnings[0]}")
        return good, warnings

    def read(self, hit: Hit, *, by_id: bool = False) -> _Read | SegmentUnavailable:
        """A hit's segment with all that it is read after, or references to them; or what is wrong with one of them."""
        if by_id:
            before = tuple(_Read(one, self._reference(one), wanted=False) for one in self.earlier(hit))
            return _Read(hit, self._reference(hit), before)
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
        return reads_chain(self._setup.compressor, self._setup.facts)

    def _reference(self, hit: Hit) -> SegmentReference:
        return SegmentReference(hit.segment_id, self._setup.kind.name, hit.slots, hit.source_tokens)

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
