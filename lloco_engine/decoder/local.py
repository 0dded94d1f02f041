"""A decoder that runs in this process on torch: prefixes and questions in, tokens out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Self, TypeVar

import torch

from lloco_engine import fingerprints, models
from lloco_engine.config import GenerateConfig
from lloco_engine.decoder.adapted import AdaptedDecoder
from lloco_engine.decoder.beams import search
from lloco_engine.decoder.generation import Draft, Generation, Prompt, TextStream, choose
from lloco_engine.decoder.spelling import Pieces, Speller
from lloco_engine.decoder.template import Template
from lloco_engine.decoder.thoughts import Thoughts
from lloco_engine.errors import PromptTooLong
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
        self._thoughts = Thoughts.of(tokenizer, self.template)

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

    def check_window(self, start: int, tokens: int, new: int) -> None:
        """Raise `PromptTooLong` unless ``tokens`` of text from position ``start`` and ``new`` of an answer fit."""
        if start + tokens + new > self.shape.window:
            raise PromptTooLong(
                f"positions of the prompt and the answer must fit the decoder's window of {self.shape.window}: text "
                f"starts at {start}, the prompt has {tokens} tokens and the answer may have {new}, "
                f"{start + tokens + new} in all; shorten the question or lower max_new_tokens"
            )

    def position(self, prompt: Prompt) -> int:
        """Where a prompt's text starts."""
        return self.template_tokens if prompt.prefix is None else prompt.prefix.start

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt's text: all that follows the template prefix and the segments.

        Summaries stand before the template prefix, which then is a part of the text.
        """
        before = self.template.prefix_ids if prompt.prefix is not None and prompt.prefix.summaries else []
        joint = None
        if prompt.verbatim:
            joint = "\n\n" if prompt.prefix is not None or prompt.context else ""
        asked = self.template.question_ids(
            prompt.question,
            prompt.context,
            history=prompt.history,
            joint=joint,
            memory=prompt.prefix is not None,
        )
        return before + asked

    # -- generation -------------------------------------------------------------------------------------------

    def stream(
        self, prompt: Prompt, config: GenerateConfig | None = None, adapter: str | None = None
    ) -> tuple[Generation, Iterator[str]]:
        """Answer one question, text by text.

        Returns:
            the generation, which fills while the iterator is read, and the iterator of new text.

        Raises:
            PromptTooLong: at once, before anything is read.
        """
        config = config or GenerateConfig()
        ids = self.prompt_ids(prompt)
        self.check_window(self.position(prompt), len(ids), self._least(config))
        generation = Generation(prompt_tokens=len(ids))
        return generation, self._run(prompt, ids, config, adapter, generation)

    @torch.inference_mode()
    def _run(
        self, prompt: Prompt, ids: list[int], config: GenerateConfig, adapter: str | None, generation: Generation
    ) -> Iterator[str]:
        if config.beams > 1:
            self._follow_beams(prompt, ids, config, adapter, generation)
            if generation.text:
                yield generation.text
            return
        began = time.perf_counter()
        budget = self._budget(self.position(prompt) + len(ids), config)
        text = TextStream(self.tokenizer, config.stop, self._thoughts, budget)
        sampler, speller = self._generator(config), self._speller(prompt, config)
        memory = self.memory([prompt.prefix])
        most = len(ids) + self._least(config) + budget + Draft.SIZE
        cache = self.start_cache(1, most, adapter, prefix=prompt.prefix)
        position = self.position(prompt) - cache.length
        hidden = self.step([ids], position, cache, memory, adapter, wanted=1)
        logits = speller.spell(self.runner.logits(hidden[:, -1]), [[]])
        accepted = _or_forced(choose(logits, config, sampler, [[]], self.eos).tolist(), text)
        generation.ttft_s = time.perf_counter() - began
        step = self.stepper(cache, memory, adapter, position)
        # steps that are replayed cost less than guesses save
        drafting = config.lookup and config.temperature == 0 and not self.replays
        draft = Draft(encode(self.tokenizer, prompt.draft) if drafting else ())
        while True:
            for token in accepted:
                new = self._take(token, generation, text, config)
                generation.decode_s = time.perf_counter() - began - generation.ttft_s
                draft.extend([token])
                if new:
                    yield new
                if generation.finish:
                    return
            last, guesses = generation.token_ids[-1], draft.guess(generation.token_ids) if drafting else []
            if (free := text.free()) is not None and free <= len(guesses):  # what must follow is no guess
                guesses = []
            if guesses:
                logits = self.runner.logits(self.step([[last, *guesses]], position, cache, memory, adapter)[0])
            else:
                logits = step([last])
            answers = [[*generation.token_ids, *guesses[:many]] for many in range(len(guesses) + 1)]
            logits = speller.spell(logits, answers)
            chosen = choose(logits, config, sampler, answers, self.eos).tolist()
            kept = next((i for i, guess in enumerate(guesses) if chosen[i] != guess), len(guesses))
            cache.length -= len(guesses) - kept
            accepted = chosen[: kept + 1] if guesses else _or_forced(chosen, text)
            generation.steps += 1

    def _follow_beams(
        self, prompt: Prompt, ids: list[int], config: GenerateConfig, adapter: str | None, generation: Generation
    ) -> None:
        """Fill a generation by beam search: the prompt is read once, and then every beam has its own row."""
        began = time.perf_counter()
        memory = self.memory([prompt.prefix])
        read = self.start_cache(1, len(ids), adapter, prefix=prompt.prefix)
        position = self.position(prompt) - read.length
        first = self.runner.logits(self.step([ids], position, read, memory, adapter, wanted=1)[:, -1])
        budget = self._budget(self.position(prompt) + len(ids), config)
        longer = replace(config, max_new_tokens=config.max_new_tokens + budget)
        cache = self.spread(read, config.beams, longer.max_new_tokens)

        def step(tokens: Sequence[int], origins: Sequence[int]) -> torch.Tensor:
            generation.steps += 1
            cache.reorder(self.tensor(origins), read.length)
            hidden = self.step([[token] for token in tokens], position, cache, memory, adapter, wanted=1)
            return self.runner.logits(hidden[:, -1])

        text = TextStream(self.tokenizer, config.stop, self._thoughts, budget)
        for token in search(first, step, longer, self.eos):
            self._take(token, generation, text, config)
            if generation.finish:
                break
        generation.ttft_s = time.perf_counter() - began

    def _take(self, token: int, generation: Generation, text: TextStream, config: GenerateConfig) -> str:
        """Record one token of a generation; returns the text it makes certain."""
        if token in self.eos:
            generation.finish, new = "stop", text.finish()
        else:
            generation.token_ids.append(token)
            new = text.push(token)
            if text.stopped:
                generation.finish = "stop"
            elif text.is_full(config.max_new_tokens):
                generation.finish = "length"
                new += text.finish()
        generation.text += new
        if generation.finish and self._thoughts is not None:
            generation.reasoning, generation.inside, generation.cut = text.reasoning, text.inside, text.forced > 0
        return new

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Prompt], config: GenerateConfig | None = None, adapter: str | None = None
    ) -> list[Generation]:
        """Answer several questions together, one row each; rows of different lengths are padded at the left.

        Raises:
            PromptTooLong: any of them does not fit; nothing is run.
        """
        config = config or GenerateConfig()
        groups = _by_summaries(prompts)
        if len(groups) != 1:
            for prompt in prompts:
                self.check_window(self.position(prompt), len(self.prompt_ids(prompt)), self._least(config))
            return _regrouped(groups, [self.generate([prompts[n] for n in g], config, adapter) for g in groups])
        asked = [self.prompt_ids(prompt) for prompt in prompts]
        for prompt, ids in zip(prompts, asked, strict=True):
            self.check_window(self.position(prompt), len(ids), self._least(config))
        began = time.perf_counter()
        generations = [Generation(prompt_tokens=len(ids)) for ids in asked]
        if config.beams > 1:
            for prompt, ids, generation in zip(prompts, asked, generations, strict=True):
                self._follow_beams(prompt, ids, config, adapter, generation)
            return generations
        budgets = [self._budget(self.position(p) + len(ids), config) for p, ids in zip(prompts, asked, strict=True)]
        texts = [TextStream(self.tokenizer, config.stop, self._thoughts, budget) for budget in budgets]
        sampler = self._generator(config)
        spellers = [self._speller(prompt, config) for prompt in prompts]
        longest = max(map(len, asked))
        pad = [longest - len(ids) for ids in asked]
        filler = min(self.eos, default=0)  # never read
        memory = self.memory([prompt.prefix for prompt in prompts])
        most = longest + self._least(config) + max(budgets)
        cache = self.start_cache(len(prompts), most, adapter, pad, prompts[0].prefix)
        # positions follow from where each row's own text starts, not from where it lies in the padded cache
        offset = self.tensor([self.position(p) - cache.length - n for p, n in zip(prompts, pad, strict=True)])
        padded = [[filler] * n + ids for n, ids in zip(pad, asked, strict=True)]
        hidden = self.step(padded, offset[:, None], cache, memory, adapter, wanted=1)
        logits = self.runner.logits(hidden[:, -1])
        step = self.stepper(cache, memory, adapter, offset[:, None])
        while True:
            for row, speller, generation in zip(logits, spellers, generations, strict=True):
                speller.spell(row[None], [generation.token_ids])
            answers = [generation.token_ids for generation in generations]
            chosen = choose(logits, config, sampler, answers, self.eos).tolist()
            tokens = [_or_forced([token], text)[0] for token, text in zip(chosen, texts, strict=True)]
            now = time.perf_counter() - began
            for token, generation, text in zip(tokens, generations, texts, strict=True):
                if not generation.finish:
                    self._take(token, generation, text, config)
                    generation.ttft_s = generation.ttft_s or now
                    generation.decode_s = now - generation.ttft_s
            if all(generation.finish for generation in generations):
                return generations
            logits = step(tokens)

    def _least(self, config: GenerateConfig) -> int:
        """Tokens that an answer must have room for: its own, and the markers of thoughts."""
        thoughts = self._thoughts
        return config.max_new_tokens + (0 if thoughts is None else len(thoughts.begin) + len(thoughts.close))

    def _budget(self, used: int, config: GenerateConfig) -> int:
        """Tokens that thoughts may take after ``used`` positions: what is asked for, as far as the window has room."""
        if self._thoughts is None:
            return 0
        return max(0, min(config.reasoning_tokens, self.shape.window - used - self._least(config)))

    def _speller(self, prompt: Prompt, config: GenerateConfig) -> Speller:
        return Speller(self._pieces, prompt.spelling, config.spelling, prompt.question, config.pointing)

    def _generator(self, config: GenerateConfig) -> torch.Generator | None:
        if config.seed is None:
            return None
        return torch.Generator(device=self.runner.device).manual_seed(config.seed)

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
        groups = _by_summaries(prompts)
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


def _or_forced(chosen: list[int], text: TextStream) -> list[int]:
    """The chosen tokens, or the one that must follow."""
    forced = text.must_follow()
    return chosen if forced is None else [forced]


def _by_summaries(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Numbers of the prompts that can be run together: those that read the same summaries, and those that read none."""
    groups: dict[int | None, list[int]] = {}
    for number, prompt in enumerate(prompts):
        read = prompt.prefix if prompt.prefix is not None and prompt.prefix.summaries else None
        groups.setdefault(None if read is None else id(read), []).append(number)
    return list(groups.values())


def _regrouped(groups: Sequence[Sequence[int]], results: Sequence[Sequence[T]]) -> list[T]:
    """Results by group, in the order of the prompts."""
    made: dict[int, T] = {}
    for group, part in zip(groups, results, strict=True):
        made |= zip(group, part, strict=True)
    return [made[number] for number in sorted(made)]
