"""A decoder that runs in this process on torch: prefixes and questions in, tokens out."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import torch

from lloco_engine import fingerprints, models
from lloco_engine.config import GenerateConfig
from lloco_engine.decoder import kernel, ragged
from lloco_engine.decoder.attention import Cache
from lloco_engine.decoder.beams import search
from lloco_engine.decoder.generation import Draft, Generation, Prompt, TextStream, choose
from lloco_engine.decoder.lora import adapter_source
from lloco_engine.decoder.memory import Memory
from lloco_engine.decoder.opt import runner_of
from lloco_engine.decoder.replay import PlacedCache, Replay
from lloco_engine.decoder.runner import Attention, Runner
from lloco_engine.decoder.spelling import Pieces, Speller
from lloco_engine.decoder.template import Template, encode
from lloco_engine.errors import AdapterError, PromptTooLong
from lloco_engine.types import Prefix

__all__ = ["Generation", "LocalDecoder", "Prompt"]

T = TypeVar("T")


class LocalDecoder:
    """A Hugging Face causal language model with its tokenizer and template.

    Requests from several threads take turns, pass by pass; an adapter chosen for one never leaks into another.

    Args:
        model: causal language model in eval mode, of a family in `lloco_engine.decoder.shape.FAMILIES`.
        tokenizer: its tokenizer.
        name: what the user called it.
        template: of `lloco_engine.decoder.template.NAMES`; None is the one that suits the decoder.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "", template: str | None = None) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.runner = runner_of(model)
        self.shape = self.runner.shape
        self.template = Template.suited(tokenizer, model.config, template)
        self.tokenizer_fingerprint = fingerprints.tokenizer_fingerprint(tokenizer)
        self.fingerprint = ""
        self._pieces = Pieces(tokenizer)
        self._prefix_cache: dict[str | None, Cache] = {}  # template prefix by adapter
        self._adapters: dict[str, Path] = {}
        self._lock = threading.RLock()
        eos = model.generation_config.eos_token_id if model.generation_config is not None else None
        self.eos = set(eos if isinstance(eos, list) else [eos]) | {tokenizer.eos_token_id}

    @classmethod
    def load(
        cls,
        name: str = models.DEFAULT_DECODER,
        *,
        device: str | None = None,
        dtype: str | None = None,
        template: str | None = None,
    ) -> Self:
        """Load a decoder by local folder, hub id or ``"embedded"``.

        Raises:
            ModelNotFound: nothing is there; the message says which command to run.
            UnsupportedModel: the family cannot be run.
        """
        model, tokenizer = models.load_causal_lm(name, device=device, dtype=dtype), models.load_tokenizer(name)
        decoder = cls(model, tokenizer, name, template)
        decoder.fingerprint = fingerprints.model_fingerprint(models.decoder_folder(name))
        if ragged.serves(decoder.runner.device, decoder.runner.dtype):
            kernel.prepare()  # now, and not while a first question waits
        return decoder

    @property
    def template_tokens(self) -> int:
        """Tokens of the template prefix."""
        return len(self.template.prefix_ids)

    # -- adapters ---------------------------------------------------------------------------------------------

    def load_adapter(self, folder: str | Path, name: str) -> None:
        """Add a PEFT LoRA adapter under a name.

        Raises:
            AdapterError: the folder holds no adapter for this decoder, or the name is taken.
        """
        if name in self._adapters or name == "none":
            raise AdapterError(f"an adapter's name must be new and not 'none', not {name!r}")
        model = self.runner.model
        with self._lock, models.quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of every adapter after the first
            try:
                model.load_adapter(adapter_name=name, **adapter_source(Path(folder)))
                if any("lora_" in key for part in self._outer() for key in part.state_dict()):
                    raise ValueError("it changes lm_head or embed_tokens, which are read unadapted")
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                if name in getattr(model, "peft_config", {}):
                    model.delete_adapter(name)
                raise AdapterError(f"{folder} does not hold a LoRA adapter for {self.name!r}: {error}") from error
            self._adapters[name] = Path(folder)

    def add_adapter(self, config: Any, name: str) -> dict[str, torch.nn.Parameter]:
        """Add a new adapter, to be trained; untrained it changes nothing.

        Args:
            config: a ``peft.LoraConfig`` whose targets lie inside the layers.
            name: as in `load_adapter`.

        Returns:
            its parameters by name, float32, which alone take gradients.

        Raises:
            AdapterError: the name is taken, or the decoder has no such targets.
        """
        if name in self._adapters or name == "none":
            raise AdapterError(f"an adapter's name must be new and not 'none', not {name!r}")
        model = self.runner.model
        with self._lock, models.quiet():
            try:
                model.add_adapter(config, adapter_name=name)
            except ValueError as error:
                raise AdapterError(
                    f"{self.name!r} cannot be adapted at {sorted(config.target_modules)}: {error}"
                ) from error
        parameters = {key: value for key, value in model.named_parameters() if f".{name}." in key and "lora_" in key}
        for parameter in parameters.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        self._adapters[name] = Path()
        return parameters

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter and free its weights; one that is not there is no error."""
        if self._adapters.pop(name, None) is not None:
            with self._lock, models.quiet():
                self.runner.model.delete_adapter(name)
                self.runner.forget(name)
                self._prefix_cache.pop(name, None)

    def _outer(self) -> list[Any]:
        """The modules outside the layers, as they are now: PEFT may have wrapped them."""
        model: Any = self.runner.model
        return [model.lm_head, model.get_input_embeddings()]

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that are loaded."""
        return tuple(self._adapters)

    def _use(self, adapter: str | None) -> None:
        if adapter in (None, "none"):
            self.runner.adapter = None
            return
        if adapter not in self._adapters:
            raise AdapterError(f"adapter {adapter!r} is not loaded; there is {', '.join(self._adapters) or 'none'}")
        model: Any = self.runner.model
        if model.active_adapters() != [adapter]:
            model.set_adapter(adapter)
        self.runner.adapter = adapter

    # -- passes -----------------------------------------------------------------------------------------------

    def new_cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache for live tokens."""
        shape, runner = self.shape, self.runner
        return Cache(
            shape.layers,
            rows,
            shape.kv_heads,
            shape.head_dim,
            capacity,
            device=runner.device,
            dtype=runner.dtype,
        )

    def template_cache(self, adapter: str | None = None) -> Cache:
        """Keys and values of the template prefix, computed once per adapter."""
        if adapter not in self._prefix_cache:
            ids = self.template.prefix_ids
            cache = self.new_cache(1, len(ids))
            if ids:
                with torch.inference_mode():
                    self._step([ids], 0, cache, None, adapter)
            self._prefix_cache[adapter] = cache
        return self._prefix_cache[adapter]

    def _start(
        self,
        rows: int,
        room: int,
        adapter: str | None,
        pad: list[int] | None = None,
        prefix: Prefix | None = None,
    ) -> Cache:
        """A cache that holds, in every row, what the text follows, and has room for ``room`` tokens more.

        That is the template prefix; or, where ``prefix`` is of summaries, these.
        """
        lead = self._lead_cache(prefix, adapter)
        cache = self.new_cache(rows, lead.length + room)
        for layer in range(self.shape.layers):
            cache.keys[layer][:, :, : lead.length] = lead.keys[layer]
            cache.values[layer][:, :, : lead.length] = lead.values[layer]
        cache.length = lead.length
        if pad is not None and any(pad):
            cache.pad = self._tensor(pad)
            cache.pad_from = lead.length
        return cache

    def _lead_cache(self, prefix: Prefix | None, adapter: str | None) -> Cache:
        if prefix is None or not prefix.summaries:
            return self.template_cache(adapter)
        cache = self.new_cache(1, prefix.slots)
        self.read_lead(prefix, cache, adapter)
        return cache

    def read_lead(self, prefix: Prefix | None, cache: Cache, adapter: str | None) -> int:
        """Run what the text of a prompt follows into an empty cache; returns how many places that is.

        Summaries stand before all text and take the positions before ``prefix.start``: those from 0 on with rotary
        positions, and with learned ones negative positions, which are none.
        """
        if prefix is None or not prefix.summaries:
            if ids := self.template.prefix_ids:
                self._step([ids], 0, cache, None, adapter)
            return len(ids)
        vectors = [summary.vectors.to(self.runner.device, self.runner.dtype) for summary in prefix.summaries]
        self._step(torch.cat(vectors)[None], prefix.start - prefix.slots, cache, None, adapter)
        return prefix.slots

    @contextmanager
    def base(self) -> Iterator[Runner]:
        """The runner with the base weights, for the length of the block: other requests wait."""
        with self._lock:
            self._use(None)
            yield self.runner

    def _tensor(self, values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.runner.device)

    def _check(self, start: int, tokens: int, new: int) -> None:
        if start + tokens + new > self.shape.window:
            raise PromptTooLong(
                f"positions of the prompt and the answer must fit the decoder's window of {self.shape.window}: text "
                f"starts at {start}, the prompt has {tokens} tokens and the answer may have {new}, "
                f"{start + tokens + new} in all; shorten the question or lower max_new_tokens"
            )

    def _position(self, prompt: Prompt) -> int:
        return self.template_tokens if prompt.prefix is None else prompt.prefix.start

    @torch.inference_mode()
    def prefill(self, token_ids: Sequence[int], room: int = 0, adapter: str | None = None) -> Cache:
        """The cache of the template prefix and a chunk; ``room`` more tokens will fit.

        Compression reads with the base weights; an adapter is for text that is then answered about with it.
        """
        # the template prefix is run again with the chunk: from an empty cache on, the causal kernel serves
        ids = [*self.template.prefix_ids, *token_ids]
        cache = self.new_cache(1, len(ids) + room)
        self._step([ids], 0, cache, None, adapter)
        return cache

    @torch.inference_mode()
    def follow(
        self, token_ids: Sequence[int], cache: Cache, attention: Attention, offset: int = 0, in_bf16: bool = False
    ) -> None:
        """Run tokens after a cache with the base weights, their attention computed by ``attention``.

        Their positions are ``offset`` beyond their places in the cache; ``in_bf16`` the linear layers run in bfloat16.
        """
        with torch.autocast(self.runner.device.type, torch.bfloat16, enabled=in_bf16):
            self._step([list(token_ids)], offset, cache, None, None, attention, wanted=0)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt's text: all that follows the template prefix and the segments.

        Summaries stand before the template prefix, which then is a part of the text.
        """
        before = self.template.prefix_ids if prompt.prefix is not None and prompt.prefix.summaries else []
        joint = None
        if prompt.verbatim:
            joint = "\n\n" if prompt.prefix is not None or prompt.context else ""
        asked = self.template.question_ids(prompt.question, prompt.context, history=prompt.history, joint=joint)
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
        self._check(self._position(prompt), len(ids), config.max_new_tokens)
        generation = Generation(prompt_tokens=len(ids))
        return generation, self._run(prompt, ids, config, adapter, generation)

    @torch.inference_mode()
    def _run(
        self, prompt: Prompt, ids: list[int], config: GenerateConfig, adapter: str | None, generation: Generation
    ) -> Iterator[str]:
        if config.beams > 1:
            self._follow_beams(prompt, ids, config, adapter, generation)
            yield generation.text
            return
        began = time.perf_counter()
        text = TextStream(self.tokenizer, config.stop)
        sampler, speller = self._generator(config), self._speller(prompt, config)
        memory = self._memory([prompt])
        cache = self._start(1, len(ids) + config.max_new_tokens + Draft.SIZE, adapter, prefix=prompt.prefix)
        position = self._position(prompt) - cache.length
        hidden = self._step([ids], position, cache, memory, adapter, wanted=1)
        logits = speller.spell(self.runner.logits(hidden[:, -1]), [[]])
        accepted = choose(logits, config, sampler, [[]], self.eos).tolist()
        generation.ttft_s = time.perf_counter() - began
        step = self._stepper(cache, memory, adapter, position)
        # steps that are replayed cost less than guesses save
        drafting = config.lookup and config.temperature == 0 and not self._replays
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
            if guesses:
                logits = self.runner.logits(self._step([[last, *guesses]], position, cache, memory, adapter)[0])
            else:
                logits = step([last])
            answers = [[*generation.token_ids, *guesses[:many]] for many in range(len(guesses) + 1)]
            logits = speller.spell(logits, answers)
            chosen = choose(logits, config, sampler, answers, self.eos).tolist()
            kept = next((i for i, guess in enumerate(guesses) if chosen[i] != guess), len(guesses))
            cache.length -= len(guesses) - kept
            accepted = chosen[: kept + 1]
            generation.steps += 1

    def _follow_beams(
        self, prompt: Prompt, ids: list[int], config: GenerateConfig, adapter: str | None, generation: Generation
    ) -> None:
        """Fill a generation by beam search: the prompt is read once, and then every beam has its own row."""
        began = time.perf_counter()
        memory, rows = self._memory([prompt]), config.beams
        read = self._start(1, len(ids), adapter, prefix=prompt.prefix)
        position = self._position(prompt) - read.length
        first = self.runner.logits(self._step([ids], position, read, memory, adapter, wanted=1)[:, -1])
        cache = self.new_cache(rows, read.length + config.max_new_tokens)
        cache.length = read.length
        for layer in range(self.shape.layers):
            cache.keys[layer][:, :, : read.length] = read.keys[layer][:, :, : read.length]
            cache.values[layer][:, :, : read.length] = read.values[layer][:, :, : read.length]

        def step(tokens: Sequence[int], origins: Sequence[int]) -> torch.Tensor:
            generation.steps += 1
            cache.reorder(self._tensor(origins), read.length)
            hidden = self._step([[token] for token in tokens], position, cache, memory, adapter, wanted=1)
            return self.runner.logits(hidden[:, -1])

        text = TextStream(self.tokenizer, config.stop)
        for token in search(first, step, config, self.eos):
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
            elif len(generation.token_ids) >= config.max_new_tokens:
                generation.finish = "length"
                new += text.finish()
        generation.text += new
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
                self._check(self._position(prompt), len(self.prompt_ids(prompt)), config.max_new_tokens)
            return _regrouped(groups, [self.generate([prompts[n] for n in g], config, adapter) for g in groups])
        asked = [self.prompt_ids(prompt) for prompt in prompts]
        for prompt, ids in zip(prompts, asked, strict=True):
            self._check(self._position(prompt), len(ids), config.max_new_tokens)
        began = time.perf_counter()
        generations = [Generation(prompt_tokens=len(ids)) for ids in asked]
        if config.beams > 1:
            for prompt, ids, generation in zip(prompts, asked, generations, strict=True):
                self._follow_beams(prompt, ids, config, adapter, generation)
            return generations
        texts = [TextStream(self.tokenizer, config.stop) for _ in prompts]
        sampler = self._generator(config)
        spellers = [self._speller(prompt, config) for prompt in prompts]
        longest = max(map(len, asked))
        pad = [longest - len(ids) for ids in asked]
        filler = self.tokenizer.eos_token_id
        memory = self._memory(prompts)
        cache = self._start(len(prompts), longest + config.max_new_tokens, adapter, pad, prompts[0].prefix)
        # positions follow from where each row's own text starts, not from where it lies in the padded cache
        offset = self._tensor([self._position(p) - cache.length - n for p, n in zip(prompts, pad, strict=True)])
        padded = [[filler] * n + ids for n, ids in zip(pad, asked, strict=True)]
        hidden = self._step(padded, offset[:, None], cache, memory, adapter, wanted=1)
        logits = self.runner.logits(hidden[:, -1])
        step = self._stepper(cache, memory, adapter, offset[:, None])
        while True:
            for row, speller, generation in zip(logits, spellers, generations, strict=True):
                speller.spell(row[None], [generation.token_ids])
            answers = [generation.token_ids for generation in generations]
            tokens = choose(logits, config, sampler, answers, self.eos).tolist()
            now = time.perf_counter() - began
            for token, generation, text in zip(tokens, generations, texts, strict=True):
                if not generation.finish:
                    self._take(token, generation, text, config)
                    generation.ttft_s = generation.ttft_s or now
                    generation.decode_s = now - generation.ttft_s
            if all(generation.finish for generation in generations):
                return generations
            logits = step(tokens)

    def _memory(self, prompts: Sequence[Prompt]) -> Memory | None:
        return Memory.of(
            [prompt.prefix for prompt in prompts], self.runner.device, self.runner.dtype, self.runner.rotate
        )

    def _step(
        self,
        inputs: list[list[int]] | torch.Tensor,
        offset: int | torch.Tensor,
        cache: Cache,
        memory: Memory | None,
        adapter: str | None,
        attention: Attention | None = None,
        *,
        wanted: int | None = None,
        recompute: bool = False,
        in_bf16: bool = False,
    ) -> torch.Tensor:
        """Run token ids or (B, T, E) embeddings that follow the cache.

        Their positions are ``offset`` beyond their places in it.

        The lock is held for one pass only, so streams of several requests take turns and each keeps its adapter.
        """
        places = torch.arange(cache.length, cache.length + len(inputs[0]), device=self.runner.device)
        inputs = inputs if isinstance(inputs, torch.Tensor) else self._tensor(inputs)
        with self._lock:
            self._use(adapter)
            return self.runner.forward(
                inputs,
                places + offset,
                cache,
                memory,
                attention,
                wanted=wanted,
                recompute=recompute,
                in_bf16=in_bf16,
            )

    def _stepper(
        self, cache: Cache, memory: Memory | None, adapter: str | None, offset: int | torch.Tensor
    ) -> Callable[[Sequence[int]], torch.Tensor]:
        """What runs steps of one token a row, which follow the cache: tokens (B,) in, logits (B, vocabulary) out."""

        def run(tokens: torch.Tensor, cache: PlacedCache) -> torch.Tensor:
            hidden = self.runner.forward(tokens, cache.place + offset, cache, memory, wanted=1)
            return self.runner.logits(hidden[:, -1])

        def replayed(tokens: Sequence[int]) -> torch.Tensor:
            with self._lock:
                self._use(adapter)
                return replay(tokens)

        def step(tokens: Sequence[int]) -> torch.Tensor:
            hidden = self._step([[token] for token in tokens], offset, cache, memory, adapter, wanted=1)
            return self.runner.logits(hidden[:, -1])

        if not self._replays:
            return step
        replay = Replay(run, cache, held=self.runner.low_rank(adapter))
        return replayed

    @property
    def _replays(self) -> bool:
        """Whether decode steps are captured and replayed."""
        return bool(self.runner.device.type == "cuda")

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
        end = self.tokenizer.eos_token_id
        asked = [self.prompt_ids(prompt) for prompt in prompts]
        gold = [[*encode(self.tokenizer, answer), end] for answer in answers]
        for prompt, ids, answer in zip(prompts, asked, gold, strict=True):
            self._check(self._position(prompt), len(ids), len(answer))
        longest = max(len(ids) + len(answer) for ids, answer in zip(asked, gold, strict=True))
        rows = [ids + answer for ids, answer in zip(asked, gold, strict=True)]
        memory = self._memory(prompts)
        cache = self._start(len(rows), longest, adapter, prefix=prompts[0].prefix)
        offset = self._tensor([self._position(prompt) - cache.length for prompt in prompts])
        padded = [row + [end] * (longest - len(row)) for row in rows]  # causal: padding at the right is not read
        hidden = self._step(padded, offset[:, None], cache, memory, adapter)
        losses = []
        for row, ids, answer in zip(hidden, asked, gold, strict=True):
            logits = self.runner.logits(row[len(ids) - 1 : len(ids) + len(answer) - 1])
            loss = torch.nn.functional.cross_entropy(logits, self._tensor(answer), reduction="sum")
            losses.append((float(loss), len(answer)))
        return losses


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
