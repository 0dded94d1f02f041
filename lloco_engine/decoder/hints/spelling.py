"""Words of an answer are spelled as the sources spell them.

Where an answer is in the middle of a word that begins as some word of the sources does, the tokens that go on to such a
word are made likelier; where it has said a number of theirs, digits that would make another of it are made less likely.
Whether a word is said at all, and all that is grammar, is left to the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lloco_engine.decoder.hints.words import Pieces, SourceWords, next_word

__all__ = ["Spelling"]

_CANDIDATES = 64  # likeliest tokens that are looked at: no other comes near


class Spelling:
    """Makes tokens likelier that go on to a word of the sources. A logits processor.

    Args:
        pieces: of the decoder's tokenizer.
        words: of the sources.
        weight: by how much, in nats, for any word that the answer has begun.
    """

    def __init__(self, pieces: Pieces, words: SourceWords, weight: float) -> None:
        self._pieces, self._words, self._weight = pieces, words, weight

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Logits (B, vocabulary) of what follows each answer's tokens (B, T); changed in place."""
        for row, answer in zip(logits, ids.tolist(), strict=True):
            self._spell(row, answer)
        return logits

    def _spell(self, logits: torch.Tensor, answer: Sequence[int]) -> None:
        begun = self._words.begun(self._pieces.text(answer))
        goes_on, ends = bool(begun) and self._words.goes_on(begun), begun[-1:].isdigit() and self._words.has(begun)
        likeliest = torch.topk(logits, min(_CANDIDATES, len(logits))).indices.tolist() if goes_on or ends else []
        if goes_on:
            logits[[token for token in likeliest if self._fits(begun, token)]] += self._weight
        if ends:
            logits[[token for token in likeliest if self._overdoes(begun, token)]] -= self._weight

    def _fits(self, begun: str, token: int) -> bool:
        """Whether a token adds to the word, and makes it a word of the sources or the beginning of one."""
        word, new, ended = next_word(begun, self._pieces[token])
        if new:  # but for a separator, behind which a number goes on that ends nowhere before
            return not self._words.has(begun) and self._words.starts(begun + self._pieces[token].lower())
        return self._words.has(word) if ended else self._words.starts(word)

    def _overdoes(self, begun: str, token: int) -> bool:
        """Whether a token adds digits to the number, and makes it one that the sources have not."""
        word, new, _ = next_word(begun, self._pieces[token])
        return not new and any(map(str.isdigit, word[len(begun) :])) and not self._fits(begun, token)
