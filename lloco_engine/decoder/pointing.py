"""Which words of the sources a question asks for, as far as its own words say.

What is asked for mostly stands in the sentence that has the question's words, and is none of them. So a word of the
sources counts the more, the more of the question's words its sentence has, and the fewer other sentences have it.
No list of stop words is needed: a word that many sentences have says little about any of them.
"""

from __future__ import annotations

import re
from collections import Counter
from math import log

__all__ = ["WORD", "Asked"]

_JOINTS = r".,:/^·٫٬\-–−\u00a0\u2009\u202f"  # what a number goes on behind, if a digit follows
# A number is one word, with its sign, separators and fraction: 3,320, 12.75, -0.5, 12:30, 2020-01-15, 1e-5 and 1 000.
# A part of it is another number, which the text does not have.
WORD = re.compile(
    r"(?<![\w.,])[-−+]?\d{1,3}(?: \d{3})+(?![\d])(?:[.,]\d+)?"
    r"|(?:(?<![\w.,])(?:[-−+]\.?|\.)(?=\d))?\w+(?:['’]\w+|(?<=\d)["
    + _JOINTS
    + r"](?=\d)\w+|(?<=\d[eE])[-−+](?=\d)\w+)*"
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_SHARPNESS = 3  # a sentence with half of the best one's share of the question counts an eighth as much
_TELLING = 0.6  # rarity from which on a word says something: of 24 sentences at most three have it


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


def _words(text: str) -> set[str]:
    return {word.lower() for word in WORD.findall(text)}
