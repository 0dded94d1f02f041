"""Words of an answer are spelled as the sources spell them, and those that are asked for are preferred.

A compressed segment says well which word is meant, and its last syllables less well: a name of several tokens comes
out as another that begins alike. The sources' text is at hand, since the store has it, though it is not in the prompt.
So where an answer is in the middle of a word that begins as some word of the sources does, the tokens that go on to
such a word are made likelier; where it has said a number of theirs, digits that would make another of it are made less
likely. And where the decoder is about to say something that the question has not said, the words that it asks for are
made likelier to be begun (`lloco_engine.decoder.pointing`; docs/decisions/0010). Whether a word is said at all, and all
that is grammar, is left to the decoder.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import nlargest
from itertools import accumulate, dropwhile
from math import sqrt
from typing import Any

import torch

from lloco_engine.decoder.pointing import WORD, Asked
from lloco_engine.tokenizing import encode

__all__ = ["Pieces", "Speller"]

_TAIL = 80  # characters at the end of an answer in which the word that it is in the middle of begins
_GROUPS = re.compile(r"(?<![\w.,])[-−+]?\d{1,3}(?: \d{3})* \d{0,3}\Z")  # 1 000, as far as it is written
_CANDIDATES = 64  # likeliest tokens that are looked at: no other comes near
_POINTED, _LEAST = 32, 0.05  # words that are pointed to at most, and how much each of them must be asked for


class Pieces:
    """What each token adds to the text before it, decoded once: a step of decoding asks for dozens.

    Args:
        tokenizer: the decoder's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # something stands before it, since some tokenizers drop the space that a text would begin with
        self._before = encode(tokenizer, "a")
        self._length = len(tokenizer.decode(self._before))
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            text = self._tokenizer.decode([*self._before, token], skip_special_tokens=True)
            self._known[token] = text[self._length :]
        return self._known[token]

    def written(self, words: Sequence[str]) -> list[set[tuple[int, ...]]]:
        """Of each word, the tokens that it is written in: where a text begins, and within one.

        Without a space of its own before it, and none where the tokenizer cannot write it.
        """
        if not words:
            return []
        before, size = self._before, len(self._before)
        first = [encode(self._tokenizer, word) for word in words]
        later = [encode(self._tokenizer, f"a {word}") for word in words]
        ways = ((own, ids[size:] if ids[:size] == before else []) for own, ids in zip(first, later, strict=True))
        return [{tuple(dropwhile(self._is_blank, ids)) for ids in way} - {()} for way in ways]

    def _is_blank(self, token: int) -> bool:
        return not self[token].strip()


@dataclass(frozen=True)
class _Way:
    """How a word is written: tokens, the word up to the end of each, how much it is asked for.

    ``joins``: its first token would go on with a word that stands before it.
    """

    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    amount: float
    joins: bool


class Speller:
    """Makes tokens likelier that go on to a word of the sources, or to one that is asked for.

    Args:
        pieces: of the decoder's tokenizer.
        text: of the sources.
        weight: by how much, in nats, for any word that the answer has begun.
        question: that is answered.
        pointing: by how much at most, in nats, for a word that is asked for.
    """

    def __init__(self, pieces: Pieces, text: str, weight: float, question: str = "", pointing: float = 0.0) -> None:
        self._pieces, self._text, self._weight, self._pointing = pieces, text, weight, pointing
        self._words: list[str] = sorted({word.lower() for word in WORD.findall(text)}) if weight else []
        self._asked = Asked(text if pointing else "", question)

    def spell(self, logits: torch.Tensor, answers: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits (B, vocabulary) of what follows each answer's tokens, as the sources have it; changed in place."""
        for row, answer in enumerate(answers if self._words or self._asked else ()):
            text = "".join(self._pieces[token] for token in answer).lower()
            begun = self._begun(text[-_TAIL:])
            goes_on, ends = bool(begun) and self._goes_on(begun), begun[-1:].isdigit() and self._is_word(begun)
            likeliest = _likeliest(logits[row]) if goes_on or ends else []
            if goes_on:
                logits[row, [token for token in likeliest if self._fits(begun, token)]] += self._weight
            if ends:
                logits[row, [token for token in likeliest if self._overdoes(begun, token)]] -= self._weight
            if self._asked:
                self._point(logits[row], answer, text[: len(text) - len(begun)], begun)
        return logits

    def _begun(self, text: str) -> str:
        """The word that a text ends in the middle of.

        A separator at the end belongs to it where the sources have a number, or another word, that goes on so.
        """
        groups = _GROUPS.search(text)
        if groups and self._starts(groups[0]):
            return groups[0]
        last = next(reversed(list(WORD.finditer(text))), None)
        if last and last.end() == len(text):
            return last[0]
        longer = text[last.start() :] if last and last.end() == len(text) - 1 else text[-1:]
        return longer if longer.strip() and self._starts(longer) else ""

    def _point(self, logits: torch.Tensor, answer: Sequence[int], before: str, begun: str) -> None:
        """Make what goes on to words that are asked for likelier, by as much more as they are than what was said."""
        said = max(map(self._asked.amount, WORD.findall(before)), default=0.0)
        said_now = max(said, self._asked.amount(begun))
        word, new, _ = self._word(begun, int(logits.argmax()))
        begins = new and self._may_begin(word, WORD.findall(before + begun))
        more: dict[int, float] = {}
        for way in self._ways:
            for at, token in enumerate(way.tokens):
                if at == 0:
                    fits = begins and (not begun or not way.joins)
                else:
                    fits = begun == way.texts[at - 1] and tuple(answer[-at:]) == way.tokens[:at]
                if fits:
                    amount = way.amount * sqrt(len(way.texts[at]) / len(way.texts[-1])) - (said if at else said_now)
                    more[token] = max(more.get(token, 0.0), self._pointing * amount)
        logits[list(more)] += logits.new_tensor(list(more.values()))

    @cached_property
    def _ways(self) -> list[_Way]:
        """How the tokenizer writes the words that are asked for most, as the sources do and as a sentence begins.

        A decoder writes a word as its tokenizer does. Another beginning of the same letters leads it elsewhere: "Gr" to
        Gregory, where Greta is "G" and "reta".
        """
        forms: dict[str, set[str]] = {
            word: {word, word.capitalize()}
            for word in nlargest(_POINTED, self._asked.amounts, key=self._asked.amount)
            if self._asked.amount(word) >= _LEAST
        }
        for form in WORD.findall(self._text):
            if form.lower() in forms:
                forms[form.lower()].add(form)
        each = [(word, form) for word, its in forms.items() for form in sorted(its)]
        written = self._pieces.written([form for _, form in each])
        return [
            self._way(tokens, self._asked.amount(word))
            for (word, _), its in zip(each, written, strict=True)
            for tokens in sorted(its)
        ]

    def _way(self, tokens: tuple[int, ...], amount: float) -> _Way:
        pieces = [self._pieces[token].lower() for token in tokens]
        return _Way(
            tokens, tuple(text.lstrip() for text in accumulate(pieces)), amount, WORD.match(pieces[0]) is not None
        )

    def _may_begin(self, word: str, answer: Sequence[str]) -> bool:
        """Whether another word may be begun where this one would be, or where none is and the answer may end.

        Not where it is grammar, nor in a sentence that takes up the question's words; but an answer may neither begin
        with these nor be nothing else.
        """
        if word and self._asked.tells(word):
            return True
        if word:
            return not answer and self._asked.echoes(word)
        return any(map(self._asked.echoes, answer)) and not any(map(self._asked.tells, answer))

    def _word(self, begun: str, token: int) -> tuple[str, bool, bool]:
        """The word that a token goes on to, or none; whether it is not the one begun; whether it ends there."""
        piece = self._pieces[token].lower()
        if begun and (longer := WORD.match(begun + piece)) and len(longer[0]) > len(begun):
            return longer[0], False, len(longer[0]) < len(begun + piece)
        other = WORD.match(piece.lstrip())
        return (other[0], True, len(other[0]) < len(piece.lstrip())) if other else ("", True, False)

    def _fits(self, begun: str, token: int) -> bool:
        """Whether a token adds to the word, and makes it a word of the sources or the beginning of one."""
        word, new, ended = self._word(begun, token)
        if new:  # but for a separator, behind which a number goes on that ends nowhere before
            return not self._is_word(begun) and self._starts(begun + self._pieces[token].lower())
        return self._is_word(word) if ended else self._starts(word)

    def _overdoes(self, begun: str, token: int) -> bool:
        """Whether a token adds digits to the number, and makes it one that the sources have not."""
        word, new, _ = self._word(begun, token)
        return not new and any(map(str.isdigit, word[len(begun) :])) and not self._fits(begun, token)

    def _is_word(self, begun: str) -> bool:
        """Whether the sources have this word as it is."""
        at = bisect_left(self._words, begun)
        return at < len(self._words) and self._words[at] == begun

    def _starts(self, text: str) -> bool:
        """Whether a word of the sources is this or begins so."""
        at = bisect_left(self._words, text)
        return at < len(self._words) and self._words[at].startswith(text)

    def _goes_on(self, begun: str) -> bool:
        """Whether a word of the sources begins so and is longer."""
        at = bisect_left(self._words, begun)
        if at < len(self._words) and self._words[at] == begun:
            at += 1
        return at < len(self._words) and self._words[at].startswith(begun)


def _likeliest(logits: torch.Tensor) -> list[int]:
    return torch.topk(logits, min(_CANDIDATES, len(logits))).indices.tolist()
