"""Tokens to text, one at a time."""

from __future__ import annotations

from typing import Any

__all__ = ["Detokenizer"]

_HALF = "\ufffd"  # as which the bytes of a character that is not whole are decoded
_WINDOW, _KEPT = 32, 8  # tokens that are decoded together at most, and of these those that come along to the next


class Detokenizer:
    """Tokens in, text out, each character once it is whole. A token costs the same wherever it stands in a text.

    What a token adds depends on those before it (a tokenizer may drop the space that a text begins with, a character
    may be several tokens), but on few of them: so it is decoded with these, and not with the whole text.

    Args:
        tokenizer: the decoder's; special tokens are not shown.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._text = ""  # of the window
        self._given = 0  # characters of it

    def push(self, token: int) -> str:
        """Add a token; returns the text that is whole now and was not before."""
        self._window.append(token)
        self._text = text = self._decode(self._window)
        begin, self._given = self._given, max(self._given, len(text.rstrip(_HALF)))
        new = text[begin : self._given]
        if len(self._window) > _WINDOW and self._given == len(text):
            kept = self._window[-_KEPT:]
            known = self._decode(kept)
            if known and text.endswith(known):  # else what they say hangs on tokens before them
                self._window, self._text, self._given = kept, known, len(known)
        return new

    def rest(self) -> str:
        """The text that is not whole, as it would be shown if no token followed."""
        return self._text[self._given :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))
