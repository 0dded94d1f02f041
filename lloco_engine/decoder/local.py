"""A decoder that runs in this process on torch: prefixes and questions in, tokens out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, Self, TypeVar

import torch

from lloco_engine import fingerprints, models
from lloco_engine.config import GenerateConfig
from lloco_engine.decoder import cpu_kernel
from lloco_engine.decoder.adapted import AdaptedDecoder
from lloco_engine.decoder.attention import Cache
from lloco_engine.decoder.batching import Stream
from lloco_engine.decoder.beams import Beams
from lloco_engine.decoder.decoding import Row, Rows, decode, draw, greedy
from lloco_engine.decoder.drafting import Draft
from lloco_engine.decoder.hints import Pieces, hints
from lloco_engine.decoder.memory import Memory
from lloco_engine.decoder.processors import Pipeline, processors
from lloco_engine.decoder.prompt import Generation, Prompt
from lloco_engine.decoder.template import Template
from lloco_engine.tokenizing import encode

__all__ = ["Generation", "LocalDecoder", "Prompt"]

T = TypeVar("T")


class LocalDecoder(AdaptedDecoder):
    """A decoder that answers prompts and scores answers: one text by text, or several together.

    Args:
        model, tokenizer, name, template: as in `lloco_engine.decoder.adapted.AdaptedDecoder`.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "", template: str | Template | None = None) -> None:
        super().__init__(model, tokenizer, name, template)
        self._pieces = Pieces(tokenizer)

    @classmethod
    def load(
        cls,
        name: str = models.DEFAULT_DECODER,
        *,
        device: str | None = None,
        dtype: str | None = None,
        template: str | Template | None = None,
    ) -> Self:
        """Load a decoder by local folder, hub id or ``"embedded"``.

        Raises:
            ModelNotFound: nothing is there; the message says which command to run.
            UnsupportedModel: the family cannot be run.
        """
        model, tokenizer = models.load_causal_lm(name, device=device, dtype=dtype), models.load_tokenizer(name)
        decoder = cls(model, tokenizer, name, template)
        decoder.fingerprint = fingerprints.model_fingerprint(models.decoder_folder(name))
        return decoder

    # -- generation -------------------------------------------------------------------------------------------

    def warm(self) -> None:
        """See `AnsweringDecoder.warm`."""
        cpu_kernel.warm(self.runner.device, self.runner.dtype)

    def _answer(
        self, prompt: Prompt, ids: list[int], config: GenerateConfig, adapter: str | None, generation: Generation
    ) -> Iterator[str]:
        return self._run([prompt], [ids], config, adapter, [generation])

    def generate(
        self, prompts: Sequence[Prompt], config: GenerateConfig | None = None, adapter: str | None = None
    ) -> list[Generation]:
        """Answer several questions together, one row each; rows of different lengths are padded at the left.

        Raises:
            PromptTooLong: any of them does not fit; nothing is run.
        """
        config = config or GenerateConfig()
        asked = [self._checked_ids(prompt, config) for prompt in prompts]
        generations = [Generation(prompt_tokens=len(ids)) for ids in asked]
        groups = _by_embeddings(prompts) if config.beams == 1 else [[number] for number in range(len(prompts))]
        for group in groups:
            some, ids = [prompts[number] for number in group], [asked[number] for number in group]
            for _ in self._run(some, ids, config, adapter, [generations[number] for number in group]):
                pass
        return generations

    @torch.inference_mode()
    def _run(
        self,
        prompts: Sequence[Prompt],
        asked: Sequence[list[int]],
        config: GenerateConfig,
        adapter: str | None,
        generations: Sequence[Generation],
    ) -> Iterator[str]:
        """Fill generations: the prompts are read together, and then decoded as the configuration says."""
        began = time.perf_counter()
        budgets = [self._budget(self.position(p) + len(ids), config) for p, ids in zip(prompts, asked, strict=True)]
        each = zip(prompts, generations, budgets, strict=True)
        rows = [self._row(prompt, config, generation, budget, began) for prompt, generation, budget in each]
        longest = max(map(len, asked))
        pad = [longest - len(ids) for ids in asked]
        most = self._least(config) + max(budgets) + Draft.SIZE
        memory = self.memory([prompt.prefix for prompt in prompts])
        cache = self.start_cache(
            len(rows), longest + (most if config.beams == 1 else 0), adapter, pad, prompts[0].prefix
        )
        # positions follow from where each row's own text starts, not from where it lies in the padded cache
        starts = [self.position(p) - cache.length - n for p, n in zip(prompts, pad, strict=True)]
        offset = starts[0] if len(starts) == 1 else self.tensor(starts)[:, None]
        filler = min(self.eos, default=0)  # never read
        padded = [[filler] * n + ids for n, ids in zip(pad, asked, strict=True)]
        logits = self._read(padded, offset, cache, memory, adapter)
        if config.beams > 1:
            most = config.max_new_tokens + budgets[0]
            spread = self.spread(cache, config.beams, most)
            ahead = _Ahead(self, spread, memory, adapter, offset, shared=cache.length)
            yield from decode(Beams(rows[0], config.beams, most), logits, ahead)
        else:
            strategy = Rows(rows, self._choice(config), self._draft(prompts, config))
            if len(rows) > 1 or self.replays:
                yield from decode(strategy, logits, _Ahead(self, cache, memory, adapter, offset))
            else:
                with closing(Stream(self._batching, cache, memory, adapter, starts[0])) as stream:
                    yield from decode(strategy, logits, stream)

    def _read(
        self,
        tokens: Sequence[list[int]],
        offset: int | torch.Tensor,
        cache: Cache,
        memory: Memory | None,
        adapter: str | None,
    ) -> torch.Tensor:
        """Logits (B, vocabulary) after prompts (B, T), which are read in pieces where others wait for their steps."""
        begin, end = 0, len(tokens[0])
        while True:
            with self._batching.turn(end - begin) as most:
                piece = slice(begin, begin + most)
                hidden = self.step([row[piece] for row in tokens], offset, cache, memory, adapter, wanted=1)
            if (begin := piece.stop) >= end:
                return self.runner.logits(hidden[:, -1])

    def _choice(self, config: GenerateConfig) -> Callable[[torch.Tensor], torch.Tensor]:
        if config.temperature == 0:
            return greedy
        seed = config.seed
        return draw(None if seed is None else torch.Generator(device=self.runner.device).manual_seed(seed))

    def _draft(self, prompts: Sequence[Prompt], config: GenerateConfig) -> Callable[[], Draft] | None:
        """Makes what guesses ahead for one answer that is greedy; steps that are replayed cost less than guesses."""
        if len(prompts) > 1 or not config.lookup or config.temperature or self.replays:
            return None
        return lambda: Draft(encode(self.tokenizer, prompts[0].draft))

    def _row(self, prompt: Prompt, config: GenerateConfig, generation: Generation, budget: int, began: float) -> Row:
        own = hints(config.hint_weights, self._pieces, prompt.draft, prompt.question)
        generation.hints = tuple(own)
        pipeline = Pipeline([*own.values(), *processors(config, self.eos, self.runner.device)])
        return Row(generation, self._text(config, budget), pipeline, config.max_new_tokens, self.eos, began)

    # -- scoring ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def answer_losses(
        self, prompts: Sequence[Prompt], answers: Sequence[str], adapter: str | None = None
    ) -> list[tuple[float, int]]:
        """Negative log-likelihood of gold answers, each ended by the decoder's end token.

        Prompts that share one prefix object (or one context) are run as rows over that one memory.

        Returns:
            per prompt, the sum over the answer's tokens in nats and the number of those tokens.

        Raises:
            PromptTooLong: a prompt with its answer does not fit the window.
        """
        groups = _by_embeddings(prompts)
        if len(groups) != 1:
            parts = [([prompts[n] for n in group], [answers[n] for n in group]) for group in groups]
            return _regrouped(groups, [self.answer_losses(*part, adapter) for part in parts])
        end = self.end
        asked = [self.prompt_ids(prompt) for prompt in prompts]
        gold = [[*encode(self.tokenizer, answer), end] for answer in answers]
        for prompt, ids, answer in zip(prompts, asked, gold, strict=True):
            self.check_window(self.position(prompt), len(ids), len(answer))
        longest = max(len(ids) + len(answer) for ids, answer in zip(asked, gold, strict=True))
        rows = [ids + answer for ids, answer in zip(asked, gold, strict=True)]
        memory = self.memory([prompt.prefix for prompt in prompts])
        cache = self.start_cache(len(rows), longest, adapter, prefix=prompts[0].prefix)
        offset = self.tensor([self.position(prompt) - cache.length for prompt in prompts])
        padded = [row + [end] * (longest - len(row)) for row in rows]  # causal: padding at the right is not read
        hidden = self.step(padded, offset[:, None], cache, memory, adapter)
        losses = []
        for row, ids, answer in zip(hidden, asked, gold, strict=True):
            logits = self.runner.logits(row[len(ids) - 1 : len(ids) + len(answer) - 1])
            loss = torch.nn.functional.cross_entropy(logits, self.tensor(answer), reduction="sum")
            losses.append((float(loss), len(answer)))
        return losses


class _Ahead:
    """A decoder that has read prompts, as a strategy runs it on; see `lloco_engine.decoder.decoding.Ahead`.

    Args:
        decoder: runs.
        cache: of what it has read.
        memory: of the segments.
        adapter: that it reads with.
        offset: of positions beyond places in the cache.
        shared: places at the cache's beginning that all rows have in common, where they are beams.
    """

    def __init__(
        self,
        decoder: LocalDecoder,
        cache: Cache,
        memory: Memory | None,
        adapter: str | None,
        offset: int | torch.Tensor,
        shared: int = 0,
    ) -> None:
        self._decoder, self._cache, self._shared = decoder, cache, shared
        self._read = partial(decoder.step, offset=offset, cache=cache, memory=memory, adapter=adapter)
        # beams are reordered, so that they cannot be replayed
        self._step = None if shared else decoder.stepper(cache, memory, adapter, offset)

    def __call__(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        if self._step is not None and all(len(row) == 1 for row in tokens):
            return self._step([row[0] for row in tokens])
        hidden = self._read([list(row) for row in tokens])
        return self._decoder.runner.logits(hidden[:, -1] if self._shared else hidden[0])

    def forget(self, tokens: int) -> None:
        self._cache.length -= tokens

    @property
    def crowded(self) -> bool:
        return False

    def reorder(self, origins: Sequence[int]) -> None:
        self._cache.reorder(self._decoder.tensor(origins), self._shared)


def _by_embeddings(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Numbers of the prompts that can be run together: those that read the same embeddings; those that read none."""
    groups: dict[int | None, list[int]] = {}
    for number, prompt in enumerate(prompts):
        read = None if prompt.prefix is None else prompt.prefix.embeddings
        groups.setdefault(None if read is None else id(read), []).append(number)
    return list(groups.values())


def _regrouped(groups: Sequence[Sequence[int]], results: Sequence[Sequence[T]]) -> list[T]:
    """Results by group, in the order of the prompts."""
    made: dict[int, T] = {}
    for group, part in zip(groups, results, strict=True):
        made |= zip(group, part, strict=True)
    return [made[number] for number in sorted(made)]
