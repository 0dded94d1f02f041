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

__all__ = ["Pieces", "Speller"]

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_BEGUN = re.compile(r"\w+(?:['’]\w*)*\Z")
_CANDIDATES = 64  # likeliest tokens that are looked at: no other comes near
_TAIL = 12  # tokens that a word has at most


class Pieces:
    """What each token adds to the text before it, decoded once: a step of decoding asks for dozens.

    Args:
        tokenizer: the decoder's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # something stands before it, since some tokenizers drop the space that a text would begin with
        self._before = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        self._length = len(tokenizer.decode(self._before))
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            text = self._tokenizer.decode([*self._before, token], skip_special_tokens=True)
            self._known[token] = text[self._length :]
        return self._known[token]


class Speller:
    """Makes tokens likelier that go on to a word of the sources.

    Args:
        pieces: of the decoder's tokenizer.
        text: of the sources.
        weight: by how much, in nats.
    """

    def __init__(self, pieces: Pieces, text: str, weight: float) -> None:
        self._pieces, self._weight = pieces, weight
        self._words: list[str] = sorted({word.lower() for word in _WORD.findall(text)}) if weight else []

    def spell(self, logits: torch.Tensor, answers: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits (B, vocabulary) of what follows each answer's tokens, as the sources have it; changed in place."""
        for row, answer in enumerate(answers if self._words else ()):
            begun = _BEGUN.search("".join(self._pieces[token] for token in answer[-_TAIL:]))
            if begun and self._goes_on(begun[0].lower()):
                likeliest = torch.topk(logits[row], min(_CANDIDATES, logits.shape[1])).indices.tolist()
                logits[row, [token for token in likeliest if self._fits(begun[0].lower(), token)]] += self._weight
        return logits

    def _fits(self, begun: str, token: int) -> bool:
        """Whether a token adds to the word, and makes it a word of the sources or the beginning of one."""
        text = begun + self._pieces[token].lower()
        added = _WORD.match(text)
        word: str = added[0] if added else ""
        if len(word) <= len(begun):
            return False
        at = bisect_left(self._words, word)
        if at == len(self._words):
            return False
        return self._words[at] == word if len(word) < len(text) else self._words[at].startswith(word)

    def _goes_on(self, begun: str) -> bool:
        """Whether a word of the sources begins so and is longer."""
        at = bisect_left(self._words, begun)
        if at < len(self._words) and self._words[at] == begun:
            at += 1
        return at < len(self._words) and self._words[at].startswith(begun)
