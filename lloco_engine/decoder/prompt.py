"""What a decoder is asked, and the answer that it makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lloco_engine.types import Prefix, Turn

__all__ = ["Generation", "Prompt"]


@dataclass(frozen=True)
class Prompt:
    """One question for the decoder.

    Args:
        question: the user's question.
        prefix: compressed segments to read, or None.
        context: raw text before the question (the in-context baseline), as text or token ids, or None.
        draft: text of the sources, which the answer may repeat: guesses are looked up in it, which changes no answer,
            and hints read it, where some are on (`lloco_engine.decoder.hints`).
        history: earlier turns of the conversation, oldest first.
        verbatim: the question brings its own instructions: nothing is written between it and what it is about.
        tenant: whose segments the prefix holds; a decoder that reads them elsewhere says so there.
    """

    question: str
    prefix: Prefix | None = None
    context: str | Sequence[int] | None = None
    draft: str = ""
    history: tuple[Turn, ...] = ()
    verbatim: bool = False
    tenant: str = ""


@dataclass
class Generation:
    """An answer in the making; complete when ``finish`` is set. Times in seconds from the call."""

    prompt_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)  # of its text
    reasoning: str = ""  # what the decoder thought aloud, apart from its answer
    inside: bool = False  # it ended inside its thoughts
    cut: bool = False  # its thoughts were ended for it
    finish: Literal["", "stop", "length"] = ""
    ttft_s: float = 0.0
    decode_s: float = 0.0
    hints: tuple[str, ...] = ()  # that were on
    notes: tuple[str, ...] = ()  # what else is to be said about how it was made
    steps: int = 0  # passes through the decoder after the first token; fewer than tokens when guesses were kept

    @property
    def text(self) -> str:
        """Its text, as far as it is certain."""
        return "".join(self.pieces)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is to be said about it, and about its thoughts."""
        if self.inside:
            return (
                *self.notes,
                "the answer ended inside the decoder's thoughts: raise reasoning_tokens, or set it to 0",
            )
        if self.cut:
            return (*self.notes, "the decoder's thoughts were ended for it: raise reasoning_tokens for longer ones")
        return self.notes
