"""Errors as the OpenAI API has them: status, type, code, and a message that says the rule, the value and the fix."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from lloco_engine.errors import (
    AdapterError,
    ConfigError,
    DecoderUnavailable,
    DocumentError,
    LLoCOError,
    NotInStore,
    PromptTooLong,
    SegmentUnavailable,
    StoreFull,
    StoreLocked,
)

__all__ = ["APIError", "ClientGone", "api_error_of", "body_of", "install", "not_found"]

_log = logging.getLogger("lloco.serve")
_RETRY_S = 5
_SHOWN = 80  # characters of a value that a message shows


class ClientGone(Exception):
    """Whoever asked has closed the connection: nobody reads what is answered."""


class APIError(HTTPException):
    """What a request is refused with.

    Args:
        status: of HTTP.
        message: the rule, what was received, and the fix.
        code: of the API, for programs.
        param: which field of the request it is about.
        kind: the API's type; by default what goes with the status.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code = code
        self.param = param
        self.kind = kind or _kind(status)


def _kind(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def not_found(what: str, name: str, fix: str, param: str | None = None) -> APIError:
    """There is no such thing, for who asks."""
    return APIError(404, f"no {what} {name!r:.{_SHOWN}} is there; {fix}", "not_found", param=param)


def body_of(error: APIError) -> dict[str, Any]:
    """The error as the API writes it. Lone surrogates, which no answer can hold, are escaped."""
    message = str(error.detail).encode("utf-8", "backslashreplace").decode("utf-8")
    return {"error": {"message": message, "type": error.kind, "param": error.param, "code": error.code}}


def api_error_of(error: Exception) -> APIError:
    """What an error becomes for whoever asked. What is not theirs to know stays in the log."""
    if isinstance(error, APIError):
        return error
    said = str(error)
    match error:
        case PromptTooLong():
            return APIError(400, said, "context_length_exceeded", param="messages")
        case NotInStore():
            return APIError(404, said, "not_found")
        case AdapterError():
            return APIError(400, said, "invalid_value", param="adapter")
        case ConfigError() | DocumentError():
            return APIError(400, said, "invalid_value")
        case SegmentUnavailable():
            return APIError(500, said, "segment_unavailable")
        case StoreLocked():
            again = {"Retry-After": str(_RETRY_S)}
            return APIError(503, "another process writes to the store; try again", "store_busy", headers=again)
        case DecoderUnavailable():
            again = {"Retry-After": str(_RETRY_S)}
            said = "the decoder cannot be reached, or refuses; the server's log says why; try again"
            return APIError(503, said, "decoder_unavailable", headers=again)
        case StoreFull():
            return APIError(503, "the disk of the store is full, and nothing was changed; free space", "store_full")
        case LLoCOError():
            return APIError(500, "the store or the model cannot be used; the server's log says why", "engine_error")
    return APIError(500, "something failed in the server; its log says what, under this request's id", "internal_error")


def _response(error: APIError) -> JSONResponse:
    return JSONResponse(body_of(error), error.status_code, error.headers or None)


def _of_http(error: HTTPException) -> APIError:
    if isinstance(error, APIError):
        return error
    if isinstance(error.__cause__, APIError):
        return error.__cause__
    known = {
        404: ("no such address is served; /docs lists those that are", "unknown_url"),
        405: ("this address does not take this method; /docs lists those that it takes", "method_not_allowed"),
    }
    message, code = known.get(error.status_code, (str(error.detail), "invalid_value"))
    return APIError(error.status_code, message, code, headers=error.headers)


def _of_validation(errors: Sequence[Mapping[str, Any]]) -> APIError:
    """The first rule that a body, a form or a query breaks."""
    first = errors[0]
    kind, where = str(first["type"]), [str(part) for part in first["loc"]]
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return APIError(400, f"the body must be JSON, and it is not: {reason}", "invalid_json")
    # what stands between brackets names a branch of a union, and no field
    path = [part for part in where[1:] if not ("[" in part or part in _BRANCHES)]
    param = ".".join(path) or None
    if kind == "extra_forbidden":
        message = f"{param!r} is no field of this request; see /docs for those that are, and leave it out"
        return APIError(400, message, "unsupported_parameter", param=param)
    value = "" if kind == "missing" else f", not {first.get('input')!r:.{_SHOWN}}"
    rule = str(first["msg"]).removeprefix("Value error, ")
    name = param or "the body"
    return APIError(400, f"{name}: {rule[:1].lower()}{rule[1:]}{value}", "invalid_value", param=param)


_BRANCHES = ("str", "int", "float", "bool", "list", "dict", "none")


def install(app: FastAPI) -> None:
    """Have an application answer with the API's errors."""

    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return _response(_of_http(error))

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _response(_of_validation(error.errors()))

    async def engine(_: Request, error: Exception) -> JSONResponse:
        made = api_error_of(error)
        if made.status_code >= 500:
            _log.error("the engine refused", exc_info=error)
        return _response(made)

    async def failed(_: Request, error: Exception) -> Response:
        if isinstance(error, ClientGone):
            return Response(status_code=499)
        return _response(api_error_of(error))

    app.add_exception_handler(Exception, failed)  # the gate logs it
    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(LLoCOError, engine)
