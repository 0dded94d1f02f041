"""A prompt with handles in it -> a question for the engine.

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
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lloco_engine import Hit, SegmentUnavailable, Turn
from lloco_integrations.chunks import OnMissing
from lloco_integrations.handle_syntax import neutralise
from lloco_integrations.handles import Handles, Resolved

__all__ = ["Frame", "Message", "ParsedPrompt", "PromptParser", "joined"]

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
class ParsedPrompt:
    """What the engine is asked, every handle resolved; ``warnings`` are about those that stand for nothing."""

    question: str
    hits: tuple[Hit, ...] = ()
    context: str = ""
    history: tuple[Turn, ...] = ()
    verbatim: bool = False
    tenant: str = ""
    stale: tuple[Hit, ...] = ()
    warnings: tuple[str, ...] = ()


class PromptParser:
    """Takes prompts apart.

    Args:
        handles: resolves them.
        on_missing: of `lloco_integrations.session.Session`.
        frames: templates to take apart, besides those of system prompts.
        system: system prompts to leave out or take apart.
    """

    def __init__(
        self, handles: Handles, on_missing: OnMissing, frames: Sequence[Frame] = (), system: Sequence[Frame] = ()
    ) -> None:
        self._handles, self._on_missing = handles, on_missing
        self._frames, self._system = tuple(frames), tuple(system)

    def read(self, messages: Sequence[Message], tenant: str) -> ParsedPrompt:
        """See `lloco_integrations.session.Session.read`."""
        asked = max((n for n, m in enumerate(messages) if m.role not in _OTHERS), default=-1)
        live = [m.role == "system" or (n >= asked and m.role != "assistant") for n, m in enumerate(messages)]
        resolved = self._handles.resolve(
            [m.text if use else neutralise(m.text) for m, use in zip(messages, live, strict=True)], tenant
        )
        marked = [replace(m, text=text) for m, text in zip(messages, resolved.texts, strict=True)]
        context, instructions = self._system_texts(marked)
        context += [_without(m.text) for m in marked[asked + 1 :] if m.role == "tool"]
        question, verbatim, beside = self._question(marked[asked].text if asked >= 0 else "", resolved.hits, context)
        return ParsedPrompt(
            question,
            resolved.hits,
            joined([*map(self._stale_text, resolved.stale), *context, beside, *instructions]),
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
        if self._on_missing == "error":
            raise SegmentUnavailable(
                f"a retrieved segment must still be in the store when it is read, and that of document {hit.doc_id!r} "
                "was replaced or deleted since; retrieve again"
            )
        return neutralise(hit.text.strip())  # a signed handle has none


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


def joined(texts: Sequence[str]) -> str:
    """Texts that are not empty, paragraphs of one."""
    return "\n\n".join(text for text in texts if text)
