"""What becomes of the logits before a token is chosen: a pipeline of logits processors, as transformers has them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lloco_engine.config import GenerateConfig

__all__ = ["Pipeline", "Processor", "processors"]

# token ids (1, T) of the answer so far, which may be none, and logits (1, vocabulary) in; logits out
Processor = Callable[[Any, torch.Tensor], torch.Tensor]


def processors(config: GenerateConfig, ends: Collection[int], device: torch.device | None = None) -> list[Processor]:
    """What a configuration asks for, in the order that transformers has: none where a step is greedy and free.

    Args:
        config: how tokens are chosen. Only the answer's own tokens count for what may not come again.
        ends: tokens that end an answer.
        device: of the logits.
    """
    made: list[Processor] = []
    if config.repetition_penalty != 1:
        made.append(RepetitionPenaltyLogitsProcessor(float(config.repetition_penalty)))
    if config.no_repeat_ngram:
        made.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram))
    if config.min_new_tokens and ends:
        ending = torch.tensor(sorted(ends), device=device)
        made.append(MinNewTokensLengthLogitsProcessor(0, config.min_new_tokens, ending))
    if config.temperature:
        if config.temperature != 1:
            made.append(TemperatureLogitsWarper(float(config.temperature)))
        if config.sample_top_k:
            made.append(TopKLogitsWarper(config.sample_top_k))
        if config.top_p < 1:
            made.append(TopPLogitsWarper(config.top_p))
    return made


class Pipeline:
    """Logits processors one after another.

    Args:
        processors: transformers' or others of their kind; each may change the logits that it is given.
    """

    def __init__(self, processors: Sequence[Processor]) -> None:
        self._processors = tuple(processors)

    def __bool__(self) -> bool:
        return bool(self._processors)

    def __call__(self, logits: torch.Tensor, answers: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits (B, vocabulary) of what may follow each answer's tokens; the given ones stay as they are.

        Answers may differ in length, so each is a row of its own.
        """
        if not self._processors:
            return logits
        return torch.cat([self._row(row, answer) for row, answer in zip(logits, answers, strict=True)])

    def _row(self, logits: torch.Tensor, answer: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor([list(answer)], dtype=torch.int64, device=logits.device)
        row = logits[None].clone()
        for process in self._processors:
            row = process(ids, row)
        return row
