"""One pass over the questions of a prompt, with gradients: what they share is run once, the memory is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import torch

from lloco_engine.decoder.attention import Cache
from lloco_engine.decoder.local import LocalDecoder, Prompt

if TYPE_CHECKING:
    from lloco_engine.decoder.memory import Memory

__all__ = ["AnswerLogits", "answer_logits"]


@dataclass(frozen=True)
class AnswerLogits:
    """What the decoder expects where gold answers stand, all of them end to end.

    logits  : (A, vocabulary) float32. targets : (A,) int64 token ids. sizes : tokens of each answer; their sum is A.
    tokens  : tokens run, padding included.
    """

    logits: torch.Tensor
    targets: torch.Tensor
    sizes: list[int]
    tokens: int


class _Trail(Cache):
    """Live keys and values that keep their graph: appending makes new tensors, and one row can become many."""

    def __init__(self, decoder: LocalDecoder) -> None:
        shape, runner = decoder.shape, decoder.runner
        super().__init__(shape.layers, 1, shape.kv_heads, shape.head_dim, 0, device=runner.device, dtype=runner.dtype)
        self.capacity = shape.window

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Cache.append`."""
        self.keys[layer] = _longer(self.keys[layer], keys)
        self.values[layer] = _longer(self.values[layer], values)
        return self.keys[layer], self.values[layer]


def _longer(past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    if past.shape[0] != new.shape[0]:
        past = past.expand(new.shape[0], -1, -1, -1)
    return torch.cat((past, new), dim=2)


def answer_logits(
    decoder: LocalDecoder, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]], adapter: str | None
) -> AnswerLogits:
    """Run questions over one prefix or one context, with gradients where they are enabled.

    The template prefix, the context and the words with which all questions begin are run as one row.

    Args:
        decoder: with the adapter among its own.
        prompts: at least one, all with the same prefix object (or none) and the same context.
        answers: token ids of each answer, its end token included.
        adapter: what is trained, or None.
    """
    asked = [decoder.template.question_ids(prompt.question, prompt.context) for prompt in prompts]
    shared = 0
    if len(asked) > 1:
        alike = takewhile(lambda column: len(set(column)) == 1, zip(*asked, strict=False))
        shared = min(sum(1 for _ in alike), min(map(len, asked)) - 1)
    trail = _Trail(decoder)
    template = decoder.template.prefix_ids
    if template:
        decoder._step([template], 0, trail, None, adapter)
    offset = decoder._position(prompts[0]) - trail.length
    memory: Memory | None = decoder._memory(prompts)
    if shared:
        decoder._step([asked[0][:shared]], offset, trail, memory, adapter)
    rows = [ids[shared:] + list(answer) for ids, answer in zip(asked, answers, strict=True)]
    longest = max(map(len, rows))
    filler = decoder.tokenizer.eos_token_id
    padded = [row + [filler] * (longest - len(row)) for row in rows]  # causal: padding at the right is not read
    hidden = decoder._step(padded, offset, trail, memory, adapter)
    place = [
        number * longest + len(ids) - shared - 1 + step
        for number, (ids, answer) in enumerate(zip(asked, answers, strict=True))
        for step in range(len(answer))
    ]
    wanted = hidden.flatten(0, 1).index_select(0, decoder._tensor(place))  # the head serves no other token
    targets = decoder._tensor([token for answer in answers for token in answer])
    tokens = len(template) + shared + len(rows) * longest
    return AnswerLogits(decoder.runner.logits(wanted), targets, [len(answer) for answer in answers], tokens)
