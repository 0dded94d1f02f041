"""Beam search: of several answers that are followed side by side, the one that is likeliest by token.

Source: Graves 2012 (arXiv 1211.3711), section 2.5, with the length normalisation of Wu et al. 2016 (arXiv 1609.08144)
at power 1 and its end as transformers has it, which also has logits processors work on log probabilities here. Without
a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lloco_engine.decoder.decoding import Ahead, Row

__all__ = ["Beams"]


@dataclass(frozen=True)
class _Beam:
    """Tokens, and the sum of their log probabilities."""

    tokens: tuple[int, ...]
    total: float

    @property
    def score(self) -> float:
        return self.total / max(len(self.tokens), 1)


class Beams:
    """Beam search for one answer, whose text comes whole and at the end.

    Args:
        row: the answer.
        count: how many beams are followed.
        most: tokens of an answer.
    """

    def __init__(self, row: Row, count: int, most: int) -> None:
        self._row, self._count, self._most = row, count, most
        self._running, self._finished = [_Beam((), 0.0)], list[_Beam]()
        self._origins: list[int] = []  # of the beams that run, among those before

    @property
    def ended(self) -> bool:
        return self._row.ended

    def take(self, logits: torch.Tensor) -> Iterator[str]:
        ends, running = self._row.ends, self._running
        chances = self._row.pipeline(torch.log_softmax(logits, dim=-1), [beam.tokens for beam in running])
        totals = chances + chances.new_tensor([beam.total for beam in running])[:, None]
        # so many that enough go on, however many of them end
        best = totals.flatten().topk(min((1 + len(ends)) * self._count, totals.numel()))
        self._running, self._origins = [], []
        for total, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            origin, token = divmod(place, totals.shape[1])
            beam = _Beam((*running[origin].tokens, token), total)
            if token in ends:
                self._finished.append(beam)
            elif len(self._running) < self._count:
                self._running.append(beam)
                self._origins.append(origin)
        if text := self._chosen():
            yield text

    def _chosen(self) -> str:
        """The answer's text, once none that goes on can be likelier; its row is complete then."""
        finished, running = self._finished, self._running
        enough = len(finished) >= self._count and max(beam.score for beam in finished) >= running[0].score
        if not enough and len(running[0].tokens) < self._most:
            return ""
        pieces = []
        for token in max(finished if enough else [*finished, *running], key=lambda beam: beam.score).tokens:
            pieces.append(self._row.take(token))
            if self._row.ended:
                break
        else:
            pieces.append(self._row.end("length"))
        return "".join(pieces)

    def go_on(self, ahead: Ahead) -> torch.Tensor:
        self._row.generation.steps += 1
        ahead.reorder(self._origins)
        return ahead([[beam.tokens[-1]] for beam in self._running])
