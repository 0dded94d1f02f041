"""What the body of a handle is: a random number that is remembered here, or a signed claim for any process."""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from lloco_engine import ConfigError, Engine, Hit, Span

__all__ = ["CERTAIN", "Mint", "Nonces", "Signatures", "Ticket"]

_log = logging.getLogger(__name__)
_KEY_BYTES = 16
_NOWHERE = Span(0, 0)
_BODY = 32  # digits of a random body
CERTAIN = 6  # first digits that no text has by chance
_LEAST = 3  # first digits that can be a part at all
_RUN = 12  # digits from anywhere that no text has by chance
_RARE = 1000  # fewer first digits are a part too where at most one text in so many has a live handle's by chance


@dataclass(frozen=True)
class Ticket:
    """What a handle stands for: a hit, until a time (seconds since the epoch)."""

    hit: Hit
    expires: float


class Mint(Protocol):
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

    def has_part(self, heads: Collection[str], runs: Collection[str], tenant: str, now: float) -> bool:
        """Whether there is a part of a live handle of a tenant among hex digits, in time linear in their number.

        Args:
            heads: those that stand where a handle's first would.
            runs: twelve or more from anywhere.
            tenant: whose.
            now: seconds since the epoch.
        """
        ...

    def revoke(self, tenant: str, now: float, latest: float) -> None:
        """Make every handle of a tenant worth nothing. None that was minted until ``now`` expires after ``latest``."""
        ...


@dataclass
class _Pool:
    """The live handles of one tenant, oldest first, and where their digits are found."""

    tickets: OrderedDict[str, Ticket] = field(default_factory=OrderedDict)
    heads: dict[str, set[str]] = field(default_factory=dict)  # first digits, to the bodies that have them
    grams: dict[str, str] = field(default_factory=dict)  # digits from anywhere, to a body that has them

    def add(self, body: str, ticket: Ticket) -> None:
        self.tickets[body] = ticket
        self.heads.setdefault(body[:_LEAST], set()).add(body)
        self.grams.update(dict.fromkeys(_grams(body), body))

    def drop(self, body: str) -> Ticket:
        bodies = self.heads[body[:_LEAST]]
        bodies.remove(body)
        if not bodies:
            del self.heads[body[:_LEAST]]
        for gram in _grams(body):
            self.grams.pop(gram, None)
        return self.tickets.pop(body)

    def has_head(self, digits: str) -> bool:
        told_apart = len(digits) >= CERTAIN or len(self.tickets) * _RARE < 16 ** len(digits)
        return told_apart and any(body.startswith(digits[:_BODY]) for body in self.heads.get(digits[:_LEAST], ()))

    def has_run(self, digits: str) -> bool:
        if len(digits) <= _BODY:
            return digits in self.grams.get(digits[:_RUN], "")
        return any(digits[at : at + _BODY] in self.tickets for at in range(len(digits) - _BODY + 1))


def _grams(body: str) -> list[str]:
    return [body[at : at + _RUN] for at in range(_BODY - _RUN + 1)]


class Nonces:
    """Random bodies, remembered here: at most ``most`` of each tenant, its oldest forgotten first."""

    def __init__(self, most: int, engine: Engine) -> None:
        self._most = most
        self._read_before = engine.read_before
        self._pools: dict[str, _Pool] = {}
        self._owners: dict[str, str] = {}  # body to tenant
        self._lock = threading.Lock()

    def mint(self, hit: Hit, now: float, expires: float) -> str:
        body = secrets.token_hex(_BODY // 2)
        with self._lock:
            pool = self._pools.setdefault(hit.tenant, _Pool())
            pool.add(body, Ticket(hit, expires))
            self._owners[body] = hit.tenant
            if len(pool.tickets) > self._most:
                oldest = next(iter(pool.tickets))
                del self._owners[oldest]
                if pool.drop(oldest).expires > now:
                    _log.warning(
                        "more than %d handles of one tenant are alive: its oldest was forgotten before its time",
                        self._most,
                    )
        return body

    def redeem(self, body: str, tenant: str, now: float) -> Ticket | str:
        with self._lock:
            owner = self._owners.get(body)
            if owner is None:
                return "unknown"
            ticket = self._pools[owner].tickets[body]
            if ticket.expires <= now:
                self._forget(owner, body)
                return "expired"
            return ticket if owner == tenant else "wrong_scope"

    def slots(self, body: str) -> dict[str, int]:
        with self._lock:
            owner = self._owners.get(body)
            ticket = None if owner is None else self._pools[owner].tickets[body]
        if ticket is None:
            return {}
        return {hit.segment_id: hit.slots for hit in (*self._read_before(ticket.hit), ticket.hit)}

    def has_part(self, heads: Collection[str], runs: Collection[str], tenant: str, now: float) -> bool:
        with self._lock:
            pool = self._pools.get(tenant)
            if pool is None:
                return False
            for body, ticket in list(pool.tickets.items()):
                if ticket.expires > now:
                    break
                self._forget(tenant, body)
            return any(map(pool.has_head, heads)) or any(map(pool.has_run, runs))

    def revoke(self, tenant: str, now: float, latest: float) -> None:
        with self._lock:
            for body in self._pools.pop(tenant, _Pool()).tickets:
                del self._owners[body]

    def _forget(self, tenant: str, body: str) -> None:
        pool = self._pools[tenant]
        pool.drop(body)
        del self._owners[body]
        if not pool.tickets:
            del self._pools[tenant]


class Signatures:
    """Bodies that say what they stand for, with an HMAC-SHA256 over that and the tenant, cut to 128 bits.

    Nothing is remembered of them, so a part of one cannot be told from a forged one: both are worth nothing.

    Args:
        keys: at least 16 bytes each. The first signs; what any of them signed is read, so that keys can be rotated.
        engine: whose segments.
    """

    def __init__(self, keys: Sequence[bytes], engine: Engine) -> None:
        if not keys:
            raise ConfigError("signed handles need at least one key; use secrets.token_bytes(32)")
        for key in keys:
            if len(key) < _KEY_BYTES:
                raise ConfigError(
                    f"a key must have at least {_KEY_BYTES} bytes, not {len(key)}; use secrets.token_bytes(32)"
                )
        self._keys = tuple(keys)
        self._engine = engine
        self._revoked: dict[str, int] = {}  # tenant to the last time of expiry that is worth nothing

    def mint(self, hit: Hit, now: float, expires: float) -> str:
        slots = hit.slots + sum(earlier.slots for earlier in self._engine.read_before(hit))
        ends = max(int(expires), self._revoked.get(hit.tenant, 0) + 1)
        score = round(500 * (1 + min(1.0, max(-1.0, hit.score))))
        claim = f"{hit.segment_id}:{hit.version:x}:{ends:08x}:{min(slots, 0xFFFF):x}:{_place(hit)}:{score:x}"
        return f"{claim}:{_sign(self._keys[0], hit.tenant, claim)}"

    def redeem(self, body: str, tenant: str, now: float) -> Ticket | str:
        claim, _, signature = body.rpartition(":")
        # another tenant's handle has another signature, so it cannot be told from a forged one
        if not claim or not any(hmac.compare_digest(signature, _sign(key, tenant, claim)) for key in self._keys):
            return "unknown"
        segment_id, version, expires, slots, place, score = claim.split(":")
        if int(expires, 16) <= max(now, self._revoked.get(tenant, 0)):
            return "expired"
        hits = self._engine.find_segment(segment_id, tenant)
        same = [hit for hit in hits if hit.version == int(version, 16) and _place(hit) == place]
        # of a document that is gone nothing is left but the claim
        gone = Hit(
            segment_id, "", 0, _NOWHERE, "", 0, 1.0, tenant=tenant, version=int(version, 16), slots=int(slots, 16)
        )
        hit = replace(same[0] if same else gone, score=int(score, 16) / 500 - 1)
        return Ticket(hit, float(int(expires, 16)))

    def slots(self, body: str) -> dict[str, int]:
        # the tenant is not known here, so this is what the handle says of itself and of all that it is read after
        return {body: int(body.split(":")[3], 16)} if ":" in body else {}

    def has_part(self, heads: Collection[str], runs: Collection[str], tenant: str, now: float) -> bool:
        return False

    def revoke(self, tenant: str, now: float, latest: float) -> None:
        self._revoked[tenant] = max(int(latest), self._revoked.get(tenant, 0))


def _place(hit: Hit) -> str:
    """16 hex digits that stand for a chunk of a document: several may have one segment."""
    return hashlib.sha256(f"{hit.ordinal}\n{hit.doc_id}".encode()).hexdigest()[:16]


def _sign(key: bytes, tenant: str, claim: str) -> str:
    return hmac.new(key, f"{claim}\n{tenant}".encode(), hashlib.sha256).hexdigest()[:_BODY]
