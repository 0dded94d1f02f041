"""What every request passes first: who asks, from where, how much it sends and how long that takes; and is counted."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi.responses import JSONResponse

from lloco_engine.serve.errors import APIError, ClientGone, api_error_of, body_of
from lloco_engine.serve.keys import Caller, KeyFile
from lloco_engine.serve.limits import Limits
from lloco_engine.serve.metrics import Metrics

__all__ = ["Gate", "is_loopback"]

Scope = dict[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]

_OPEN = ("/", "/docs", "/openapi.json", "/healthz", "/readyz")  # without a key
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
_DRAIN_S = 10.0  # for a body that is too large: a client that is still sending does not read why
_FORM = 65_536  # bytes of an upload beside its file
_SAFE = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_log = logging.getLogger("lloco.serve")


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, which no other can reach."""
    return host in _LOOPBACK or host.startswith("127.")


class Gate:
    """An ASGI middleware around the whole server.

    Without keys everybody is the tenant that the server was started for; then only this machine's own names are
    answered to, and no page of another site, which a browser would otherwise let send.

    Args:
        app: what requests go on to, with ``scope["state"]["caller"]``.
        keys: who may ask; None where nobody needs a key.
        tenant: whose documents are served without keys.
        limits: of one request.
        metrics: counts.
    """

    def __init__(self, app: App, *, keys: KeyFile | None, tenant: str, limits: Limits, metrics: Metrics) -> None:
        self._app = app
        self._keys, self._tenant = keys, tenant
        self._limits, self._metrics = limits, metrics
        self._at_once = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = _Visit(scope, receive, send, self._limits)
        self._at_once += 1
        try:
            await self._serve(scope, visit)
        finally:
            self._at_once -= 1
            self._count(scope, visit)

    async def _serve(self, scope: Scope, visit: _Visit) -> None:
        try:
            self._check_room()
            scope.setdefault("state", {})["caller"] = self._caller(scope)
            visit.check_length()
            await self._app(scope, visit.receive, visit.send)
        except TimeoutError:
            _log.info("a client left its answer unread", extra={"request": visit.id})
        except Exception as error:
            if not isinstance(error, APIError | ClientGone):
                _log.error("a request failed", exc_info=error, extra={"request": visit.id})
            if visit.status:
                return  # the answer has begun: uvicorn ends the connection
            refusal = api_error_of(error)
            if refusal.status_code == 413:
                await visit.drain()
            response = JSONResponse(body_of(refusal), refusal.status_code, refusal.headers or None)
            await response(scope, visit.receive, visit.send)

    def _check_room(self) -> None:
        if self._at_once > self._limits.requests:
            message = f"at most {self._limits.requests} requests are served at once; try again in 1 s"
            raise APIError(429, message, "rate_limit_exceeded", headers={"Retry-After": "1"})

    def _caller(self, scope: Scope) -> Caller | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        path = scope["path"]
        if self._keys is None:
            _check_origin(headers)
            return Caller(self._tenant)
        if path in _OPEN or path.startswith("/page/"):
            return None
        scheme, _, given = headers.get(b"authorization", "").partition(" ")
        caller = self._keys.find(given.strip()) if scheme.lower() == "bearer" and given.strip() else None
        if caller is None:
            message = "a request must have the header 'Authorization: Bearer KEY' with a key of `lloco keys add`"
            received = "the key that was received is none of them" if given else "none was received"
            challenge = {"WWW-Authenticate": "Bearer"}
            raise APIError(401, f"{message}; {received}", "invalid_api_key", headers=challenge)
        if (caller.scope == "metrics") != (path == "/metrics"):
            fix = "/metrics is read with a key of `lloco keys add --metrics`, and such a key reads nothing else"
            raise APIError(403, fix, "insufficient_permissions")
        return caller

    def _count(self, scope: Scope, visit: _Visit) -> None:
        route = getattr(scope.get("route"), "path", "other")
        seconds = time.perf_counter() - visit.began
        status = visit.status or 499
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.requests.labels(method, route, str(status)).inc()
        self._metrics.request_s.labels(route).observe(seconds)
        caller = (scope.get("state") or {}).get("caller")
        told = {"request": visit.id, "method": method, "route": route, "status": status}
        told |= {
            "ms": round(seconds * 1000, 1),
            "bytes_in": visit.bytes_in,
            "tenant": caller.tenant if caller else None,
        }
        _log.info("request", extra=told)


_METHODS = ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH")


def _check_origin(headers: dict[bytes, str]) -> None:
    """Refuse what a page of another site has a browser send, by its own name or by one that it gave this machine."""
    host = headers.get(b"host", "")
    name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
    if not is_loopback(name):
        message = f"without keys a request must name this machine as 127.0.0.1 or localhost, not {host!r:.80}"
        raise APIError(403, message, "wrong_origin")
    origin = headers.get(b"origin")
    if origin is not None and origin.partition("://")[2] != host:
        message = f"without keys only this server's own page may send requests, not one of {origin!r:.80}; use keys"
        raise APIError(403, message, "wrong_origin")


class _Visit:
    """One request on its way: counts what comes in, and ends a client that does not go on."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: Limits) -> None:
        self.began = time.perf_counter()
        self.id = uuid.uuid4().hex
        self.status = 0
        self.bytes_in = 0
        self._receive, self._send, self._limits = receive, send, limits
        upload = scope["path"].rstrip("/") == "/v1/files"
        self._most = limits.upload_bytes + _FORM if upload else limits.body_bytes
        self._until = self.began + limits.body_s * (10 if upload else 1)
        self._whole = False
        self._length = next((value for name, value in scope["headers"] if name == b"content-length"), b"")

    def check_length(self) -> None:
        """Refuse a body that says itself that it is too large."""
        if self._length.isdigit() and int(self._length[:20]) > self._most:
            raise self._too_large()

    async def receive(self) -> Message:
        """The next part of the body, or that the client is gone."""
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout(max(0.0, self._until - time.perf_counter())):
                message = await self._receive()
        except TimeoutError:
            rule = f"a body must be there within {self._until - self.began:g} s, and {self.bytes_in} bytes of it were"
            raise APIError(408, f"{rule}; send it again", "body_timeout", headers={"Connection": "close"}) from None
        self.bytes_in += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self.bytes_in > self._most:
            raise self._too_large()
        return message

    async def drain(self) -> None:
        """Let a client send what it began to send, for a while, so that it reads why it is refused."""
        left = 2 * self._most
        try:
            async with asyncio.timeout(_DRAIN_S):
                while not self._whole and left > 0:
                    message = await self._receive()
                    left -= len(message.get("body", b""))
                    self._whole = not message.get("more_body", False)
        except TimeoutError:
            pass

    async def send(self, message: Message) -> None:
        """Send a part of the answer; `TimeoutError` where the client leaves it unread."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = [(b"x-request-id", self.id.encode()), *_SAFE]
            message = {**message, "headers": [*message.get("headers", ()), *own]}
        async with asyncio.timeout(self._limits.send_s):
            await self._send(message)

    def _too_large(self) -> APIError:
        message = f"the body of this request must have at most {self._most:,} bytes; send less, or raise the --limit"
        return APIError(413, message, "body_too_large")
