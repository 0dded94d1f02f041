"""How a handle is written into a prompt, and how text that merely looks like one is made harmless.

A handle is ``[[LLC:<32 hex>]]``, or ``[[LLC:<32 hex>:<version>:<expiry>:<slots>:<16 hex>:<score>:<32 hex>]]`` in its
signed form: ASCII, without white space and without any of ``,.;{}<>&"'\\|``, so templates, splitters and escapers
keep it whole.
"""

from __future__ import annotations

import re

__all__ = ["SENTINEL", "Neutraliser", "heads", "neutralise", "runs", "write"]

SENTINEL = re.compile(
    r"\[\[LLC:([0-9a-f]{32}(?::[0-9a-f]{1,8}:[0-9a-f]{8,10}:[0-9a-f]{1,4}:[0-9a-f]{16}:[0-9a-f]{1,3}:[0-9a-f]{32})?)\]\]"
)

_RUN = re.compile(r"[0-9a-fA-F]{12,}")
_MOST = 160  # characters of the longest text that is read as one mark
# anything that opens like a handle, whatever its case and white space, and the digits that go with it
_MARK = re.compile(r"\[\s?\[\s?LLC\s?:(?:\s?[0-9a-f][0-9a-f:]{0,120}(?:\s?\]){0,2})?", re.IGNORECASE)
# what could still become one when more text comes
_BEGUN = re.compile(
    r"\[(?:\s?(?:\[(?:\s?(?:L(?:L(?:C(?:\s?(?::(?:\s?(?:[0-9a-f][0-9a-f:]{0,120}(?:\s?(?:\]\s?)?)?)?)?)?)?)?)?)?)?)?)?\Z",
    re.IGNORECASE,
)
_HEAD = re.compile(r"\[\s?\[\s?LLC\s?:\s?([0-9a-f]{3,})", re.IGNORECASE)


def write(body: str) -> str:
    """The sentinel of a handle's body."""
    return f"[[LLC:{body}]]"


def neutralise(text: str) -> str:
    """Untrusted text in which nothing reads as a handle, or as a part of one, any more."""
    return _MARK.sub(lambda found: "(LLC:" if found[0].endswith(":") else "(LLC)", text)


def heads(text: str) -> set[str]:
    """Lower-case hex digits, at least three, that stand where a handle's first would."""
    return {digits.lower() for digits in _HEAD.findall(text)}


def runs(text: str) -> set[str]:
    """Lower-case runs of hex digits so long that they are part of a live handle only if they were taken from it."""
    return {digits.lower() for digits in _RUN.findall(text)}


class Neutraliser:
    """`neutralise` for text that comes in pieces: what was pushed and finished is the neutralised whole."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that is certain after one more piece; what may be the start of a handle is held back."""
        text = self._held + piece
        begun = _BEGUN.search(text, max(0, len(text) - _MOST))
        at = begun.start() if begun else len(text)
        self._held = text[at:]
        return neutralise(text[:at])

    def finish(self) -> str:
        """What was held back, when no more comes."""
        held, self._held = self._held, ""
        return neutralise(held)
