"""A question that a framework's prompt became, and the engine's answer to it, in which nothing reads as a handle."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Self, TypeVar

from lloco_engine import Answer, AnswerStream, AsyncAnswerStream, Engine, Hit, SegmentUnavailable, StoreLocked
from lloco_integrations.chunks import OnMissing, repair
from lloco_integrations.handle_syntax import Neutraliser, neutralise
from lloco_integrations.handles import Handles
from lloco_integrations.prompt_parser import Frame, Message, ParsedPrompt, PromptParser, joined

__all__ = ["AsyncReply", "Reply", "Session", "usage_dict"]

_T = TypeVar("_T")


class Session:
    """Reads prompts for one engine and has it answer them. Safe for use from several threads.

    Args:
        engine: answers.
        handles: resolves them; by default what all classes on the engine share.
        on_missing: what becomes of a segment that is damaged or whose document was replaced or deleted since it was
            retrieved: ``"raw"`` reads the text that was retrieved, ``"compress"`` makes a damaged one again and else is
            as raw, ``"error"`` refuses.
        frames: templates to take apart, besides those of system prompts.
        system: system prompts to leave out or take apart.
        retries: how often to try again where another process holds the store.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        handles: Handles | None = None,
        on_missing: OnMissing = "raw",
        frames: Sequence[Frame] = (),
        system: Sequence[Frame] = (),
        retries: int = 2,
    ) -> None:
        self.engine = engine
        self.handles = Handles.of(engine) if handles is None else handles
        self.on_missing = on_missing
        self._parser = PromptParser(self.handles, on_missing, frames, system)
        self._retries = retries

    def read(self, messages: Sequence[Message], tenant: str = "") -> ParsedPrompt:
        """Resolve a prompt's handles, and take it apart.

        Raises:
            HandleFragment: it holds a part of a live handle.
            SegmentUnavailable: a document was replaced or deleted since, and ``on_missing`` is ``"error"``.
        """
        return self._retrying(lambda: self._parser.read(messages, tenant))

    def _retrying(self, step: Callable[[], _T]) -> _T:
        for attempt in range(self._retries):
            try:
                return step()
            except StoreLocked:
                time.sleep(0.1 * 2**attempt)
        return step()

    def start(self, ask: ParsedPrompt, **settings: Any) -> AnswerStream:
        """Begin to answer. Damaged segments follow ``on_missing``.

        Args:
            ask: from `read`.
            settings: of `Engine.ask`: adapter, generate, prefix and single settings.

        Raises:
            SegmentUnavailable: a segment is damaged, and ``on_missing`` is ``"error"``.
            LLoCOError: as `Engine.stream`.
        """
        return self._retrying(lambda: self._start(ask, settings))

    def _start(self, ask: ParsedPrompt, settings: Mapping[str, Any]) -> AnswerStream:
        damaged = self.engine.unusable(ask.hits)
        if damaged:
            ask = self._mend(ask, damaged)
        names = ("hits", "tenant", "context", "history", "verbatim")
        asked = {name: getattr(ask, name) for name in names}
        return self.engine.stream(ask.question, **asked, **settings).note(ask.warnings)

    def _mend(self, ask: ParsedPrompt, damaged: Sequence[Hit]) -> ParsedPrompt:
        if self.on_missing == "error":
            raise SegmentUnavailable(
                f"every segment of a prompt must be usable, and {len(damaged)} of {len(ask.hits)} are missing or "
                f"damaged, the first being part {damaged[0].ordinal} of {damaged[0].doc_id!r}; ingest it again, or set "
                "on_missing to 'compress' or 'raw'"
            )
        if self.on_missing == "compress":
            repair(self.engine, damaged, ask.tenant, self.handles)
            damaged = self.engine.unusable(ask.hits)
        if not damaged:
            return ask
        left = tuple(hit for hit in ask.hits if hit not in damaged)
        names = ", ".join(repr(name) for name in dict.fromkeys(hit.doc_id for hit in damaged))
        warning = (
            f"{len(damaged)} of {len(ask.hits)} segments are missing or damaged, so their text was read instead, which "
            f"costs its tokens: ingest {names} again"
        )
        return replace(
            ask,
            hits=left,
            context=joined([*(neutralise(hit.text.strip()) for hit in damaged), ask.context]),
            warnings=(*ask.warnings, warning),
        )

    def reply(self, ask: ParsedPrompt, **settings: Any) -> Reply:
        """Begin to answer as `start` does, as pieces of text in which nothing reads as a handle."""
        return Reply(self.start(ask, **settings))

    def areply(self, ask: ParsedPrompt, **settings: Any) -> AsyncReply:
        """`reply` for asyncio, in a thread that starts when the first piece is asked for."""
        return AsyncReply(AsyncAnswerStream(lambda: self.start(ask, **settings)))


class Reply:
    """Iterate over it for the answer's text; then `answer` is the whole. A context manager."""

    def __init__(self, stream: AnswerStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[str]:
        clean = Neutraliser()
        for piece in self._stream:
            if text := clean.push(piece):
                yield text
        if text := clean.finish():
            yield text

    @cached_property
    def answer(self) -> Answer:
        """The whole answer; `LLoCOError` before the pieces are used up."""
        return _clean(self._stream.answer)

    def whole(self) -> Answer:
        """Read to the end; the answer."""
        with self:
            for _ in self._stream:
                pass
            return self.answer

    def close(self) -> None:
        """End the answer here."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncReply:
    """`Reply` for asyncio."""

    def __init__(self, stream: AsyncAnswerStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[str]:
        clean = Neutraliser()
        async for piece in self._stream:
            if text := clean.push(piece):
                yield text
        if text := clean.finish():
            yield text

    @cached_property
    def answer(self) -> Answer:
        """The whole answer; `LLoCOError` before the pieces are used up."""
        return _clean(self._stream.answer)

    async def whole(self) -> Answer:
        """Read to the end; the answer."""
        async with self:
            async for _ in self._stream:
                pass
            return self.answer

    async def aclose(self) -> None:
        """End the answer here."""
        await self._stream.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def usage_dict(answer: Answer) -> dict[str, Any]:
    """An answer's cost as frameworks count it: what was read is text tokens and slots together."""
    usage = answer.usage
    read = usage.template_tokens + usage.prompt_tokens + usage.prompt_slots
    return {
        "prompt_tokens": read,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": read + usage.completion_tokens,
        "prompt_slots": usage.prompt_slots,
        "source_tokens": usage.source_tokens,
    }


def _clean(answer: Answer) -> Answer:
    return replace(answer, text=neutralise(answer.text), reasoning=neutralise(answer.reasoning))
