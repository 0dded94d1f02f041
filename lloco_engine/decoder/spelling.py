"""Words that an answer has begun are spelled as the sources spell them.

A compressed segment says well which word is meant, and its last syllables less well: a name of several tokens comes
out as another that begins alike. The sources' text is at hand, since the store has it, though it is not in the prompt.
So where an answer is in the middle of a word that begins as some word of the sources does, the tokens that go on to
such a word are made likelier (docs/decisions/0010). Which word is begun, and every word that the sources do not have,
is left to the decoder.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["Speller"]

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_BEGUN = re.compile(r"\w+(?:['’]\w*)*\Z")
_CANDIDATES = 64  # likeliest tokens that are looked at: no other comes near
_TAIL = 12  # tokens that a word has at most


class Speller:
    """Makes tokens likelier that go on to a word of the sources.

    Args:
        tokenizer: the decoder's.
        text: of the sources.
        weight: by how much, in nats.
    """

    def __init__(self, tokenizer: Any, text: str, weight: float) -> None:
        self._tokenizer, self._weight = tokenizer, weight
        self._words = sorted({word.lower() for word in _WORD.findall(text)})

    def spell(self, logits: torch.Tensor, answers: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits (B, vocabulary) of what follows each answer's tokens, as the sources have it."""
        if not self._words or not self._weight:
            return logits
        for row, answer in enumerate(answers):
            begun = self._begun(answer)
            if begun and (fitting := self._fitting(answer, begun, logits[row])):
                logits[row, fitting] += self._weight
        return logits

    def _begun(self, answer: Sequence[int]) -> str:
        """The word that the answer is in, as far as it is there, where some word of the sources goes on from there."""
        found = _BEGUN.search(self._tokenizer.decode(list(answer[-_TAIL:]), skip_special_tokens=True))
        begun = found[0].lower() if found else ""
        return begun if begun and self._goes_on(begun) else ""

    def _fitting(self, answer: Sequence[int], begun: str, logits: torch.Tensor) -> list[int]:
        likeliest = torch.topk(logits, min(_CANDIDATES, len(logits))).indices.tolist()
        before = self._tokenizer.decode(list(answer[-_TAIL:]), skip_special_tokens=True)
        return [token for token in likeliest if self._fits(before, answer, begun, token)]

    def _fits(self, before: str, answer: Sequence[int], begun: str, token: int) -> bool:
        """Whether a token adds to the word, and makes it a word of the sources or the beginning of one."""
        after = self._tokenizer.decode([*answer[-_TAIL:], token], skip_special_tokens=True)
        added = _WORD.match(begun + after[len(before) :].lower())
        if added is None or len(added[0]) <= len(begun):
            return False
        word, whole = added[0], added.end() == len(begun) + len(after) - len(before)
        at = bisect_left(self._words, word)
        if at == len(self._words):
            return False
        return bool(self._words[at].startswith(word) if whole else self._words[at] == word)

    def _goes_on(self, begun: str) -> bool:
        """Whether a word of the sources begins so and is longer."""
        at = bisect_left(self._words, begun)
        if at < len(self._words) and self._words[at] == begun:
            at += 1
        return at < len(self._words) and self._words[at].startswith(begun)
