"""Handles: what a framework carries in place of a chunk's text, and what the decoder gets for it.

A handle is a capability, not a name. It is minted for one question, stands for one chunk of one document of one tenant
and for the segment that this is read from, ends after a while, and cannot be guessed. The same question gets the same
handle for the same chunk for half of that while, so that retrievers whose results are fused agree. Whoever holds the
text of a prompt can use the handles in it, for that tenant and no other; text that only looks like a handle is worth
nothing.

`Handles` keeps what it minted in this process. With a ``key``, it writes everything into the handle and signs it, so
that another process with the same key and store can read it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

from lloco_engine import ConfigError, Engine, Hit, LLoCOError
from lloco_integrations.handle_syntax import SENTINEL, heads, neutralise, runs, write
from lloco_integrations.minting import CERTAIN, Mint, Nonces, Signatures, Ticket

__all__ = ["HandleFragment", "Handles", "Resolved"]

_log = logging.getLogger(__name__)
_shared: WeakKeyDictionary[Engine, Handles] = WeakKeyDictionary()
_sharing = threading.Lock()


class HandleFragment(LLoCOError, ValueError):
    """A prompt holds a part of a live handle: something cut or changed the text of the prompt.

    A part is the opening with at least six of a handle's digits, or with three to five where so few handles are alive
    (4, 65 and 1048) that other text hardly has theirs; or twelve digits from anywhere in one. What is shorter is inert
    text: it cannot be told from text that only looks like a handle, and raising there would let any document that
    holds such text stop an answer. Parts of signed handles, which are not remembered, cannot be told from forged text
    at all: they are inert, and count as ``unknown``.
    """


@dataclass(frozen=True)
class Resolved:
    """Texts whose handles were taken out.

    ``texts`` have `Handles.MARKER` where handles were, and nothing that reads as one; ``hits`` come in the order of
    their first handle, each segment once; ``stale`` are those whose document was replaced or deleted since; ``lost``
    counts, by reason, what was written like a handle and is worth nothing: ``expired``, ``unknown`` (forged, forgotten,
    of another process or of another tenant) or ``cut``.
    """

    texts: tuple[str, ...]
    hits: tuple[Hit, ...] = ()
    stale: tuple[Hit, ...] = ()
    lost: Mapping[str, int] = field(default_factory=dict)


class Handles:
    """Mints handles and resolves prompts that hold some. Thread-safe.

    A retriever or postprocessor and a language model must share one: those of one engine do, by `Handles.of`, unless
    they are given another.

    Args:
        engine: whose segments the handles stand for.
        ttl: seconds after which a handle is worth nothing.
        most: live handles of one tenant that are remembered.
        key: at least 16 secret bytes, the same in every process that shares the store; or several, of which the first
            signs and all are accepted, to go over to a new one: put it first, and drop the old one after ``ttl``. None
            keeps handles in this process.
        clock: seconds since the epoch.

    Raises:
        ConfigError: the key is too short, or ``ttl`` or ``most`` is not positive.
    """

    MARKER = "\u2402memory\u2403"

    def __init__(
        self,
        engine: Engine,
        *,
        ttl: float = 900.0,
        most: int = 4096,
        key: bytes | Sequence[bytes] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if ttl <= 0 or most <= 0:
            raise ConfigError(f"ttl and most must be positive, not {ttl!r} and {most!r}")
        self.ttl = ttl
        self.compressing = threading.Lock()  # a store has one writer: ad hoc compression takes turns
        self._clock = clock
        keys = [key] if isinstance(key, bytes) else key
        self._signed = keys is not None
        self._mint: Mint = Nonces(most, engine) if keys is None else Signatures(keys, engine)
        self._given: OrderedDict[tuple[str, ...], tuple[str, float]] = OrderedDict()
        self._most = most
        self._giving = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._find_segment = engine.find_segment

    @classmethod
    def of(cls, engine: Engine) -> Handles:
        """The handles that everything on an engine shares unless told otherwise."""
        with _sharing:
            if engine not in _shared:
                _shared[engine] = cls(engine)
            return _shared[engine]

    @property
    def counts(self) -> dict[str, int]:
        """How many handles were ``minted``, ``resolved``, ``unknown``, ``expired``, ``wrong_scope`` and ``stale``."""
        return dict(self._counts)

    def mint(self, hits: Iterable[Hit], question: str = "") -> str:
        """Handles for some hits, as the text that stands for them in a prompt.

        Args:
            hits: of one tenant or several.
            question: that they were retrieved for. Asked again, it gets the same handle for the same chunk while that
                has at least half of its time; without one every handle is new.
        """
        now = self._clock()
        bodies = [self._again(hit, question, now) if question else self._new(hit, now) for hit in hits]
        return "\n".join(map(write, bodies))  # so that a splitter can part them

    def _new(self, hit: Hit, now: float) -> str:
        self._counts["minted"] += 1
        return self._mint.mint(hit, now, now + self.ttl)

    def _again(self, hit: Hit, question: str, now: float) -> str:
        key = (question, hit.tenant, hit.doc_id, str(hit.ordinal), str(hit.version), hit.segment_id)
        with self._giving:
            body, minted = self._given.get(key, ("", 0.0))
            if not body or now - minted > self.ttl / 2 or isinstance(self._mint.redeem(body, hit.tenant, now), str):
                body = self._new(hit, now)
                self._given[key] = (body, now)
            self._given.move_to_end(key)
            while len(self._given) > self._most:
                self._given.popitem(last=False)
        return body

    def revoke(self, tenant: str = "") -> None:
        """Make every handle of a tenant that was minted until now worth nothing.

        Signed ones are refused by this object alone: call it in every process, or give them all another ``key``.
        """
        now = self._clock()
        self._mint.revoke(tenant, now, now + self.ttl)

    def slots(self, text: str) -> int:
        """Slots that the handles in a text cost, with those of the segments that theirs are read after.

        Each segment counts once; of signed handles, each handle with all that it is read after.
        """
        costs: dict[str, int] = {}
        for body in SENTINEL.findall(text):
            costs |= self._mint.slots(body)
        return sum(costs.values())

    def resolve(self, texts: Sequence[str], tenant: str = "") -> Resolved:
        """Take the handles out of texts, in order.

        Handles that are unknown, expired or of another tenant become inert text, are logged and counted.

        Args:
            texts: of one prompt.
            tenant: who asks.

        Raises:
            HandleFragment: a text holds a part of a live handle of this tenant.
        """
        now = self._clock()
        hits: dict[str, Hit] = {}
        lost: Counter[str] = Counter()
        cleaned = []
        for text in texts:
            parts, at = [], 0
            for found in SENTINEL.finditer(text):
                ticket = self._mint.redeem(found[1], tenant, now)
                self._count(ticket)
                if isinstance(ticket, Ticket):
                    first = hits.setdefault(ticket.hit.segment_id, ticket.hit)
                    if first.doc_id != ticket.hit.doc_id:  # one text in two documents: read once, both are named
                        also = dict.fromkeys((*first.also_in, ticket.hit.doc_id))
                        hits[first.segment_id] = replace(first, also_in=tuple(also))
                else:
                    lost["expired" if ticket == "expired" else "unknown"] += 1
                parts += [text[at : found.start()], self.MARKER if isinstance(ticket, Ticket) else "(LLC)"]
                at = found.end()
            rest = "".join([*parts, text[at:]])
            self._refuse_fragments(rest, tenant, now)
            lost["cut"] += sum(len(digits) >= CERTAIN for digits in heads(rest))
            cleaned.append(neutralise(rest))
        stale = {hit.segment_id for hit in hits.values() if not self._is_current(hit)}
        self._counts["stale"] += len(stale)
        return Resolved(
            tuple(cleaned),
            tuple(hit for hit in hits.values() if hit.segment_id not in stale),
            tuple(hit for hit in hits.values() if hit.segment_id in stale),
            {reason: count for reason, count in lost.items() if count},
        )

    def _count(self, ticket: Ticket | str) -> None:
        outcome = ticket if isinstance(ticket, str) else "resolved"
        self._counts[outcome] += 1
        if outcome != "resolved":
            _log.warning("a prompt held a handle that is worth nothing (%s); it was read as plain text", outcome)

    def _refuse_fragments(self, text: str, tenant: str, now: float) -> None:
        begun = heads(text)
        if self._mint.has_part(begun, runs(text), tenant, now):
            raise HandleFragment(
                "a handle must reach the model whole, and this prompt holds a part of one: a splitter or a limit cut "
                "it; give the prompt helper or splitter the model's own token counter, or send fewer chunks"
            )
        if self._signed:  # what is cut there cannot be told from what was forged, so it counts as both would
            for digits in begun:
                if len(digits) >= CERTAIN:
                    self._count("unknown")

    def _is_current(self, hit: Hit) -> bool:
        current = self._find_segment(hit.segment_id, hit.tenant)
        return any(other.version == hit.version and other.doc_id == hit.doc_id for other in current)
