"""Guessing ahead: tokens that the answer may say next, for the decoder to check several in one step."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Draft"]


class Draft:
    """Guesses the next tokens by looking up the last two in text that the answer may repeat (prompt lookup).

    Three guesses ride along with a decode step at little cost, since a step is bound by reading the weights; the
    decoder keeps a guess only where it is its own greedy choice, so the output does not change. The method is
    prompt lookup decoding (Saxena 2023); here the text looked up is that of the retrieved windows, which is not in
    the prompt, and of the answer so far.
    """

    SIZE = 3

    def __init__(self, ids: Sequence[int] = ()) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, int], int] = {}
        self.extend(ids)

    def extend(self, ids: Sequence[int]) -> None:
        """Add tokens that may come again."""
        for token in ids:
            if len(self._ids) >= 2:
                self._after[(self._ids[-2], self._ids[-1])] = len(self._ids)
            self._ids.append(token)

    def guess(self, last: Sequence[int]) -> list[int]:
        """Up to `SIZE` tokens that followed the last two of ``last`` before; empty when they are new."""
        if len(last) < 2:
            return []
        at = self._after.get((last[-2], last[-1]))
        return [] if at is None else self._ids[at : at + self.SIZE]
