"""Memories that nobody signed, or that are too old or malformed, refused as HTTP 400 before vLLM has such a request.

vLLM fails a request in its scheduler as 500 alone. So its server is given this by its option ``--middleware``. It says
early what `admission` says in any case, by the same `verify`, and nothing depends on it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from lloco_integrations.vllm.params import Refused, read_keys, store_fingerprint, verify
from lloco_integrations.vllm.sources import open_reader

__all__ = ["Refusals"]

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]

_MOST = 4 << 20  # bytes of a body that are looked at: whoever sends them may not have shown an API key yet
_NAME = "kv_transfer_params"


class Refusals:
    """An ASGI middleware of vLLM's server. Bodies of more than 4 MiB go on as they come.

    Args:
        app: what it stands before.
    """

    def __init__(self, app: Callable[[_Message, _Receive, _Send], Awaitable[None]]) -> None:
        self._app = app
        self._known: tuple[tuple[bytes, ...], str] | None = None  # the keys, and the store

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """Pass on a request, or refuse it."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        taken: list[_Message] = []
        body = await _body(receive, taken)
        if why := await self._wrong(scope["app"], body):
            await _refuse(send, why)
            return

        async def again() -> _Message:
            return taken.pop(0) if taken else await receive()

        await self._app(scope, again, send)

    async def _wrong(self, app: Any, body: bytes) -> str:
        """Why a body's memory is refused; "" where it is not, or there is none."""
        if _NAME.encode() not in body:
            return ""
        try:
            given = json.loads(body)
        except (ValueError, RecursionError):
            return ""  # vLLM says so
        if not isinstance(given, dict) or not isinstance(params := given.get(_NAME), dict):
            return ""
        if self._known is None:
            self._known = await asyncio.to_thread(_configured, app)
        try:
            verify(params, self._known[0], store=self._known[1])
        except Refused as error:
            return str(error)
        return ""


def _configured(app: Any) -> tuple[tuple[bytes, ...], str]:
    """The keys and the store of a server, as its connector has them."""
    given = app.state.vllm_config.kv_transfer_config.kv_connector_extra_config
    reader = open_reader(given.get("store"), given.get("cache"))
    return read_keys(given.get("key_file")), store_fingerprint(reader.manifest)


async def _body(receive: _Receive, taken: list[_Message]) -> bytes:
    """A request's body, b"" where it is too long; its messages go to ``taken``."""
    made, more = bytearray(), True
    while more and len(made) <= _MOST:
        message = await receive()
        taken.append(message)
        made += message.get("body", b"")
        more = message.get("more_body", False)  # there is none where the client is gone
    return b"" if more or len(made) > _MOST else bytes(made)


async def _refuse(send: _Send, why: str) -> None:
    """Answer as vLLM does where a request is wrong."""
    error = {"message": why, "type": "BadRequestError", "param": _NAME, "code": 400}
    text = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": text})
