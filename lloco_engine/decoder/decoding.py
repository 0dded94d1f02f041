"""The loop of decoding: logits in, tokens chosen, the decoder run on. Strategies say how tokens are chosen."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from lloco_engine.decoder.drafting import Draft
from lloco_engine.decoder.processors import Pipeline
from lloco_engine.decoder.prompt import Generation
from lloco_engine.decoder.stopping import TextStream

__all__ = ["Ahead", "Row", "Rows", "Strategy", "decode", "draw", "greedy"]


class Ahead(Protocol):
    """The decoder behind the tokens that it was given."""

    def __call__(self, tokens: Sequence[Sequence[int]], /) -> torch.Tensor:
        """Logits after these tokens, a list for each row: (B, vocabulary), or of one row after each, (T, vocabulary).

        The next call may overwrite them.
        """
        ...

    def forget(self, tokens: int, /) -> None:
        """Take back the last tokens of every row."""
        ...

    def reorder(self, origins: Sequence[int], /) -> None:
        """Give each row what another said."""
        ...

    @property
    def crowded(self) -> bool:
        """Whether steps are shared with others, so that guesses would be their loss."""
        ...


class Strategy(Protocol):
    """How the tokens of answers are chosen, and which are run next."""

    @property
    def ended(self) -> bool:
        """Whether no token is to be chosen any more."""
        ...

    def take(self, logits: torch.Tensor) -> Iterator[str]:
        """Choose by the logits of the last pass; yields the text that became certain by it."""
        ...

    def go_on(self, ahead: Ahead) -> torch.Tensor:
        """Run what was chosen."""
        ...


def decode(strategy: Strategy, logits: torch.Tensor, ahead: Ahead) -> Iterator[str]:
    """Decode until the strategy has ended.

    Args:
        strategy: chooses.
        logits: after the prompts, (B, vocabulary).
        ahead: the decoder, which has read them.
    """
    yield from strategy.take(logits)
    while not strategy.ended:
        yield from strategy.take(strategy.go_on(ahead))


@dataclass
class Row:
    """One answer in the making.

    Args:
        generation: is filled.
        text: what its tokens say, and whether they end it.
        pipeline: processes its logits.
        most: tokens that it may have, those of thoughts not counted.
        ends: tokens that end it.
        began: when it was asked for, by `time.perf_counter`.
    """

    generation: Generation
    text: TextStream
    pipeline: Pipeline
    most: int
    ends: Collection[int]
    began: float

    @property
    def ended(self) -> bool:
        """Whether it is complete."""
        return bool(self.generation.finish)

    def take(self, token: int) -> str:
        """Record one token; returns the text that it makes certain."""
        made, text = self.generation, self.text
        now = time.perf_counter() - self.began
        made.ttft_s = made.ttft_s or now
        made.decode_s = now - made.ttft_s
        if token in self.ends:
            return self.end("stop")
        made.token_ids.append(token)
        if new := text.push(token):
            made.pieces.append(new)
        if text.stopped:
            return new + self.end("stop")
        return new + self.end("length") if text.is_full(self.most) else new

    def end(self, why: Literal["stop", "length"]) -> str:
        """The answer is complete; returns the text that was held back."""
        made, text = self.generation, self.text
        if rest := text.finish():
            made.pieces.append(rest)
        made.finish = why
        made.reasoning, made.inside, made.cut = text.reasoning, text.inside, text.forced > 0
        return rest


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest tokens (B,) by logits (B, vocabulary)."""
    return logits.argmax(dim=-1)


def draw(generator: torch.Generator | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """What draws tokens (B,) by logits (B, vocabulary)."""

    def drawn(logits: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator)[:, 0]

    return drawn


class Rows:
    """Answers side by side, each token chosen by its own row's logits: greedy or drawn.

    Args:
        rows: the answers.
        choose: tokens (B,) of processed logits (B, vocabulary).
        draft: makes what guesses what follows, for a single row that is greedy; a guess that the decoder does not make
            itself is taken back. It is called once the first token is out, which does not wait for it. None: nothing is
            guessed.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        choose: Callable[[torch.Tensor], torch.Tensor],
        draft: Callable[[], Draft] | None = None,
    ) -> None:
        self._rows, self._choose, self._begin_draft = rows, choose, draft
        self._draft: Draft | None = None
        self._last: list[int] = []
        self._guesses: list[int] = []
        self._wrong = 0
        self._processed = any(row.pipeline for row in rows)

    @property
    def ended(self) -> bool:
        return all(row.ended for row in self._rows)

    def take(self, logits: torch.Tensor) -> Iterator[str]:
        if self._guesses:
            yield from self._check(self._rows[0], logits)
            return
        if self._processed:
            each = zip(logits, self._rows, strict=True)
            logits = torch.cat([row.pipeline(one[None], [row.generation.token_ids]) for one, row in each])
        chosen = self._choose(logits).tolist()
        self._last = []
        for token, row in zip(chosen, self._rows, strict=True):
            forced = None if row.ended else row.text.must_follow()
            self._last.append(token if forced is None else forced)
            if not row.ended and (new := self._record(row, self._last[-1])):
                yield new

    def _check(self, row: Row, logits: torch.Tensor) -> Iterator[str]:
        """Keep the guesses that the decoder makes itself, and the token after them."""
        guesses = self._guesses
        if row.pipeline:
            said = row.generation.token_ids
            logits = row.pipeline(logits, [[*said, *guesses[:many]] for many in range(len(guesses) + 1)])
        chosen = self._choose(logits).tolist()
        kept = next((at for at, guess in enumerate(guesses) if chosen[at] != guess), len(guesses))
        self._wrong = len(guesses) - kept
        for token in chosen[: kept + 1]:
            self._last = [token]
            if new := self._record(row, token):
                yield new
            if row.ended:
                return

    def _record(self, row: Row, token: int) -> str:
        if self._draft is not None:
            self._draft.extend([token])
        return row.take(token)

    def go_on(self, ahead: Ahead) -> torch.Tensor:
        if self._wrong:
            ahead.forget(self._wrong)
            self._wrong = 0
        begin = None if ahead.crowded else self._begin_draft
        self._guesses = [] if begin is None else self._guess(begin, self._rows[0])
        for row in self._rows:
            row.generation.steps += not row.ended
        return ahead([[token, *self._guesses] for token in self._last])

    def _guess(self, begin: Callable[[], Draft], row: Row) -> list[int]:
        said = row.generation.token_ids
        if self._draft is None:
            self._draft = begin()
            self._draft.extend(said)
        guesses, free = self._draft.guess(said), row.text.free()
        return [] if free is not None and free <= len(guesses) else guesses  # what must follow is no guess
