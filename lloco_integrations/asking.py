"""A prompt with handles in it -> a question for the engine -> an answer.

A framework writes chunks and question into a template of its own and hands the model the result. The engine has its own
template, which segments and adapters were made with, so the model takes the framework's apart again:

1. Handles are resolved and taken out of the text, before anything is generated.
2. Where the rest is a known `Frame` (the framework's default prompt, or one that the user names), its question is the
   engine's question, and raw text that stood beside the handles is the engine's ``context``. The answer is then the
   engine's own for the same hits.
3. Any other prompt with handles is the user's own: it is kept word for word after the segments, with
   ``(the text above)`` where handles stood.
4. A prompt without handles or frames is asked as it is, with nothing before it.

In a conversation the same holds for the last message of the user. Instructions of the system that no frame knows go
after the segments, and earlier turns follow them. What a tool returned for the last message is context. Handles are
resolved in what the system says, in the last message and in what tools returned for it; in earlier turns, and in what
a model said, they are inert: a conversation that is kept does not bring back what was retrieved for another question.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self, TypeVar

from lloco_engine import (
    Answer,
    AnswerStream,
    AsyncAnswerStream,
    Engine,
    Hit,
    SegmentUnavailable,
    StoreLocked,
    Turn,
)
from lloco_integrations.chunks import OnMissing, repair
from lloco_integrations.handles import Handles, Resolved
from lloco_integrations.sentinel import Neutraliser, neutralise

__all__ = ["Ask", "Asker", "AsyncReply", "Frame", "Message", "Reply", "usage_dict"]

_T = TypeVar("_T")
ABOVE = "(the text above)"
_OTHERS = ("system", "assistant", "tool")  # roles whose messages are no question
_RUN_OF_MARKERS = re.compile(rf"{Handles.MARKER}(?:\s*{Handles.MARKER})*")


@dataclass(frozen=True)
class Message:
    """One message of a prompt. ``role`` is ``"system"``, ``"assistant"``, ``"tool"``, or else counts as the user's."""

    role: str
    text: str


class Frame:
    """A prompt template that is taken apart: where the context was written, where the question. White space may differ.

    Args:
        template: its text, with slots in braces.
        context: name of the slot that chunks are written into, "" where the template has none.
        question: name of the slot of the question; in a system prompt, of further instructions; "" where it has none.
    """

    def __init__(self, template: str, context: str = "context_str", question: str = "query_str") -> None:
        slots = {context: "context", question: "question"}
        parts = re.split(r"\{(\w+)\}", template.strip())
        pattern, seen = "", set()
        for number, part in enumerate(parts):
            if number % 2 == 0:
                pattern += _flexible(part)
            elif part in slots and part not in seen:
                pattern += f"(?P<{slots[part]}>.*)"
                seen.add(part)
            else:
                pattern += ".*"
        self._pattern = re.compile(pattern, re.DOTALL)

    def match(self, text: str) -> tuple[str, str] | None:
        """The context and the question of a text that was written with this template; None of any other."""
        found = self._pattern.fullmatch(text.strip())
        if found is None:
            return None
        groups = found.groupdict()
        return (groups.get("context") or "").strip(), (groups.get("question") or "").strip()


@dataclass(frozen=True)
class Ask:
    """What the engine is asked, every handle resolved; ``warnings`` are about those that stand for nothing."""

    question: str
    hits: tuple[Hit, ...] = ()
    context: str = ""
    history: tuple[Turn, ...] = ()
    verbatim: bool = False
    tenant: str = ""
    stale: tuple[Hit, ...] = ()
    warnings: tuple[str, ...] = ()


class Asker:
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
        self._frames = tuple(frames)
        self._system = tuple(system)
        self._retries = retries

    def read(self, messages: Sequence[Message], tenant: str = "") -> Ask:
        """Resolve a prompt's handles, and take it apart.

        Raises:
            HandleFragment: it holds a part of a live handle.
            SegmentUnavailable: a document was replaced or deleted since, and ``on_missing`` is ``"error"``.
        """
        return self._retrying(lambda: self._read(messages, tenant))

    def _retrying(self, step: Callable[[], _T]) -> _T:
        for attempt in range(self._retries):
            try:
                return step()
            except StoreLocked:
                time.sleep(0.1 * 2**attempt)
        return step()

    def _read(self, messages: Sequence[Message], tenant: str) -> Ask:
        asked = max((n for n, m in enumerate(messages) if m.role not in _OTHERS), default=-1)
        live = [m.role == "system" or (n >= asked and m.role != "assistant") for n, m in enumerate(messages)]
        resolved = self.handles.resolve(
            [m.text if use else neutralise(m.text) for m, use in zip(messages, live, strict=True)], tenant
        )
        marked = [replace(m, text=text) for m, text in zip(messages, resolved.texts, strict=True)]
        context, instructions = self._system_texts(marked)
        context += [_without(m.text) for m in marked[asked + 1 :] if m.role == "tool"]
        question, verbatim, beside = self._question(marked[asked].text if asked >= 0 else "", resolved.hits, context)
        return Ask(
            question,
            resolved.hits,
            _joined([*map(self._stale_text, resolved.stale), *context, beside, *instructions]),
            tuple(_turn(m) for m in marked[: max(asked, 0)] if m.role not in ("system", "tool") and m.text.strip()),
            verbatim,
            tenant,
            resolved.stale,
            _warnings(resolved),
        )

    def _system_texts(self, messages: Sequence[Message]) -> tuple[list[str], list[str]]:
        """Raw chunks that known system prompts hold, and what other system prompts say."""
        context, instructions = [], []
        for message in messages:
            if message.role != "system":
                continue
            matches = (frame.match(message.text) for frame in self._system)
            match = next((found for found in matches if found is not None), None)
            if match is None:
                instructions.append(_above(message.text).strip())
            else:
                context.append(_without(match[0]))
                instructions.append(match[1])
        return context, instructions

    def _question(self, text: str, hits: Sequence[Hit], context: Sequence[str]) -> tuple[str, bool, str]:
        """The question of the user's message, whether it is its own instruction, and raw chunks that stand in it."""
        for frame in self._frames:
            match = frame.match(text)
            if match is not None and match[1]:
                return _above(match[1]), False, _without(match[0])
        own = Handles.MARKER in text or not (hits or any(context))
        return _above(text).strip(), own, ""

    def _stale_text(self, hit: Hit) -> str:
        if self.on_missing == "error":
            raise SegmentUnavailable(
                f"a retrieved segment must still be in the store when it is read, and that of document {hit.doc_id!r} "
                "was replaced or deleted since; retrieve again"
            )
        return neutralise(hit.text.strip())  # a signed handle has none

    def start(self, ask: Ask, **settings: Any) -> AnswerStream:
        """Begin to answer. Damaged segments follow ``on_missing``.

        Args:
            ask: from `read`.
            settings: of `Engine.ask`: adapter, generate, prefix and single settings.

        Raises:
            SegmentUnavailable: a segment is damaged, and ``on_missing`` is ``"error"``.
            LLoCOError: as `Engine.stream`.
        """
        return self._retrying(lambda: self._start(ask, settings))

    def _start(self, ask: Ask, settings: Mapping[str, Any]) -> AnswerStream:
        damaged = self.engine.unusable(ask.hits)
        if damaged:
            ask = self._mend(ask, damaged)
        names = ("hits", "tenant", "context", "history", "verbatim")
        asked = {name: getattr(ask, name) for name in names}
        return self.engine.stream(ask.question, **asked, **settings).note(ask.warnings)

    def _mend(self, ask: Ask, damaged: Sequence[Hit]) -> Ask:
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
            context=_joined([*(neutralise(hit.text.strip()) for hit in damaged), ask.context]),
            warnings=(*ask.warnings, warning),
        )

    def reply(self, ask: Ask, **settings: Any) -> Reply:
        """Begin to answer as `start` does, as pieces of text in which nothing reads as a handle."""
        return Reply(self.start(ask, **settings))

    def areply(self, ask: Ask, **settings: Any) -> AsyncReply:
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


def _warnings(resolved: Resolved) -> tuple[str, ...]:
    """What a reader of the answer must know of handles that stand for nothing, or for nothing that is there."""
    said = []
    if count := sum(resolved.lost.values()):
        reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(resolved.lost.items()))
        said.append(
            f"{count} of {count + len(resolved.hits) + len(resolved.stale)} handles in the prompt stand for nothing "
            f"({reasons}) and nothing was read for them: retrieve again, let everything that works on one prompt share "
            "its Handles (with a key where that is several processes), or give them a longer ttl"
        )
    if resolved.stale:
        kept = sum(bool(hit.text) for hit in resolved.stale)
        said.append(
            f"{len(resolved.stale)} retrieved segments are of documents that were replaced or deleted since; the text "
            f"that was retrieved was read of {kept} of them, as text: retrieve again"
        )
    return tuple(said)


def _clean(answer: Answer) -> Answer:
    return replace(answer, text=neutralise(answer.text), reasoning=neutralise(answer.reasoning))


def _flexible(literal: str) -> str:
    """A pattern for a template's own words, whatever the white space between them and around them."""
    return r"\s*" + r"\s+".join(map(re.escape, literal.split())) + r"\s*"


def _turn(message: Message) -> Turn:
    return Turn("assistant" if message.role == "assistant" else "user", message.text)


def _above(text: str) -> str:
    return _RUN_OF_MARKERS.sub(ABOVE, text)


def _without(text: str) -> str:
    """Raw text of a context slot, without the places where handles stood."""
    return re.sub(r"\n{3,}", "\n\n", _RUN_OF_MARKERS.sub("", text)).strip()


def _joined(texts: Sequence[str]) -> str:
    return "\n\n".join(text for text in texts if text)
