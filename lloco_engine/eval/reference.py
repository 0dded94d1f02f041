"""Decode speed beside transformers' own ``generate``: same weights, same prompt with its text in context, greedy."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean, median
from typing import TYPE_CHECKING, Any

import torch

from lloco_engine.compress import registry
from lloco_engine.config import GenerateConfig
from lloco_engine.decoder.attention import kernels
from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.eval.corpus import source_texts
from lloco_engine.models import quiet
from lloco_engine.tokenizing import encode
from lloco_engine.types import Prefix

if TYPE_CHECKING:
    from lloco_engine.eval.progress import Report

__all__ = ["against_transformers"]

_REQUESTS = (
    "Summarise the text above.",
    "List the most important facts in the text above.",
    "What is the text above about, and who is named in it?",
    "Explain the text above to somebody who has not read it.",
)


@dataclass(frozen=True)
class _Decoded:
    """Tokens without the end token, tokens a second after the first one, and passes that took."""

    token_ids: tuple[int, ...]
    tokens_per_s: float
    passes: int


def against_transformers(
    decoder: LocalDecoder, *, context_tokens: int, new_tokens: int, repeats: int, progress: Report
) -> dict[str, Any]:
    """Answer a few requests with both, in turn.

    Args:
        decoder: reads the text as an uncompressed segment, looking tokens up in it; its weights are transformers' too.
        context_tokens: of text in each prompt.
        new_tokens: most tokens of an answer.
        repeats: of each request; the median counts.
        progress: is told what is done.

    Returns:
        ``ratio`` is our tokens a second over transformers', and None where ``equal`` is false: then an answer differs.
        It is the geometric mean over the prompts, which differ in how many guesses are kept, of the median of each
        one's pairs. ``ratio_without_lookup`` is of one pass for each token. ``prompts`` has each.
    """
    texts = source_texts()
    rows: list[dict[str, Any]] = []
    ratios: list[tuple[float, float]] = []
    for number, request in enumerate(_REQUESTS):
        progress("beside transformers' generate", number, len(_REQUESTS))
        ids = encode(decoder.tokenizer, texts[number % len(texts)])[:context_tokens]
        runs = _runs(decoder, ids, request, new_tokens, repeats)
        theirs, ours, plain = runs[0]
        rows.append(
            {
                "request": request,
                "prompt_tokens": decoder.template_tokens + len(ids) + len(decoder.template.question_ids(request)),
                "tokens": len(theirs.token_ids),
                "equal": theirs.token_ids == ours.token_ids == plain.token_ids,
                "passes": ours.passes,
                "transformers_tokens_per_s": median(run[0].tokens_per_s for run in runs),
                "tokens_per_s": median(run[1].tokens_per_s for run in runs),
                "tokens_per_s_without_lookup": median(run[2].tokens_per_s for run in runs),
            }
        )
        if len(theirs.token_ids) > 1:  # an answer of one token says nothing of the speed after the first
            with_lookup = median(b.tokens_per_s / a.tokens_per_s for a, b, _ in runs)
            ratios.append((with_lookup, median(c.tokens_per_s / a.tokens_per_s for a, _, c in runs)))
    equal = all(row["equal"] for row in rows)
    return {
        "ratio": geometric_mean(ratio for ratio, _ in ratios) if equal and ratios else None,
        "ratio_without_lookup": geometric_mean(ratio for _, ratio in ratios) if equal and ratios else None,
        "equal": equal,
        "repeats": repeats,
        "prompts": rows,
    }


def _runs(
    decoder: LocalDecoder, ids: list[int], request: str, new_tokens: int, repeats: int
) -> list[tuple[_Decoded, _Decoded, _Decoded]]:
    """Transformers, ours, and ours without lookup, in turn."""
    segment = registry.get("uncompressed").compress(decoder, ids, [1])[0]
    prefix = Prefix((segment,), (0,), decoder.template_tokens + len(ids))
    draft = decoder.tokenizer.decode(ids)
    return [
        (
            _transformers(decoder, ids, request, new_tokens),
            _ours(decoder, prefix, request, new_tokens, draft, lookup=True),
            _ours(decoder, prefix, request, new_tokens, "", lookup=False),
        )
        for _ in range(repeats)
    ]


def _ours(
    decoder: LocalDecoder, prefix: Prefix, request: str, new_tokens: int, draft: str, *, lookup: bool
) -> _Decoded:
    generation, text = decoder.stream(Prompt(request, prefix, draft=draft), GenerateConfig(new_tokens, lookup=lookup))
    for _ in text:
        pass
    count = len(generation.token_ids) + (generation.finish == "stop")  # the end token was decoded too
    speed = (count - 1) / generation.decode_s if generation.decode_s else 0.0
    return _Decoded(tuple(generation.token_ids), speed, generation.steps)


class _Clock:
    """A streamer for transformers that only notes when tokens come; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Called with the prompt, then with each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last token."""


def _transformers(decoder: LocalDecoder, ids: Sequence[int], request: str, new_tokens: int) -> _Decoded:
    prompt = [*decoder.template.prefix_ids, *ids, *decoder.template.question_ids(request)]
    given = torch.tensor([prompt], device=decoder.runner.device)
    clock = _Clock()
    model: Any = decoder.runner.model
    with quiet(), torch.inference_mode(), kernels(given.device):  # ours may use no others
        out = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=sorted(decoder.eos),
            pad_token_id=decoder.tokenizer.eos_token_id,
            streamer=clock,
        )
    made = out[0, len(prompt) :].tolist()
    decode_s = clock.times[-1] - clock.times[1]
    speed = (len(made) - 1) / decode_s if decode_s else 0.0
    return _Decoded(tuple(token for token in made if token not in decoder.eos), speed, len(made) - 1)
