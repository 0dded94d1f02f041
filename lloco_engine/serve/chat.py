"""Chat completions: a question in, its answer out, whole or piece by piece."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable
from contextlib import AsyncExitStack, aclosing
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from lloco_engine.engine import AsyncAnswerStream
from lloco_engine.serve.answers import api_usage, citations, lloco_field
from lloco_engine.serve.asking import chat_request, model_names
from lloco_engine.serve.door import Asker, Door, TheDoor
from lloco_engine.serve.errors import ClientGone, api_error_of, body_of, not_found
from lloco_engine.serve.schema import ChatRequest
from lloco_engine.types import Answer

__all__ = ["EventStream", "event", "router", "unless_gone"]

router = APIRouter(prefix="/v1", tags=["chat"])
_T = TypeVar("_T")


@router.get("/models")
def models(door: TheDoor, caller: Asker) -> dict[str, Any]:
    """The models that a request may name: the base with the fitting adapter, without one, and with each group's."""
    return {"object": "list", "data": [_model(name) for name in model_names(door.engine, caller.tenant)]}


@router.get("/models/{name:path}")
def model(name: str, door: TheDoor, caller: Asker) -> dict[str, Any]:
    """One model."""
    names = model_names(door.engine, caller.tenant)
    if name not in names:
        raise not_found("model", name, f"there is {', '.join(names)}", "model")
    return _model(name)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "lloco"}


@router.post("/chat/completions")
async def chat(body: ChatRequest, request: Request, door: TheDoor, caller: Asker) -> Response:
    """Answer the last message from the documents, whole or, with ``stream``, as server-sent events."""
    asked = await asyncio.to_thread(chat_request, door.engine, body, caller.tenant, door.limits.question_chars)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
    async with AsyncExitStack() as held:
        await unless_gone(request, held.enter_async_context(door.admission.place()), door)
        stream = await held.enter_async_context(door.engine.astream(asked))
        if not body.stream:
            answer = await unless_gone(request, _whole(stream), door)
            door.metrics.answered(answer)
            return JSONResponse(_completion(head, answer))
        # what is to be refused is refused with a status of its own: before the first event
        first = await unless_gone(request, anext(stream, None), door)
        with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        events = _events(head, stream, first, with_usage, door, held.pop_all())
        return EventStream(events)


class EventStream(StreamingResponse):
    """Server-sent events. However the answer ends, what its generator holds is let go at once, not later.

    Args:
        events: of `event`.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


async def unless_gone(request: Request, work: Awaitable[_T], door: Door) -> _T:
    """The result of some work, which is cancelled when the client goes away.

    Raises:
        ClientGone: it went.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        door.metrics.abandoned.inc()
        raise ClientGone("the client went away before its answer was made")
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _whole(stream: AsyncAnswerStream) -> Answer:
    async for _ in stream:
        pass
    return stream.answer


def _completion(head: dict[str, Any], answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    message["annotations"] = citations(answer.hits)
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish}
    more = {"usage": api_usage(answer.usage), "lloco": lloco_field(answer)}
    return {**head, "object": "chat.completion", "choices": [choice], **more}


def event(value: Any, name: str | None = None) -> str:
    """A server-sent event with JSON as its data."""
    return f"{f'event: {name}' + chr(10) if name else ''}data: {json.dumps(value)}\n\n"


async def _events(
    head: dict[str, Any],
    stream: AsyncAnswerStream,
    first: str | None,
    with_usage: bool,
    door: Door,
    held: AsyncExitStack,
) -> AsyncGenerator[str, None]:
    """The events of an answer whose first piece is there (None: it is empty). ``held`` is let go at its end."""
    more: dict[str, Any] = {"usage": None} if with_usage else {}

    def chunk(delta: dict[str, Any], finish: str | None = None, **fields: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return event({**head, "object": "chat.completion.chunk", "choices": [choice], **more, **fields})

    ended = False
    async with held:
        try:
            yield chunk({"role": "assistant", "content": ""})
            if first is not None:
                yield chunk({"content": first})
                async for piece in stream:
                    yield chunk({"content": piece})
            answer = stream.answer
            ended = True
            door.metrics.answered(answer)
            yield chunk({"annotations": citations(answer.hits)}, answer.finish, lloco=lloco_field(answer))
            if with_usage:
                usage = api_usage(answer.usage)
                yield event({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        except Exception as error:
            ended = True
            yield event(body_of(api_error_of(error)))
        finally:
            if not ended:
                door.metrics.abandoned.inc()
