"""Decoders that think aloud: what marks their thoughts, and text without them.

Families write their thoughts between markers of their own: ``<think>``, ``[THINK]``, ``<|START_THINKING|>``,
``<seed:think>``. None of them is listed here. A decoder's markers are what its chat template writes around the
reasoning of an answer; else the pair of names in its template or among its added tokens that speaks of thoughts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Markers", "find_markers", "without_thoughts"]

_NAMES = r"(?:think|thought|reason|reflect|scratchpad|analysis)\w*"
_BEFORE, _AFTER = r"[<\[{\u25c1\u27e8\u300a][|\uff5c]?", r"[|\uff5c]?[>\]}\u25b7\u27e9\u300b]"
_SLASHED = re.compile(rf"{_BEFORE}/(?:\w+[:_-])?{_NAMES}{_AFTER}", re.IGNORECASE)
_ENDED = re.compile(rf"{_BEFORE}end(?:[_\u2581-]?of)?[_\u2581-]{_NAMES}{_AFTER}", re.IGNORECASE)
_END = re.compile("end", re.IGNORECASE)


@dataclass(frozen=True)
class Markers:
    """What a decoder writes before and after its thoughts; and ``head``, before an answer without any."""

    begin: str
    end: str
    head: str = ""

    def are_open(self, text: str) -> bool:
        """Whether a text ends inside thoughts."""
        return text.rfind(self.begin) > text.rfind(self.end)

    def without(self, text: str) -> str:
        """A text without its thoughts: neither those that it does not end, nor those that were begun before it."""
        head, ended, rest = text.partition(self.end)
        if ended and self.begin not in head:
            text = rest
        text = re.sub(rf"{re.escape(self.begin)}.*?(?:{re.escape(self.end)}|\Z)\s*", "", text, flags=re.DOTALL)
        return text.lstrip() if ended else text


def find_markers(texts: Iterable[str]) -> Markers | None:
    """The first pair of markers of thoughts that texts hold, by their names; None where they hold none.

    Args:
        texts: contents of added tokens, a chat template's source.
    """
    held = "\0".join(texts)
    for end in _SLASHED.findall(held):
        return Markers(end.replace("/", "", 1), end)
    for end in _ENDED.findall(held):
        words = (word.upper() if end.isupper() else word for word in ("begin", "start"))
        begins = [_END.sub(word, end, count=1) for word in words]
        return Markers(next((begin for begin in begins if begin in held), begins[0]), end)
    return None


def without_thoughts(text: str) -> str:
    """What a model of any family said, without its thoughts."""
    markers = find_markers([text]) or _only_begun(text)
    return text if markers is None else markers.without(text)


def _only_begun(text: str) -> Markers | None:
    """Markers of a text that begins with thoughts and does not end them."""
    found = re.match(rf"\s*({_BEFORE})((?:\w+[:_-])?{_NAMES}{_AFTER})", text, re.IGNORECASE)
    return None if found is None else Markers(found[1] + found[2], f"{found[1]}/{found[2]}")
