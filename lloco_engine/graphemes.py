"""What a reader sees as one character: a letter with its marks, a flag, a family of emoji, a syllable of jamo, CRLF.

Unicode calls it a grapheme cluster (UAX 29), and nothing that is shown, searched or embedded ends within one.
"""

from __future__ import annotations

import regex

__all__ = ["grapheme_end", "grapheme_start"]

_GRAPHEME = regex.compile(r"\X")
_FLAG_LETTERS = range(0x1F1E6, 0x1F200)  # two make a flag
_LONGEST = 256  # code points looked back at: what is longer (a letter under hundreds of marks) may be parted


def grapheme_start(text: str, place: int, lowest: int = 0) -> int:
    """Where the grapheme that ``text[place]`` belongs to starts: ``place`` itself where a cut before it parts none.

    Args:
        text: any text.
        place: 0 to ``len(text)``, at least ``lowest``.
        lowest: where a grapheme is known to start; nothing before it is looked at.
    """
    if not lowest < place < len(text):
        return place
    if text[place - 1 : place + 1].isascii():
        return place - (text[place - 1 : place + 1] == "\r\n")
    start = max(lowest, place - _LONGEST)
    if ord(text[place]) in _FLAG_LETTERS:  # they are paired from the first on, and there may be any number
        first = place
        while first > lowest and ord(text[first - 1]) in _FLAG_LETTERS:
            first -= 1
        if first < place:
            return place - (place - first) % 2
    for found in _GRAPHEME.finditer(text, start, place + 1):
        start = found.start()
    return start


def grapheme_end(text: str, place: int, lowest: int = 0) -> int:
    """The first place from ``place`` on where a cut parts no grapheme; arguments as for `grapheme_start`."""
    start = grapheme_start(text, place, lowest)
    if start == place:
        return place
    found = _GRAPHEME.match(text, start)
    return max(place, found.end()) if found else place
