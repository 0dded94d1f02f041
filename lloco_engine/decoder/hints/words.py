"""The words of the sources, and what of them an answer's tokens begin."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import dropwhile
from typing import Any

from lloco_engine.tokenizing import encode

__all__ = ["WORD", "Pieces", "SourceWords", "next_word"]

_JOINTS = r".,:/^·٫٬\-–−\u00a0\u2009\u202f"  # what a number goes on behind, if a digit follows
# A number is one word, with its sign, separators and fraction: 3,320, 12.75, -0.5, 12:30, 2020-01-15, 1e-5 and 1 000.
# A part of it is another number, which the text does not have.
WORD = re.compile(
    r"(?<![\w.,])[-−+]?\d{1,3}(?: \d{3})+(?![\d])(?:[.,]\d+)?"
    r"|(?:(?<![\w.,])(?:[-−+]\.?|\.)(?=\d))?\w+(?:['’]\w+|(?<=\d)["
    + _JOINTS
    + r"](?=\d)\w+|(?<=\d[eE])[-−+](?=\d)\w+)*"
)
_TAIL = 80  # characters at the end of an answer in which the word that it is in the middle of begins
_GROUPS = re.compile(r"(?<![\w.,])[-−+]?\d{1,3}(?: \d{3})* \d{0,3}\Z")  # 1 000, as far as it is written


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

    def text(self, tokens: Iterable[int]) -> str:
        """An answer's tokens as text in lower case."""
        return "".join(self[token] for token in tokens).lower()

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


class SourceWords:
    """The words of the sources in lower case, sorted.

    Args:
        text: of the sources.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._words = sorted({word.lower() for word in WORD.findall(text)})

    def begun(self, text: str) -> str:
        """The word that an answer in lower case ends in the middle of.

        A separator at the end belongs to it where the sources have a number, or another word, that goes on so.
        """
        text = text[-_TAIL:]
        groups = _GROUPS.search(text)
        if groups and self.starts(groups[0]):
            return groups[0]
        last = next(reversed(list(WORD.finditer(text))), None)
        if last and last.end() == len(text):
            return last[0]
        longer = text[last.start() :] if last and last.end() == len(text) - 1 else text[-1:]
        return longer if longer.strip() and self.starts(longer) else ""

    def has(self, word: str) -> bool:
        """Whether the sources have this word as it is."""
        at = bisect_left(self._words, word)
        return at < len(self._words) and self._words[at] == word

    def starts(self, text: str) -> bool:
        """Whether a word of the sources is this or begins so."""
        at = bisect_left(self._words, text)
        return at < len(self._words) and self._words[at].startswith(text)

    def goes_on(self, begun: str) -> bool:
        """Whether a word of the sources begins so and is longer."""
        at = bisect_left(self._words, begun)
        if at < len(self._words) and self._words[at] == begun:
            at += 1
        return at < len(self._words) and self._words[at].startswith(begun)


def next_word(begun: str, piece: str) -> tuple[str, bool, bool]:
    """The word that a piece goes on to, or none; whether it is not the one begun; whether it ends there."""
    piece = piece.lower()
    if begun and (longer := WORD.match(begun + piece)) and len(longer[0]) > len(begun):
        return longer[0], False, len(longer[0]) < len(begun + piece)
    other = WORD.match(piece.lstrip())
    return (other[0], True, len(other[0]) < len(piece.lstrip())) if other else ("", True, False)
