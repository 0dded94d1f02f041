"""Multiple choice inside a question's text: ``(A) ...`` or ``A. ...``, an option a line."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["letter", "options_of", "with_options"]

_OPTION = re.compile(r"(?:^|\n)[ \t]*\(?([A-Z])[).][ \t]*(.*?)(?=\n[ \t]*\(?[A-Z][).]|\Z)", re.DOTALL)


def letter(number: int) -> str:
    """A for 0, B for 1 and so on."""
    return chr(ord("A") + number)


def options_of(question: str) -> list[str]:
    """The texts of the options that stand in a question, in the order of their letters; none where there are none.

    The last run of letters that begins with A and leaves none out counts, so that a line such as ``A. Smith`` in what
    is asked does not.
    """
    found: list[str] = []
    for match in _OPTION.finditer(question):
        if match[1] == "A":
            found = []
        if match[1] == letter(len(found)):
            found.append(match[2].strip())
    return found if len(found) > 1 else []


def with_options(question: str, options: Sequence[str]) -> str:
    """A question with its options written under it."""
    return "\n".join([question, "", *(f" ({letter(number)}) {option}" for number, option in enumerate(options))])
