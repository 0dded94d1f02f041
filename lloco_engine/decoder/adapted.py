"""A decoder's passes, each with its base weights or with one of its adapters: tokens in, hidden states out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lloco_engine import fingerprints
from lloco_engine.decoder.answering import AnsweringDecoder
from lloco_engine.decoder.attention import Cache
from lloco_engine.decoder.batching import Batching, Stream
from lloco_engine.decoder.joint import JointPass
from lloco_engine.decoder.memory import Memory
from lloco_engine.decoder.peft_modules import PeftModules
from lloco_engine.decoder.probe import runner_of
from lloco_engine.decoder.replay import PlacedCache, Replay
from lloco_engine.decoder.runner import Attention, Runner
from lloco_engine.decoder.template import Template
from lloco_engine.errors import AdapterError, UnsupportedModel
from lloco_engine.pretrained import ends_of
from lloco_engine.process import ProcessLock
from lloco_engine.types import Prefix

__all__ = ["AdaptedDecoder"]


class AdaptedDecoder(AnsweringDecoder):
    """A Hugging Face causal language model with its tokenizer, its template and any number of LoRA adapters.

    Requests from several threads take turns, pass by pass, and answers share their steps
    (`lloco_engine.decoder.batching`); an adapter chosen for one never leaks into another.

    Args:
        model: causal language model in eval mode, one that `lloco_engine.decoder.probe` finds can be run.
        tokenizer: its tokenizer.
        name: what the user called it.
        template: of `lloco_engine.decoder.template.NAMES`, or one that is made; None is the one that suits the decoder.
    """

    _fingerprint: str

    def __init__(self, model: Any, tokenizer: Any, name: str = "", template: str | Template | None = None) -> None:
        self.runner = runner_of(model)
        super().__init__(
            name,
            fingerprint="",
            tokenizer=tokenizer,
            tokenizer_fingerprint=fingerprints.tokenizer_fingerprint(tokenizer),
            template=Template.suited(tokenizer, model.config, template),
            shape=self.runner.shape,
            eos=ends_of(model.generation_config, tokenizer),
        )
        self._modules = PeftModules(model, self.runner.linears())
        self._prefix_cache: dict[str | None, Cache] = {}  # template prefix by adapter
        self._adapters: dict[str, Path] = {}
        self._lock = ProcessLock(f"the decoder {name!r}")
        self._joint, self._batching = JointPass(self.runner), Batching(self._shared_step)

    @property
    def device(self) -> torch.device:
        """Where its passes run."""
        return self.runner.device

    @property
    def fingerprint(self) -> str:
        """Of its weights; of a decoder that was never in a folder it is taken when it is first asked for."""
        if not self._fingerprint:
            self._fingerprint = fingerprints.model_fingerprint(self.runner.model)
        return self._fingerprint

    @fingerprint.setter
    def fingerprint(self, fingerprint: str) -> None:
        self._fingerprint = fingerprint

    @property
    def end(self) -> int:
        """The token that ends an answer.

        Raises:
            UnsupportedModel: neither the tokenizer nor the generation config names one.
        """
        if self.tokenizer.eos_token_id is not None:
            return int(self.tokenizer.eos_token_id)
        if not self.eos:
            raise UnsupportedModel(
                "an answer that is learned or scored must end with an end token, and this decoder has none; set "
                "eos_token in its tokenizer_config.json, or eos_token_id in its generation_config.json"
            )
        return int(min(self.eos))

    # -- adapters ---------------------------------------------------------------------------------------------

    def load_adapter(self, folder: str | Path, name: str) -> None:
        """Add a PEFT adapter of the linear layers under a name.

        It is of one of the kinds in `lloco_engine.decoder.peft_modules.KINDS`, LoRA and DoRA among them.

        Raises:
            AdapterError: the folder holds no adapter for this decoder, or the name is taken.
        """
        if not name or name in self._adapters or name == "none":
            raise AdapterError(f"an adapter's name must be new and neither 'none' nor empty, not {name!r}")
        with self._lock:
            _ = self.fingerprint  # from now on its modules have other names
            self._modules.load(Path(folder), name)
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
        if not name or name in self._adapters or name == "none":
            raise AdapterError(f"an adapter's name must be new and neither 'none' nor empty, not {name!r}")
        with self._lock:
            parameters = self._modules.add(config, name)
        for parameter in parameters.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        self._adapters[name] = Path()
        return parameters

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter and free its weights; one that is not there is no error."""
        if self._adapters.pop(name, None) is not None:
            with self._lock:
                self._modules.remove(name)
                self.runner.forget(name)
                self._prefix_cache.pop(name, None)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that are loaded."""
        return tuple(self._adapters)

    def _use(self, adapter: str | None) -> None:
        """Make the next pass one of an adapter; the lock must be held until it is over."""
        adapter = None if adapter == "none" else adapter
        if adapter is not None and adapter not in self._adapters:
            raise AdapterError(f"adapter {adapter!r} is not loaded; there is {', '.join(self._adapters) or 'none'}")
        self._modules.use(adapter)
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
                    self.step([ids], 0, cache, None, adapter)
            self._prefix_cache[adapter] = cache
        return self._prefix_cache[adapter]

    def start_cache(
        self,
        rows: int,
        room: int,
        adapter: str | None,
        pad: list[int] | None = None,
        prefix: Prefix | None = None,
    ) -> Cache:
        """A cache that holds, in every row, what the text follows, and has room for ``room`` tokens more.

        That is the template prefix; or what ``prefix`` has in the place of input embeddings.
        """
        lead = self._lead_cache(prefix, adapter)
        cache = self.spread(lead, rows, room)
        if pad is not None and any(pad):
            cache.pad = self.tensor(pad)
            cache.pad_from = lead.length
        return cache

    def spread(self, read: Cache, rows: int, room: int) -> Cache:
        """A cache whose rows all hold what the one row of ``read`` does, and ``room`` tokens more fit."""
        cache = self.new_cache(rows, read.length + room)
        cache.spread_from(read)
        return cache

    def _lead_cache(self, prefix: Prefix | None, adapter: str | None) -> Cache:
        if prefix is None or prefix.embeddings is None:
            return self.template_cache(adapter)
        cache = self.new_cache(1, len(prefix.embeddings))
        self.read_lead(prefix, cache, adapter)
        return cache

    def read_lead(self, prefix: Prefix | None, cache: Cache, adapter: str | None) -> int:
        """Run what the text of a prompt follows into an empty cache; returns how many places that is.

        Embeddings stand before all text and take the positions before ``prefix.start``: those from 0 on with rotary
        positions, and with learned ones negative positions, which are none.
        """
        if prefix is None or prefix.embeddings is None:
            if ids := self.template.prefix_ids:
                self.step([ids], 0, cache, None, adapter)
            return len(ids)
        vectors = prefix.embeddings.to(self.runner.device, self.runner.dtype)
        self.step(vectors[None], prefix.start - len(vectors), cache, None, adapter)
        return len(vectors)

    @contextmanager
    def base(self) -> Iterator[Runner]:
        """The runner with the base weights, for the length of the block: other requests wait."""
        with self._lock:
            self._use(None)
            yield self.runner

    def tensor(self, values: Any) -> torch.Tensor:
        """Numbers as int64 on the decoder's device."""
        return torch.tensor(values, dtype=torch.int64, device=self.runner.device)

    @torch.inference_mode()
    def prefill(self, token_ids: Sequence[int], room: int = 0, adapter: str | None = None) -> Cache:
        """The cache of the template prefix and a chunk; ``room`` more tokens will fit.

        Compression reads with the base weights; an adapter is for text that is then answered about with it.
        """
        # the template prefix is run again with the chunk: from an empty cache on, the causal kernel serves
        ids = [*self.template.prefix_ids, *token_ids]
        cache = self.new_cache(1, len(ids) + room)
        self.step([ids], 0, cache, None, adapter)
        return cache

    @torch.inference_mode()
    def follow(
        self,
        token_ids: Sequence[int],
        cache: Cache,
        attention: Attention,
        offset: int = 0,
        in_bf16: bool = False,
        wanted: int | None = 0,
    ) -> torch.Tensor:
        """Run tokens after a cache with the base weights, their attention computed by ``attention``.

        Their positions are ``offset`` beyond their places in the cache; ``in_bf16`` the linear layers run in bfloat16.

        Returns:
            the hidden states (1, T, E) of the tokens that are ``wanted`` (`Runner.forward`).
        """
        with torch.autocast(self.runner.device.type, torch.bfloat16, enabled=in_bf16):
            return self.step([list(token_ids)], offset, cache, None, None, attention, wanted=wanted)

    def memory(self, prefixes: Sequence[Prefix | None]) -> Memory | None:
        """What the rows of a pass read, a prefix each or None; None where no row reads any."""
        return Memory.of(prefixes, self.runner.device, self.runner.dtype, self.runner.rotate)

    def step(
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
        """Run token ids or (B, T, E) embeddings that follow the cache; returns their hidden states (B, T, E).

        Their positions are ``offset`` beyond their places in it. For the rest see `Runner.forward`.

        The lock is held for one pass only, so streams of several requests take turns and each keeps its adapter.
        """
        places = torch.arange(cache.length, cache.length + len(inputs[0]), device=self.runner.device)
        inputs = inputs if isinstance(inputs, torch.Tensor) else self.tensor(inputs)
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

    def _shared_step(self, streams: Sequence[Stream]) -> list[torch.Tensor]:
        """See `Batching`; one stream alone is run as if there were no others."""
        if len(streams) > 1:
            with self._lock:
                self._use(streams[0].adapter)
                return self._joint.run(streams)
        (one,) = streams
        wanted = 1 if len(one.tokens) == 1 else None
        hidden = self.step([list(one.tokens)], one.offset, one.cache, one.memory, one.adapter, wanted=wanted)
        return [self.runner.logits(hidden[0])]

    def stepper(
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
            hidden = self.step([[token] for token in tokens], offset, cache, memory, adapter, wanted=1)
            return self.runner.logits(hidden[:, -1])

        if not self.replays:
            return step
        replay = Replay(run, cache, held=self.runner.low_rank(adapter))
        return replayed

    @property
    def replays(self) -> bool:
        """Whether decode steps are captured and replayed."""
        return bool(self.runner.device.type == "cuda" and self.runner.replays)
