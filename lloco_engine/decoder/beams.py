"""Beam search: of several answers that are followed side by side, the one that is likeliest by token.

Source: Graves 2012 (arXiv 1211.3711), section 2.5, with the length normalisation of Wu et al. 2016 (arXiv 1609.08144)
at power 1 and its end as transformers has it. Without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from lloco_engine.config import GenerateConfig
from lloco_engine.decoder.generation import forbid

__all__ = ["Step", "search"]

# tokens that the beams go on with, and of each the number of the beam it goes on from, in; logits (B, vocabulary) out
Step = Callable[[Sequence[int], Sequence[int]], torch.Tensor]


@dataclass(frozen=True)
class _Beam:
    """Tokens, and the sum of their log probabilities."""

    tokens: tuple[int, ...]
    total: float

    @property
    def score(self) -> float:
        return self.total / max(len(self.tokens), 1)


def search(first: torch.Tensor, step: Step, config: GenerateConfig, ends: Collection[int]) -> list[int]:
    """An answer's tokens, with the end token where it ended by itself.

    Args:
        first: logits (1, vocabulary) of the first token.
        step: runs the beams one token on; always ``config.beams`` of them.
        config: how many beams, how long an answer may and must be, what it may not repeat.
        ends: tokens that end an answer.
    """
    running, ended = [_Beam((), 0.0)], list[_Beam]()
    logits = first
    for _ in range(config.max_new_tokens):
        chances = forbid(torch.log_softmax(logits, dim=-1), [beam.tokens for beam in running], config, ends)
        totals = chances + chances.new_tensor([beam.total for beam in running])[:, None]
        # so many that enough go on, however many of them end
        best = totals.flatten().topk(min((1 + len(ends)) * config.beams, totals.numel()))
        following: list[tuple[int, _Beam]] = []
        for total, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            origin, token = divmod(place, totals.shape[1])
            beam = _Beam((*running[origin].tokens, token), total)
            if token in ends:
                ended.append(beam)
            elif len(following) < config.beams:
                following.append((origin, beam))
        running = [beam for _, beam in following]
        if len(ended) >= config.beams and max(beam.score for beam in ended) >= running[0].score:
            return list(max(ended, key=lambda beam: beam.score).tokens)
        if len(running[0].tokens) < config.max_new_tokens:
            logits = step([beam.tokens[-1] for beam in running], [origin for origin, _ in following])
    return list(max([*ended, *running], key=lambda beam: beam.score).tokens)
