"""What a request to vLLM says about the memory that it reads, signed, so that nobody else can say it.

A request carries it beside its prompt, where vLLM hands it on unread::

    {"prompt": [...], "kv_transfer_params": {"lloco": {"version": 1, "store": ..., "segments": [...], ...,
                                                       "signature": ...}}}

Whoever searches knows which tenant may read which segment, and a segment's id can be guessed. So the one signs, and
the server that reads refuses what is not signed with the key that both have: HMAC-SHA256 over every field. Nothing
here imports more than Python itself.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

__all__ = [
    "FIELD",
    "KEY",
    "KEY_FILE",
    "LIFETIME",
    "VERSION",
    "Memory",
    "Refused",
    "read_keys",
    "sign",
    "store_fingerprint",
    "verify",
]

FIELD = "lloco"  # of kv_transfer_params
VERSION = 1
LIFETIME = 600  # seconds that a signed request may wait in queues before it is read
KEY, KEY_FILE = "LLOCO_VLLM_KEY", "LLOCO_VLLM_KEY_FILE"  # of the environment

_SECRET = 32  # bytes that a key has at least
_SEGMENTS, _TEMPLATE, _TENANT = 1024, 1 << 20, 1024  # more segments, tokens and characters are no request's
_ID = re.compile(r"[0-9a-f]{32}")
_DIGITS = re.compile(r"[0-9a-f]{64}")
_JSON = json.JSONEncoder(sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
_SHAPE = ("decoder_fingerprint", "template_fingerprint", "memory", "layers", "kv_heads", "head_dim")


class Refused(ValueError):
    """A request says something about its memory that is not so, or that nobody with the key said."""


@dataclass(frozen=True)
class Memory:
    """The memory of one request.

    Args:
        store: `store_fingerprint` of the store that the segments are in.
        segments: ids, 32 hex digits each, in order of placement, each once and at least one.
        template: tokens at the prompt's beginning that stand before the memory, the template prefix; all that follows
            them reads the segments.
        focus: segments that each query of each head reads (0: all).
        priors: of each segment, what is added to its largest logit where they are compared; empty: nothing.
        tenant: whose segments they are.
        expires: seconds since the epoch, after which the request is refused.

    Raises:
        Refused: a value breaks its rule.
    """

    store: str
    segments: tuple[str, ...]
    template: int
    focus: int = 0
    priors: tuple[float, ...] = ()
    tenant: str = ""
    expires: int = 0

    def __post_init__(self) -> None:
        _require(_is_text(self.store, _DIGITS), "store must be 64 hex digits", self.store)
        _require(isinstance(self.segments, tuple), "segments must be a list", self.segments)
        many = len(self.segments)
        _require(0 < many <= _SEGMENTS, f"there must be 1 to {_SEGMENTS} segments", many)
        for segment in self.segments:
            _require(_is_text(segment, _ID), "a segment's id must be 32 lowercase hex digits", segment)
        _require(len(set(self.segments)) == many, "each segment must be there once", self.segments)
        _require(_is_whole(self.template) and 0 <= self.template <= _TEMPLATE, "template must be tokens", self.template)
        _require(_is_whole(self.focus) and 0 <= self.focus <= _SEGMENTS, "focus must be segments", self.focus)
        _require(isinstance(self.priors, tuple), "priors must be a list", self.priors)
        _require(len(self.priors) in (0, many), f"there must be a prior for each of {many} segments", self.priors)
        for prior in self.priors:
            _require(isinstance(prior, float) and math.isfinite(prior), "a prior must be a finite number", prior)
        _require(_is_text(self.tenant) and len(self.tenant) <= _TENANT, "tenant must be a text", self.tenant)
        _require(_is_whole(self.expires) and 0 <= self.expires < 2**53, "expires must be seconds", self.expires)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Memory:
        """What a mapping from JSON says, its signature left aside.

        Raises:
            Refused: a field is missing, unknown or breaks its rule.
        """
        names = [one.name for one in fields(cls)]
        odd = sorted({*names, "version"} ^ (set(given) - {"signature"}), key=str)
        _require(not odd, "a memory must have exactly its fields, and one is missing or unknown", odd and odd[0])
        version = given["version"]
        _require(_is_whole(version) and version == VERSION, f"version must be {VERSION}", version)
        values = {name: given[name] for name in names}
        for name in ("segments", "priors"):
            _require(isinstance(values[name], list | tuple), f"{name} must be a list", values[name])
        numbers = [float(one) if _is_whole(one) and abs(one) < 2**53 else one for one in values["priors"]]
        return cls(**values | {"segments": tuple(values["segments"]), "priors": tuple(numbers)})

    def salt(self, given: str | None = None) -> str:
        """What keeps the KV cache of a prompt with this memory apart from that of all others: 64 hex digits.

        Keys and values of text depend on the memory before it; and what one tenant's requests have left in the cache
        is not to be found by another's. When the request expires plays no part.

        Args:
            given: the client's own salt.
        """
        values = {name: value for name, value in vars(self).items() if name != "expires"}
        return hashlib.sha256(_canonical("salt", values, given)).hexdigest()


def sign(memory: Memory, keys: Sequence[bytes]) -> dict[str, Any]:
    """The ``kv_transfer_params`` of a request, signed with the first key."""
    signature = _signature(memory, _checked(keys)[0])
    return {FIELD: {"version": VERSION, **vars(memory), "signature": signature}}


def verify(
    params: Mapping[str, Any] | None, keys: Sequence[bytes], *, store: str | None = None, now: float | None = None
) -> Memory | None:
    """The memory that a request reads, once it is known that somebody with a key said so.

    Args:
        params: the request's ``kv_transfer_params``.
        keys: of `read_keys`, any of which may have signed.
        store: `store_fingerprint` of what the server reads; None compares nothing.
        now: seconds since the epoch; None asks the clock.

    Returns:
        None where the request says nothing of a memory.

    Raises:
        Refused: the request says something of one that is malformed, of another store, too old, or not signed.
    """
    if not params or FIELD not in params:
        return None
    given = params[FIELD]
    _require(isinstance(given, Mapping), f"{FIELD} must be an object", given)
    memory, signature = Memory.of(given), given.get("signature")
    if not isinstance(signature, str) or not _DIGITS.fullmatch(signature):
        raise Refused("the memory of a request must be signed: signature must be 64 hex digits")
    # each key is tried, so that the time says nothing about which one it was
    right = [hmac.compare_digest(_signature(memory, key), signature) for key in _checked(keys)]
    if not any(right):
        raise Refused("the memory of a request must be signed with the server's key, and this signature is not")
    _require(memory.expires > (time.time() if now is None else now), "the request has expired", memory.expires)
    if store is not None and memory.store != store:
        raise Refused("the request is for another store, decoder or template than this server was started with")
    return memory


def store_fingerprint(manifest: Mapping[str, Any]) -> str:
    """64 hex digits for what a server must have in common with a store to read its segments.

    Args:
        manifest: ``manifest.json`` of the store, parsed. The folder's place plays no part.

    Raises:
        KeyError: it is no manifest.
    """
    return hashlib.sha256(_canonical("store", {name: manifest[name] for name in _SHAPE})).hexdigest()


def read_keys(file: str | os.PathLike[str] | None = None) -> tuple[bytes, ...]:
    """The keys that requests are signed with: the first signs, and all are accepted.

    They are lines of a file, so that a new one can be put before an old one, which is dropped when all have both.

    Args:
        file: None takes that which ``LLOCO_VLLM_KEY_FILE`` names, or else the key in ``LLOCO_VLLM_KEY``.

    Raises:
        ValueError: there is none, or one is too short; says how to make one.
    """
    place = file or os.environ.get(KEY_FILE)
    if place:
        try:
            lines = Path(place).expanduser().read_bytes().splitlines()
        except OSError as error:
            raise ValueError(f"the key file {os.fspath(place)} cannot be read: {error.strerror}; {_HOW}") from error
    else:
        lines = [os.environ.get(KEY, "").encode("utf-8", "surrogateescape")]
    return _checked([line.strip() for line in lines if line.strip()])


_HOW = f"make one with `openssl rand -hex 32 > FILE`, the same for all servers and gateways, and set {KEY_FILE}=FILE"


def _checked(keys: Sequence[bytes]) -> tuple[bytes, ...]:
    if not keys or not all(isinstance(key, bytes) and len(key) >= _SECRET for key in keys):
        what = "there is none" if not keys else "one is shorter"
        raise ValueError(f"requests must be signed with a key of at least {_SECRET} bytes, and {what}; {_HOW}")
    return tuple(keys)


def _signature(memory: Memory, key: bytes) -> str:
    return hmac.digest(key, _canonical("request", VERSION, vars(memory)), "sha256").hex()


def _canonical(*parts: Any) -> bytes:
    """One way to write JSON values as bytes: equal where the values are, and different where they are not."""
    return _JSON.encode(parts).encode("ascii")


def _require(holds: bool, rule: str, received: object) -> None:
    if not holds:
        raise Refused(f"{rule}, not {received!r:.80}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: object, form: re.Pattern[str] | None = None) -> bool:
    if not isinstance(value, str):
        return False
    return form.fullmatch(value) is not None if form else all(not "\ud800" <= one <= "\udfff" for one in value)
