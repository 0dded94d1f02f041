"""How much of a question's words a search window has.

An embedding says what a passage is about, and blurs a name, a number or a code that stands in it once. So the score of
a window is a convex combination of its cosine similarity and of the share of the question's words that it has (Bruch
et al. 2023, An Analysis of Fusion Functions for Hybrid Retrieval), a word weighing the more, the fewer windows have it
(the inverse document frequency of BM25, Robertson and Zaragoza 2009).

What a word is, in any script, is said here and nowhere else: documents and questions go through `words`.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import regex

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows = npt.NDArray[np.int64]
    Shares = npt.NDArray[np.float64]

__all__ = ["MOST", "coverage", "words"]

MOST = 128  # words of a question that count: a pasted page is searched by its beginning
_LETTER = r"[\p{L}\p{M}\p{N}]"  # a mark is part of its word: Hindi writes vowels with them
# Scripts that put no space between words, and Hangul, which writes particles onto them. LB=SA is "complex context" in
# Unicode's rules for line breaks: Thai, Lao, Khmer, Myanmar and their like.
_UNSPACED = r"[[\p{scx=Hani}\p{scx=Hira}\p{scx=Kana}\p{scx=Bopo}\p{scx=Hang}\p{LB=SA}]&&[\p{L}\p{M}\p{N}]]"
_ASCII_WORD = re.compile(r"[a-z0-9]+")
_SIGN = regex.compile(r"[^\x00-\x7f\p{L}\p{M}\p{N}\p{DI}]+")  # before folding: a trade mark sign is not the letters tm
_PIECE = regex.compile(rf"(?V1)(?P<unspaced>(?:{_UNSPACED}\p{{M}}*+)++)|[{_LETTER}--{_UNSPACED}]++")
_CHARACTER = regex.compile(r".\p{M}*")
_BETWEEN_WORDS = regex.compile(r"(?<!\p{LB=SA})\u200b|\u200b(?!\p{LB=SA})")  # a zero-width space; Thai may leave it out
_UNSEEN = regex.compile(r"\p{DI}+")  # soft hyphens, joiners, marks of direction, variation selectors
_TOO_MANY_MARKS = regex.compile(r"(?<=\p{M}{30})\p{M}+")  # putting them in order takes the square of their number
_OPTIONAL = (
    (regex.compile(r"([\p{Latin}\p{Greek}])\p{M}+"), r"\1"),  # accents, as people leave them out: café, cafe
    (regex.compile(r"([\p{Arabic}\p{Hebrew}\p{Syriac}])\p{M}+"), r"\1"),  # vowels, and hamza on a letter
    (regex.compile(r"(\p{Cyrillic})\u0301|\u0435\u0308"), lambda found: found[1] or "\u0435"),  # stress; yo as ye
)
_DIGIT = regex.compile(r"[\p{Nd}--0-9]", regex.V1)
_ALIKE = str.maketrans({"\u0640": None, "ı": "i", "ی": "ي", "ى": "ي", "ک": "ك"})  # no tatweel; Persian yeh and kaf


def words(text: str) -> list[str]:
    """The distinct words of a text, in order: runs of letters, marks and digits, folded.

    Where a script puts no space between words, every two characters that follow each other count as a word, and one
    that stands alone: no dictionary knows all names, and both sides of a search are cut alike. Folded are case, width
    and other compatibility forms (NFKC), digits of any script (to 0-9), and what writers leave out: accents of Latin
    and Greek letters, vowel signs of Arabic and Hebrew. Marks of other scripts stay.
    """
    if not text.isascii():
        text = _SIGN.sub(" ", text)
    return list(dict.fromkeys(_ASCII_WORD.findall(text.lower()) if text.isascii() else _pieces(text)))


def _pieces(text: str) -> Iterator[str]:
    for piece in _PIECE.finditer(_folded(_UNSEEN.sub("", _BETWEEN_WORDS.sub(" ", text)))):
        characters = _CHARACTER.findall(piece[0]) if piece["unspaced"] else [piece[0]]
        if len(characters) == 1:
            yield piece[0]
        for first, second in pairwise(characters):
            yield first + second


def _folded(text: str) -> str:
    text = unicodedata.normalize("NFKD", _TOO_MANY_MARKS.sub("", text)).casefold()
    text = unicodedata.normalize("NFKD", text)
    for marks, letter in _OPTIONAL:
        text = marks.sub(letter, text)
    text = text.translate(_ALIKE)
    text = _DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0], digit[0])), text)
    return unicodedata.normalize("NFC", text)


def coverage(found: Sequence[Rows], searched: int, held: int) -> Shares | None:
    """The share of a question's words that windows have.

    Args:
        found: for each word of the question, the rows of the windows that have it, each once.
        searched: how many windows are searched.
        held: how many rows there are.

    Returns:
        (held,) the share of each row, from 0 to 1; None when no word tells windows apart: one that more than a
        quarter of those searched have does not count.
    """
    import numpy as np

    telling = [rows for rows in found if len(rows) <= searched / 4]
    if not telling:
        return None
    shares, total = np.zeros(held), 0.0
    for rows in telling:
        weight = math.log1p((searched - len(rows) + 0.5) / (len(rows) + 0.5))
        shares[rows] += weight
        total += weight
    shares /= total
    return shares
