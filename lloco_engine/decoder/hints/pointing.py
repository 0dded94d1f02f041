"""Words of the sources that the question asks for, as far as its own words say, are preferred.

What is asked for mostly stands in the sentence that has the question's words, and is none of them. So a word of the
sources counts the more, the more of the question's words its sentence has, and the fewer other sentences have it.
No list of stop words is needed: a word that many sentences have says little about any of them.

Where the decoder is about to say something that the question has not said, the words that it asks for are made likelier
to be begun, and within any word, to be gone on to.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import nlargest
from itertools import accumulate
from math import log, sqrt

import torch

from lloco_engine.decoder.hints.words import WORD, Pieces, SourceWords, next_word

__all__ = ["Asked", "Pointing"]

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_SHARPNESS = 3  # a sentence with half of the best one's share of the question counts an eighth as much
_TELLING = 0.6  # rarity from which on a word says something: of 24 sentences at most three have it
_POINTED, _LEAST = 32, 0.05  # words that are pointed to at most, and how much each of them must be asked for


class Asked:
    """How much each word of the sources is asked for: from 0 to 1, and 0 for the question's own.

    ``amounts`` has those that are, in lower case.

    Args:
        text: of the sources.
        question: about them.
    """

    def __init__(self, text: str, question: str) -> None:
        sentences = [words for part in _SENTENCE.split(text) if (words := _words(part))]
        having, number = Counter(word for words in sentences for word in words), max(len(sentences), 2)
        self._rarity = {word: log(number / many) / log(number) for word, many in having.items()}
        own = _words(question)
        whole = sum(self._rarity.get(word, 1.0) for word in own)
        shares = [sum(self._rarity[word] for word in words & own) / whole for words in sentences] if whole else []
        best = max(shares, default=0.0)
        self.amounts: dict[str, float] = {}
        for words, share in zip(sentences, shares, strict=False):
            if share:
                for word in words - own:
                    amount = share * (share / best) ** _SHARPNESS * self._rarity[word]
                    self.amounts[word] = max(self.amounts.get(word, 0.0), amount)
        self._own = [word for word in own if self._rarity.get(word, 0.0) >= _TELLING]

    def __bool__(self) -> bool:
        return bool(self.amounts)

    def amount(self, word: str) -> float:
        """How much a word in lower case is asked for."""
        return self.amounts.get(word, 0.0)

    def tells(self, word: str) -> bool:
        """Whether a word, or its beginning, tells more than grammar does or the question has said.

        So may any word that the sources do not have.
        """
        return self._says(word) and not self._from_question(word)

    def echoes(self, word: str) -> bool:
        """Whether a word tells as much, but the question has said it."""
        return self._says(word) and self._from_question(word)

    def _says(self, word: str) -> bool:
        return self._rarity.get(word, 1.0) >= _TELLING

    def _from_question(self, word: str) -> bool:
        return any(own.startswith(word) for own in self._own)


@dataclass(frozen=True)
class _Way:
    """How a word is written: tokens, the word up to the end of each, how much it is asked for.

    ``joins``: its first token would go on with a word that stands before it.
    """

    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    amount: float
    joins: bool


class Pointing:
    """Makes tokens likelier that begin or go on to a word that is asked for. A logits processor.

    Args:
        pieces: of the decoder's tokenizer.
        words: of the sources.
        question: that is answered.
        weight: by how much at most, in nats.
    """

    def __init__(self, pieces: Pieces, words: SourceWords, question: str, weight: float) -> None:
        self._pieces, self._words, self._weight = pieces, words, weight
        self._asked = Asked(words.text, question)

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Logits (B, vocabulary) of what follows each answer's tokens (B, T); changed in place."""
        for row, answer in zip(logits, ids.tolist() if self._asked else (), strict=bool(self._asked)):
            self._point(row, answer)
        return logits

    def _point(self, logits: torch.Tensor, answer: Sequence[int]) -> None:
        """Make what goes on to words that are asked for likelier, by as much more as they are than what was said."""
        text = self._pieces.text(answer)
        begun = self._words.begun(text)
        before = text[: len(text) - len(begun)]
        said = max(map(self._asked.amount, WORD.findall(before)), default=0.0)
        said_now = max(said, self._asked.amount(begun))
        word, new, _ = next_word(begun, self._pieces[int(logits.argmax())])
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
                    more[token] = max(more.get(token, 0.0), self._weight * amount)
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
        for form in WORD.findall(self._words.text):
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


def _words(text: str) -> set[str]:
    return {word.lower() for word in WORD.findall(text)}
