"""From a prompt to an answer without a model: sampling, stop strings, streaming, drafting."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lloco_engine.config import GenerateConfig
from lloco_engine.types import Prefix, Turn

__all__ = ["Draft", "Generation", "Prompt", "TextStream", "choose", "forbid"]


@dataclass(frozen=True)
class Prompt:
    """One question for the decoder.

    Args:
        question: the user's question.
        prefix: compressed segments to read, or None.
        context: raw text before the question (the in-context baseline), as text or token ids, or None.
        draft: text that the answer may repeat; only speeds up greedy decoding, never changes it.
        history: earlier turns of the conversation, oldest first.
        verbatim: the question brings its own instructions: nothing is written between it and what it is about.
        spelling: text of the sources, as which an answer spells its words (`lloco_engine.decoder.spelling`); not read.
    """

    question: str
    prefix: Prefix | None = None
    context: str | Sequence[int] | None = None
    draft: str = ""
    history: tuple[Turn, ...] = ()
    verbatim: bool = False
    spelling: str = ""


@dataclass
class Generation:
    """An answer in the making; complete when ``finish`` is set. Times in seconds from the call."""

    prompt_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: Literal["", "stop", "length"] = ""
    ttft_s: float = 0.0
    decode_s: float = 0.0
    steps: int = 0  # passes through the decoder after the first token; fewer than tokens when guesses were kept


def choose(
    logits: torch.Tensor,
    config: GenerateConfig,
    generator: torch.Generator | None,
    answers: Sequence[Sequence[int]] = (),
    ends: Collection[int] = (),
) -> torch.Tensor:
    """Next tokens (B,) from logits (B, vocabulary): greedy at temperature 0, else nucleus sampling.

    Of ``answers``, the tokens of each row so far, none ends (one of ``ends``) before ``config.min_new_tokens``, and no
    run of ``config.no_repeat_ngram`` tokens comes twice.
    """
    logits = forbid(logits, answers, config, ends)
    if config.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits / config.temperature, dim=-1)
    if config.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        ordered[ordered.cumsum(dim=-1) - ordered >= config.top_p] = 0  # the first token always stays
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def forbid(
    logits: torch.Tensor, answers: Sequence[Sequence[int]], config: GenerateConfig, ends: Collection[int]
) -> torch.Tensor:
    """Logits (B, vocabulary), -inf where a token may not follow its row's answer; the given ones stay as they are."""
    forbidden = [_forbidden(answer, config, ends) for answer in answers]
    if any(forbidden):
        logits = logits.clone()
        for row, tokens in enumerate(forbidden):
            logits[row, tokens] = -torch.inf
    return logits


def _forbidden(answer: Sequence[int], config: GenerateConfig, ends: Collection[int]) -> list[int]:
    """Tokens that may not follow an answer's."""
    repeating = _repeating(answer, config.no_repeat_ngram) if config.no_repeat_ngram else []
    return [*repeating, *(ends if len(answer) < config.min_new_tokens else ())]


def _repeating(answer: Sequence[int], size: int) -> list[int]:
    """Tokens that would end a run of ``size`` tokens which the answer has already (Paulus et al. 2017, section 2.5)."""
    begun = list(answer[len(answer) - size + 1 :]) if size <= len(answer) else None
    ends = range(size - 1, len(answer))
    return [answer[end] for end in ends if begun is not None and list(answer[end - size + 1 : end]) == begun]


class TextStream:
    """Token ids in, printable text out; holds back half a character and anything that may become a stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False
        self._sent = 0

    def push(self, token: int) -> str:
        """Add one token; returns the text that can be shown now."""
        self.ids.append(token)
        text = self._tokenizer.decode(self.ids, skip_special_tokens=True)
        if found := [at for stop in self._stop if (at := text.find(stop)) >= 0]:
            self.text, self.stopped = text[: min(found)], True
            return self._release(len(self.text))
        self.text = text
        if text.endswith("\ufffd"):  # a character whose last bytes are still to come
            return ""
        return self._release(len(text) - self._held(text))

    def finish(self) -> str:
        """The text held back, once no token follows."""
        return self._release(len(self.text))

    def _held(self, text: str) -> int:
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                return size
        return 0

    def _release(self, end: int) -> str:
        new = self.text[self._sent : end]
        self._sent = max(self._sent, end)
        return new


class Draft:
    """Guesses the next tokens by looking up the last two in text that the answer may repeat (prompt lookup).

    Three guesses ride along with a decode step at little cost, since a step is bound by reading the weights; the
    decoder keeps a guess only where it is its own greedy choice, so the output does not change. The method is
    prompt lookup decoding (Saxena 2023); here the text looked up is that of the retrieved windows, which is not in
    the prompt, and of the answer so far.
    """

    SIZE = 3

    def __init__(self, ids: Sequence[int] = ()) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, int], int] = {}
        self.extend(ids)

    def extend(self, ids: Sequence[int]) -> None:
        """Add tokens that may come again."""
        for token in ids:
            if len(self._ids) >= 2:
                self._after[(self._ids[-2], self._ids[-1])] = len(self._ids)
            self._ids.append(token)

    def guess(self, last: Sequence[int]) -> list[int]:
        """Up to `SIZE` tokens that followed the last two of ``last`` before; empty when they are new."""
        if len(last) < 2:
            return []
        at = self._after.get((last[-2], last[-1]))
        return [] if at is None else self._ids[at : at + self.SIZE]
