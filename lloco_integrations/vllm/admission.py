"""What becomes of a request that reads segments: let in when all of them are loaded, kept waiting, or refused.

vLLM's scheduler asks this for every request, again and again while it waits. No request is let in without its whole
memory, and whatever is wrong with one of them is that one's affair: nothing here raises for it.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from lloco_integrations.vllm.params import Memory, Refused, verify
from lloco_integrations.vllm.pool import Pool, pages_needed

__all__ = ["Admission", "Binding", "Reads", "Verdict"]

_KNOWN = 100_000  # segments whose sizes are kept
_LOG = logging.getLogger(__name__)


class Reads(Protocol):
    """What gives segments by id; `lloco_engine.SegmentReader` does."""

    def read(self, segment_id: str) -> Any:
        """A segment; any exception says that it cannot be had."""
        ...


class Verdict(Enum):
    """What a request is told."""

    PLAIN = "it reads no segment"
    WAIT = "its segments are on their way"
    READ = "its segments are loaded"
    REFUSED = "it is not answered"


@dataclass(frozen=True)
class Binding:
    """What workers are told of a request that is let in: numbers of its placings, and how they are read."""

    numbers: tuple[int, ...]
    template: int
    focus: int
    priors: tuple[float, ...]


@dataclass(frozen=True)
class _Size:
    """Of a segment: the pages that it takes on each rank, and the tokens of its source."""

    needs: tuple[int, ...]
    tokens: int


@dataclass(eq=False)
class _Asked:
    """A request's memory and tokens, and why it is refused, where it is."""

    memory: Memory | None
    tokens: int = 0
    refused: str = ""
    sizes: list[_Size] = field(default_factory=list)


class Admission:
    """The requests that read segments, from their arrival to their end.

    Args:
        reads: of segments, in threads.
        pool: the books of pages.
        ranks: of tensor parallelism.
        keys: that requests may be signed with, of `params.read_keys`.
        store: `params.store_fingerprint` of the segments' store.
        window: positions that the decoder can attend over.
    """

    def __init__(self, reads: Reads, pool: Pool, *, ranks: int, keys: Sequence[bytes], store: str, window: int) -> None:
        self._reads, self._pool, self._ranks = reads, pool, ranks
        self._keys, self._store, self._window = keys, store, window
        self._asked: dict[str, _Asked] = {}
        self._sizes: OrderedDict[str, _Size] = OrderedDict()
        self._measured: dict[str, Future[_Size]] = {}
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="lloco-sizes")

    def arrive(self, request: str, params: Mapping[str, Any] | None, *, tokens: int, salt: str | None = None) -> str:
        """A request comes.

        Args:
            request: its id.
            params: its ``kv_transfer_params``.
            tokens: of its prompt, and those that its answer may have.
            salt: what the client asks the prefix cache to keep it apart by.

        Returns:
            what it is to be kept apart by; "" where it reads no segment, so that it stays as it is.
        """
        try:
            memory = verify(params, self._keys, store=self._store)
        except Refused as error:
            return self._refused_on_arrival(request, str(error))
        except Exception as error:  # what a client sends must not end the server, whatever it is
            return self._refused_on_arrival(request, f"its memory cannot be understood ({type(error).__name__})")
        if memory is None:
            return ""
        self._asked[request] = _Asked(memory, tokens)
        return memory.salt(salt)

    def verdict(self, request: str) -> Verdict:
        """What becomes of a request now."""
        asked = self._asked.get(request)
        if asked is None:
            return Verdict.PLAIN
        if asked.refused:
            return Verdict.REFUSED
        if not asked.sizes and not self._measure(request, asked):
            return Verdict.REFUSED if asked.refused else Verdict.WAIT
        assert asked.memory is not None
        needs = {one: size.needs for one, size in zip(asked.memory.segments, asked.sizes, strict=True)}
        if not self._pool.acquire(request, needs):
            return Verdict.WAIT
        return Verdict.READ if self._pool.ready(request) else Verdict.WAIT

    def binding(self, request: str) -> Binding | None:
        """What workers are told when a request is let in; None for one that reads no segment.

        Raises:
            RuntimeError: vLLM lets in what it was told not to. Then nothing must be answered any more.
        """
        verdict = self.verdict(request)
        if verdict is Verdict.PLAIN:
            return None
        if verdict is not Verdict.READ:
            raise RuntimeError(f"request {request} must not be answered, and vLLM lets it in though {verdict.value}")
        memory = self._asked[request].memory
        assert memory is not None
        return Binding(self._pool.numbers(request), memory.template, memory.focus, memory.priors)

    def read_by(self, request: str) -> int:
        """Segments that a request reads; 0 where it reads none, or is refused."""
        asked = self._asked.get(request)
        return 0 if asked is None or asked.refused or asked.memory is None else len(asked.memory.segments)

    def leave(self, request: str) -> None:
        """A request is over, whatever has become of it."""
        if self._asked.pop(request, None) is not None:
            self._pool.release(request)

    def loaded(self, number: int, rank: int) -> None:
        """A rank has loaded a placing."""
        self._pool.loaded(number, rank)

    def lost(self, number: int, why: str) -> None:
        """A rank cannot load a placing: those that wanted to read it are refused."""
        for request in self._pool.lost(number):
            if request in self._asked:
                self._refuse(request, self._asked[request], why)

    def close(self) -> None:
        """No more is asked."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _measure(self, request: str, asked: _Asked) -> bool:
        """Find what a request's segments take, by threads; False while that is not known, or if it is refused."""
        assert asked.memory is not None
        sizes, waits = [], False
        for segment in asked.memory.segments:
            if (size := self._size(request, asked, segment)) is not None:
                sizes.append(size)
            waits = waits or size is None
            if asked.refused:
                return False
        if waits:
            return False
        needs = {one: size.needs for one, size in zip(asked.memory.segments, sizes, strict=True)}
        longest = max(size.tokens for size in sizes)
        if self._pool.too_large(needs):
            self._refuse(request, asked, f"its {len(needs)} segments take more pages than the pool has: make it larger")
        elif asked.tokens + longest > self._window:
            self._refuse(
                request,
                asked,
                f"its prompt and answer of {asked.tokens} tokens behind segments of up to {longest} must fit the "
                f"decoder's window of {self._window}: set max_tokens lower",
            )
        else:
            asked.sizes = sizes
        return not asked.refused

    def _size(self, request: str, asked: _Asked, segment: str) -> _Size | None:
        if segment in self._sizes:
            self._sizes.move_to_end(segment)
            return self._sizes[segment]
        future = self._measured.get(segment)
        if future is None:
            self._measured[segment] = self._threads.submit(self._look, segment)
            return None
        if not future.done():
            return None
        del self._measured[segment]
        try:
            size = future.result()
        except Exception as error:  # the file is missing, damaged or another's
            self._refuse(request, asked, str(error))
            return None
        self._sizes[segment] = size
        if len(self._sizes) > _KNOWN:
            self._sizes.popitem(last=False)
        return size

    def _look(self, segment: str) -> _Size:
        found = self._reads.read(segment)
        return _Size(pages_needed(found.lengths.tolist(), self._ranks), found.source_tokens)

    def _refused_on_arrival(self, request: str, why: str) -> str:
        self._asked[request] = asked = _Asked(None)
        self._refuse(request, asked, why)
        return f"refused {request}"  # no other request's

    def _refuse(self, request: str, asked: _Asked, why: str) -> None:
        asked.refused = why
        self._pool.release(request)
        _LOG.warning("request %s is refused: %s", request, why)
