"""What a format's reader gives, and what is left out of every text."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lloco_engine.errors import DocumentError
from lloco_engine.types import Page

__all__ = ["TAKEN", "Parsed", "check_length", "visible"]

TAKEN = b"taken\n"  # what a process that reads files says when it has one

# A flag of a region is a black flag and letters in tag characters; alone they are text that no one sees.
_TAGS = re.compile("(\U0001f3f4[\U000e0020-\U000e007e]{1,8}\U000e007f)|[\U000e0000-\U000e007f]")


@dataclass(frozen=True)
class Parsed:
    """A file's text and title; ``encoding`` of what is text, ``pages`` of what has pages, in order."""

    title: str
    text: str
    encoding: str = ""
    pages: tuple[Page, ...] = ()


def visible(text: str) -> str:
    """A text without Unicode's tag characters, which no one sees and some models read."""
    return _TAGS.sub(r"\1", text) if not text.isascii() and max(text) >= "\U000e0000" else text


def check_length(size: int | str, most: int) -> None:
    """Refuse a text of more than ``most`` bytes of UTF-8; ``size`` is the text, or how long it is already."""
    if isinstance(size, str):
        size = len(size) if 4 * len(size) <= most else len(size.encode("utf-8", "surrogatepass"))
    if size > most:
        raise DocumentError(
            f"a document must have at most {most:,} bytes of text, and this one has {size:,} or more; split it, or "
            "raise max_text"
        )
