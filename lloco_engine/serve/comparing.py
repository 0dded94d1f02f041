"""One question, three ways beside each other, streamed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from lloco_engine.comparing import beside
from lloco_engine.engine import AnswerStream, AsyncAnswerStream
from lloco_engine.errors import LLoCOError
from lloco_engine.request import AskRequest
from lloco_engine.serve.answers import source, usage
from lloco_engine.serve.asking import compare_request
from lloco_engine.serve.chat import EventStream, event, unless_gone
from lloco_engine.serve.door import Asker, Door, TheDoor
from lloco_engine.serve.errors import api_error_of, body_of
from lloco_engine.serve.schema import CompareRequest
from lloco_engine.types import Answer

__all__ = ["router"]

router = APIRouter(prefix="/lloco", tags=["chat"])


@router.post("/compare", response_class=StreamingResponse)
async def compare(body: CompareRequest, request: Request, door: TheDoor, caller: Asker) -> Response:
    """Answer from memories, then from the retrieved text, then from whole documents in context, as server-sent events
    that are named by the method."""
    asked = await asyncio.to_thread(compare_request, door.engine, body, caller.tenant, door.limits.question_chars)
    async with AsyncExitStack() as held:
        await unless_gone(request, held.enter_async_context(door.admission.place()), door)
        ours = await held.enter_async_context(door.engine.astream(asked))
        first = await unless_gone(request, anext(ours, None), door)
        events = _events(asked, ours, first, door, held.pop_all())
        return EventStream(events)


async def _events(
    asked: AskRequest, ours: AsyncAnswerStream, first: str | None, door: Door, held: AsyncExitStack
) -> AsyncGenerator[str, None]:
    async with held:
        try:
            if first is not None:
                yield event({"delta": first}, "lloco")
            async for piece in ours:
                yield event({"delta": piece}, "lloco")
            answer = ours.answer
            door.metrics.answered(answer)
            yield event({"final": _final(answer)}, "lloco")
            others = await asyncio.to_thread(beside, door.engine, asked, answer)
            for name in ("text_retrieval", "in_context"):
                async with aclosing(_method(others[name])) as method:
                    async for one in method:
                        yield event(one, name)
            yield event({}, "done")
        except Exception as error:
            yield event(body_of(api_error_of(error)), "error")


async def _method(start: Callable[[], AnswerStream]) -> AsyncGenerator[dict[str, Any], None]:
    """The pieces of one method, and what it cost; what it is refused for is its own."""
    async with AsyncAnswerStream(start) as stream:
        try:
            async for piece in stream:
                yield {"delta": piece}
            yield {"final": _final(stream.answer)}
        except LLoCOError as error:
            yield {"final": _final(Answer(""), str(body_of(api_error_of(error))["error"]["message"]))}


def _final(answer: Answer, error: str | None = None) -> dict[str, Any]:
    cost = usage(answer.usage)
    return {
        "answer": answer.text,
        **cost,
        "seconds": cost["first_token_s"] + cost["decode_s"],
        "adapter": answer.adapter,
        "warnings": list(answer.warnings),
        "sources": [source(hit) for hit in answer.hits],
        "error": error,
    }
