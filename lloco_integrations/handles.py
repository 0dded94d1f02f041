"""Handles: what a framework carries in place of a chunk's text, and what the decoder gets for it.

A handle is a capability, not a name. It is minted for one retrieval, stands for one segment of one tenant, ends after a
while, and cannot be guessed. Whoever holds the text of a prompt can use the handles in it, for that tenant and no
other; text that only looks like a handle is worth nothing.

`Handles` keeps what it minted in this process. With a ``key``, it writes everything into the handle and signs it, so
that another process with the same key and store can read it.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

from lloco_engine import ConfigError, Engine, Hit, LLoCOError, Span
from lloco_integrations.sentinel import SENTINEL, heads, neutralise, runs, write

__all__ = ["HandleFragment", "Handles", "Resolved"]

_log = logging.getLogger(__name__)
_KEY_BYTES = 16
_NOWHERE = Span(0, 0)
_CERTAIN = 6  # first digits that no text has by chance
_RARE = 1000  # fewer are a part too where at most one text in so many has a live handle's by chance
_shared: WeakKeyDictionary[Engine, Handles] = WeakKeyDictionary()
_sharing = threading.Lock()


class HandleFragment(LLoCOError, ValueError):
    """A prompt holds a part of a live handle: something cut or changed the text of the prompt.

    A part is the opening with at least six of a handle's digits, or with three to five where so few handles are alive
    (4, 65 and 1048) that other text hardly has theirs; or twelve digits from anywhere in one. What is shorter is inert
    text: it cannot be told from text that only looks like a handle, and raising there would let any document that
    holds such text stop an answer. Of signed handles, which are not remembered, only six digits count.
    """


@dataclass(frozen=True)
class Ticket:
    """What a handle stands for: a hit, until a time (seconds since the epoch)."""

    hit: Hit
    expires: float


@dataclass(frozen=True)
class Resolved:
    """Texts whose handles were taken out.

    ``texts`` have `Handles.MARKER` where handles were, and nothing that reads as one; ``hits`` come in the order of
    their first handle, each segment once; ``stale`` are those whose document was replaced or deleted since.
    """

    texts: tuple[str, ...]
    hits: tuple[Hit, ...] = ()
    stale: tuple[Hit, ...] = ()


class _Mint(Protocol):
    """Makes handles and takes them back."""

    def mint(self, hit: Hit, now: float, expires: float) -> str:
        """The body of a new handle."""
        ...

    def redeem(self, body: str, tenant: str, now: float) -> Ticket | str:
        """What a body stands for, or why it stands for nothing: ``unknown``, ``expired`` or ``wrong_scope``."""
        ...

    def slots(self, body: str) -> dict[str, int]:
        """What a body costs in a prompt: its segment and those it is read after, with their slots; {} if it is worth
        nothing."""
        ...

    def is_part(self, digits: str, tenant: str, now: float, *, first: bool) -> bool:
        """Whether hex digits are part of a live handle of a tenant; with ``first``, its first ones."""
        ...


class _Nonces:
    """Random bodies, remembered here: at most ``most`` of them, the oldest forgotten first."""

    def __init__(self, most: int, engine: Engine) -> None:
        self._most = most
        self._read_before = engine.read_before
        self._tickets: OrderedDict[str, Ticket] = OrderedDict()
        self._lock = threading.Lock()

    def mint(self, hit: Hit, now: float, expires: float) -> str:
        body = secrets.token_hex(16)
        with self._lock:
            self._tickets[body] = Ticket(hit, expires)
            while len(self._tickets) > self._most:
                _, dropped = self._tickets.popitem(last=False)
                if dropped.expires > now:
                    _log.warning("more than %d handles are alive: the oldest was forgotten before its time", self._most)
        return body

    def redeem(self, body: str, tenant: str, now: float) -> Ticket | str:
        with self._lock:
            ticket = self._tickets.get(body)
            if ticket is None:
                return "unknown"
            if ticket.expires <= now:
                del self._tickets[body]
                return "expired"
        return ticket if ticket.hit.tenant == tenant else "wrong_scope"

    def slots(self, body: str) -> dict[str, int]:
        with self._lock:
            ticket = self._tickets.get(body)
        if ticket is None:
            return {}
        return {hit.segment_id: hit.slots for hit in (*self._read_before(ticket.hit), ticket.hit)}

    def is_part(self, digits: str, tenant: str, now: float, *, first: bool) -> bool:
        with self._lock:
            live = [
                body for body, ticket in self._tickets.items() if ticket.hit.tenant == tenant and ticket.expires > now
            ]
        if not first:
            return any(digits in body or body in digits for body in live)
        told_apart = len(digits) >= _CERTAIN or len(live) * _RARE < 16 ** len(digits)
        return told_apart and any(body.startswith(digits[:32]) for body in live)


class _Signatures:
    """Bodies that say what they stand for, with an HMAC-SHA256 over that and the tenant, cut to 128 bits."""

    def __init__(self, key: bytes, engine: Engine) -> None:
        if len(key) < _KEY_BYTES:
            raise ConfigError(
                f"a key must have at least {_KEY_BYTES} bytes, not {len(key)}; use secrets.token_bytes(32)"
            )
        self._key = key
        self._engine = engine

    def _sign(self, tenant: str, claim: str) -> str:
        return hmac.new(self._key, f"{claim}\n{tenant}".encode(), hashlib.sha256).hexdigest()[:32]

    def mint(self, hit: Hit, now: float, expires: float) -> str:
        slots = hit.slots + sum(earlier.slots for earlier in self._engine.read_before(hit))
        claim = f"{hit.segment_id}:{hit.version:x}:{int(expires):08x}:{min(slots, 0xFFFF):x}"
        return f"{claim}:{self._sign(hit.tenant, claim)}"

    def redeem(self, body: str, tenant: str, now: float) -> Ticket | str:
        claim, _, signature = body.rpartition(":")
        # another tenant's handle has another signature, so it cannot be told from a forged one
        if not claim or not hmac.compare_digest(signature, self._sign(tenant, claim)):
            return "unknown"
        segment_id, version, expires, slots = claim.split(":")
        if int(expires, 16) <= now:
            return "expired"
        hits = self._engine.find_segment(segment_id, tenant)
        same = [hit for hit in hits if hit.version == int(version, 16)]
        # of a document that is gone nothing is left but the claim
        gone = Hit(
            segment_id, "", 0, _NOWHERE, "", 0, 1.0, tenant=tenant, version=int(version, 16), slots=int(slots, 16)
        )
        return Ticket(same[0] if same else gone, float(int(expires, 16)))

    def slots(self, body: str) -> dict[str, int]:
        # the tenant is not known here, so this is what the handle says of itself and of all that it is read after
        return {body: int(body.split(":")[3], 16)} if ":" in body else {}

    def is_part(self, digits: str, tenant: str, now: float, *, first: bool) -> bool:
        # nothing is remembered: any opening counts as a part, as does the whole id of a segment of the tenant
        if first:
            return len(digits) >= _CERTAIN
        return bool(len(digits) == 32 and self._engine.find_segment(digits, tenant))


class Handles:
    """Mints handles and resolves prompts that hold some. Thread-safe.

    A retriever or postprocessor and a language model must share one: those of one engine do, by `Handles.of`, unless
    they are given another.

    Args:
        engine: whose segments the handles stand for.
        ttl: seconds after which a handle is worth nothing.
        most: live handles that are remembered.
        key: at least 16 secret bytes, the same in every process that shares the store; None keeps handles in this one.
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
        key: bytes | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if ttl <= 0 or most <= 0:
            raise ConfigError(f"ttl and most must be positive, not {ttl!r} and {most!r}")
        self.ttl = ttl
        self.compressing = threading.Lock()  # a store has one writer: ad hoc compression takes turns
        self._clock = clock
        self._mint: _Mint = _Nonces(most, engine) if key is None else _Signatures(key, engine)
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

    def mint(self, hits: Iterable[Hit]) -> str:
        """New handles for some hits, as the text that stands for them in a prompt."""
        now = self._clock()
        bodies = [self._mint.mint(hit, now, now + self.ttl) for hit in hits]
        self._counts["minted"] += len(bodies)
        return "\n".join(map(write, bodies))  # so that a splitter can part them

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
        cleaned = []
        for text in texts:
            parts, at = [], 0
            for found in SENTINEL.finditer(text):
                ticket = self._mint.redeem(found[1], tenant, now)
                self._count(ticket)
                if isinstance(ticket, Ticket):
                    hits.setdefault(ticket.hit.segment_id, ticket.hit)
                parts += [text[at : found.start()], self.MARKER if isinstance(ticket, Ticket) else "(LLC)"]
                at = found.end()
            rest = "".join([*parts, text[at:]])
            self._refuse_fragments(rest, tenant, now)
            cleaned.append(neutralise(rest))
        stale = {hit.segment_id for hit in hits.values() if not self._is_current(hit)}
        self._counts["stale"] += len(stale)
        return Resolved(
            tuple(cleaned),
            tuple(hit for hit in hits.values() if hit.segment_id not in stale),
            tuple(hit for hit in hits.values() if hit.segment_id in stale),
        )

    def _count(self, ticket: Ticket | str) -> None:
        outcome = ticket if isinstance(ticket, str) else "resolved"
        self._counts[outcome] += 1
        if outcome != "resolved":
            _log.warning("a prompt held a handle that is worth nothing (%s); it was read as plain text", outcome)

    def _refuse_fragments(self, text: str, tenant: str, now: float) -> None:
        part = self._mint.is_part
        if any(part(digits, tenant, now, first=True) for digits in heads(text)) or any(
            part(digits, tenant, now, first=False) for digits in runs(text)
        ):
            raise HandleFragment(
                "a handle must reach the model whole, and this prompt holds a part of one: a splitter or a limit cut "
                "it; give the prompt helper or splitter the model's own token counter, or send fewer chunks"
            )

    def _is_current(self, hit: Hit) -> bool:
        current = self._find_segment(hit.segment_id, hit.tenant)
        return any(other.version == hit.version and other.doc_id == hit.doc_id for other in current)
