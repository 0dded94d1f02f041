"""From a prompt to an answer without a model: sampling, stop strings, streaming, drafting."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lloco_engine.config import GenerateConfig
from lloco_engine.decoder.thoughts import Thoughts
from lloco_engine.types import Prefix, Turn

__all__ = ["Draft", "Generation", "Prompt", "TextStream", "choose", "forbid"]

_MARKER = 64  # tokens that the longest marker of thoughts can be written in


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
    reasoning: str = ""  # what the decoder thought aloud, apart from its answer
    inside: bool = False  # it ended inside its thoughts
    cut: bool = False  # its thoughts were ended for it
    finish: Literal["", "stop", "length"] = ""
    ttft_s: float = 0.0
    decode_s: float = 0.0
    steps: int = 0  # passes through the decoder after the first token; fewer than tokens when guesses were kept

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is to be said about its thoughts."""
        if self.inside:
            return ("the answer ended inside the decoder's thoughts: raise reasoning_tokens, or set it to 0",)
        if self.cut:
            return ("the decoder's thoughts were ended for it: raise reasoning_tokens for longer ones",)
        return ()


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
    """Token ids in, printable text out; holds back half a character and anything that may become a stop string.

    Thoughts are no text: they are kept apart, and ended where they take more tokens than they may.

    Args:
        tokenizer: the decoder's.
        stop: texts that end the answer.
        thoughts: the decoder's markers of thoughts, or None.
        budget: tokens that thoughts may take.
    """

    def __init__(
        self, tokenizer: Any, stop: Sequence[str] = (), thoughts: Thoughts | None = None, budget: int = 0
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._thoughts, self._budget = thoughts, budget
        self._awaited = (*self._stop, thoughts.markers.begin) if thoughts is not None else self._stop
        self._longest = max(map(len, self._awaited), default=0)
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False
        self.inside = thoughts is not None and thoughts.opened
        self.thought_tokens = 0
        self.forced = 0  # tokens that were not the decoder's choice
        self._thought: list[int] = []
        self._ended: list[str] = []
        self._own: list[int] = []  # tokens of text since the last thought, and what stood before them
        self._before = ""
        self._sent = 0

    def push(self, token: int) -> str:
        """Add one token; returns the text that can be shown now."""
        self.ids.append(token)
        if self._thoughts is not None and self.inside:
            self._think(token, self._thoughts)
            return ""
        if self._thoughts is not None and token == self._thoughts.begin_id:
            return self._begin(self.text, 1)
        self._own.append(token)
        text = self._before + self._tokenizer.decode(self._own, skip_special_tokens=True)
        if self._ended:
            text = text.lstrip()
        if found := [at for stop in self._stop if (at := text.find(stop)) >= 0]:
            self.text, self.stopped = text[: min(found)], True
            return self._release(len(self.text))
        if self._thoughts is not None and (at := text.find(self._thoughts.markers.begin)) >= 0:
            return self._begin(text[:at], len(self._thoughts.begin))
        self.text = text
        if text.endswith("\ufffd"):  # a character whose last bytes are still to come
            return ""
        return self._release(len(text) - self._held(text))

    def must_follow(self) -> int | None:
        """The token that must come next, as thoughts have taken all that they may; None where the decoder chooses."""
        if self._thoughts is None or not self.inside or self.thought_tokens - self.forced < self._budget:
            return None
        self.forced += 1
        return self._thoughts.close[min(self.forced, len(self._thoughts.close)) - 1]

    def free(self) -> int | None:
        """Tokens that thoughts may still take; None outside of them."""
        return max(0, self._budget - self.thought_tokens) if self.inside else None

    def is_full(self, most: int) -> bool:
        """Whether the answer has its ``most`` tokens, those of thoughts not counted."""
        thoughts, own = self._thoughts, len(self.ids) - self.thought_tokens
        if thoughts is not None and thoughts.markers.begin.startswith(self.text.strip()):
            most += len(thoughts.begin)  # what may be the marker that thoughts begin with
        lost = thoughts is not None and self.forced > len(thoughts.close)
        return lost or (not self.inside and own >= most)

    @property
    def reasoning(self) -> str:
        """The thoughts so far."""
        going_on = self._tokenizer.decode(self._thought, skip_special_tokens=True) if self.inside else ""
        return "\n\n".join(text for one in (*self._ended, going_on) if (text := one.strip()))

    def _begin(self, text: str, marker: int) -> str:
        """Thoughts begin after this text, by a marker of so many tokens."""
        self.text, self.inside, self._thought = text, True, []
        self.thought_tokens += marker
        return self._release(len(text))

    def _think(self, token: int, thoughts: Thoughts) -> None:
        self.thought_tokens += 1
        rest, ended = "", token == thoughts.end_id
        if not ended:
            self._thought.append(token)
            if thoughts.end_id is None:
                _, found, rest = self._decoded(-_MARKER).partition(thoughts.markers.end)
                ended = bool(found)
        if ended:
            self._ended.append(self._decoded(0).partition(thoughts.markers.end)[0])
            self.inside, self._before, self._own = False, self.text + rest, []

    def _decoded(self, begin: int) -> str:
        return str(self._tokenizer.decode(self._thought[begin:], skip_special_tokens=True))

    def finish(self) -> str:
        """The text held back, once no token follows."""
        return self._release(len(self.text))

    def _held(self, text: str) -> int:
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            if any(awaited.startswith(text[-size:]) for awaited in self._awaited):
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
