"""One pass over the questions of a prompt, with gradients: all of them packed into one row, the memory frozen.

Packed, no token is padding, and what the questions share is run once: a mask keeps each from seeing the others, and
each has the positions that it would have alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch

from lloco_engine.decoder.attention import Cache
from lloco_engine.decoder.local import LocalDecoder, Prompt

__all__ = ["AnswerLogits", "answer_logits"]


@dataclass(frozen=True)
class AnswerLogits:
    """What the decoder expects where gold answers stand, all of them end to end.

    logits  : (A, vocabulary) float32. targets : (A,) int64 token ids. tokens : tokens run.
    """

    logits: torch.Tensor
    targets: torch.Tensor
    tokens: int


class _Trail(Cache):
    """Live keys and values of one row that keep their graph: appending makes new tensors.

    What a pass appends is before the next one: until that begins, a layer can be run again (``recompute``).

    Args:
        decoder: whose.
    """

    def __init__(self, decoder: LocalDecoder) -> None:
        shape, runner = decoder.shape, decoder.runner
        super().__init__(shape.layers, 1, shape.kv_heads, shape.head_dim, 0, device=runner.device, dtype=runner.dtype)
        self.hidden: torch.Tensor | None = None  # (T, S) bool, what the next tokens must not see; None: causality
        self._after = list(zip(self.keys, self.values, strict=True))

    def begin(self, tokens: int) -> torch.Tensor | None:
        """As `Cache.begin`."""
        self.keys, self.values = map(list, zip(*self._after, strict=True))
        if self.hidden is None:
            return None  # only the first tokens are run so
        mask = torch.zeros(self.hidden.shape, device=self.hidden.device, dtype=self.keys[0].dtype)
        return mask.masked_fill_(self.hidden, torch.finfo(mask.dtype).min)[None, None]

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Cache.append`."""
        self._after[layer] = (
            torch.cat((self.keys[layer], keys), dim=2),
            torch.cat((self.values[layer], values), dim=2),
        )
        return self._after[layer]


def answer_logits(
    decoder: LocalDecoder,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[int]],
    adapter: str | None,
    *,
    recompute: bool = False,
    in_bf16: bool = False,
) -> AnswerLogits:
    """Run questions over one prefix or one context, with gradients where they are enabled.

    Args:
        decoder: with the adapter among its own.
        prompts: at least one, all with the same prefix object (or none) and the same context.
        answers: token ids of each answer, its end token included.
        adapter: what is trained, or None.
        recompute: as in `lloco_engine.decoder.runner.Runner.forward`: slower, for less memory.
        in_bf16: as there: run the linear layers in bfloat16.

    Raises:
        PromptTooLong: a prompt with its answer does not fit the window.
    """
    asked = [decoder.prompt_ids(prompt) for prompt in prompts]
    start = decoder.position(prompts[0])
    for ids, answer in zip(asked, answers, strict=True):
        decoder.check_window(start, len(ids), len(answer))
    alike = takewhile(lambda column: len(set(column)) == 1, zip(*asked, strict=False))
    shared = min(sum(1 for _ in alike), min(map(len, asked)) - 1)
    # an answer's last token is only foretold
    rows = [[*ids[shared:], *answer[:-1]] for ids, answer in zip(asked, answers, strict=True)]
    trail, template = _Trail(decoder), decoder.template.prefix_ids
    if template:
        decoder.step([template], 0, trail, None, adapter, in_bf16=in_bf16)
    trail.hidden = _hidden(len(template), shared, [len(row) for row in rows]).to(decoder.runner.device)
    places = [*range(shared), *(shared + place for row in rows for place in range(len(row)))]
    packed = asked[0][:shared] + [token for row in rows for token in row]
    # `step` adds the place in the cache, which packing has moved
    offset = start + decoder.tensor(places) - torch.arange(len(places), device=decoder.runner.device) - len(template)
    memory = decoder.memory([prompt.prefix for prompt in prompts])
    hidden = decoder.step([packed], offset, trail, memory, adapter, recompute=recompute, in_bf16=in_bf16)[0]
    wanted: list[int] = []
    at = shared
    for row, answer in zip(rows, answers, strict=True):
        at += len(row)
        wanted += range(at - len(answer), at)
    targets = decoder.tensor([token for answer in answers for token in answer])
    logits = decoder.runner.logits(hidden.index_select(0, decoder.tensor(wanted)))  # the head serves no other token
    return AnswerLogits(logits, targets, len(template) + len(packed))


def _hidden(template: int, shared: int, rows: Sequence[int]) -> torch.Tensor:
    """(T, S) bool: true where one of the packed tokens must not see one of the template's and the packed ones."""
    owner = torch.tensor([-1] * shared + [number for number, size in enumerate(rows) for _ in range(size)])
    size = len(owner)
    later = torch.ones(size, size, dtype=torch.bool).triu_(1)
    foreign = (owner[None] >= 0) & (owner[None] != owner[:, None])
    return torch.cat((torch.zeros(size, template, dtype=torch.bool), later | foreign), dim=1)
