"""A decoder on vLLM servers: ``Engine.open(store, decoder="vllm:http://host:8000")`` (docs/vllm.md).

The engine finds segments and makes prompts; the servers, which read the same store, answer with them. What they are
sent are token ids, never text, so that untrusted text stays what the engine made of it; and the ids of the segments,
signed (`params`).
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lloco_engine import (
    AdapterError,
    ConfigError,
    DecoderFacts,
    DecoderUnavailable,
    GenerateConfig,
    Prefix,
    Prompt,
    PromptTooLong,
    RemoteDecoder,
    SegmentReference,
)
from lloco_integrations.vllm.params import LIFETIME, Memory, read_keys, sign, store_fingerprint
from lloco_integrations.vllm.prompt_embeds import check_targets, encoded

if TYPE_CHECKING:
    from lloco_integrations.vllm.replicas import Replicas

__all__ = ["API_KEY", "VLLMDecoder", "served_name"]

API_KEY = "VLLM_API_KEY"  # of the environment, as vLLM's own server calls it
_OFF = "hints ({}) were off: the vLLM servers do not know them"
# what cannot be had, with the value that is, and why
_REFUSED = {
    "repetition_penalty": (1.0, "vLLM's counts the prompt's tokens too"),
    "no_repeat_ngram": (0, "vLLM has no such setting"),
    "beams": (1, "vLLM does not follow several answers over memories"),
}
_SEEDS = 2**63 - 1  # the largest that vLLM takes


def served_name(decoder_fingerprint: str) -> str:
    """The name that a server must give to the decoder, so that no other one answers in its place."""
    return f"lloco-{decoder_fingerprint}"


class VLLMDecoder(RemoteDecoder):
    """See `RemoteDecoder`; ``place`` is a server's address, or several with commas between.

    Segments of compact KV are read by the servers; summary embeddings are sent with the prompt, in the place of which
    they take. Which settings it refuses, docs/vllm.md says.

    Raises:
        ConfigError: an address is none, the extra ``vllm`` is not installed, or there is no key to sign with.
        DecoderUnavailable: no server answers, or one serves another decoder.
    """

    def __init__(self, place: str, facts: DecoderFacts, manifest: Mapping[str, Any]) -> None:
        try:
            from lloco_integrations.vllm.replicas import Replicas, parse_urls
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"a decoder on vLLM needs the extra 'vllm', of which {error.name!r} is not installed: "
                "pip install 'lloco[vllm]'"
            ) from error
        urls = parse_urls(place)
        super().__init__(place, facts, manifest)
        self._embeds = manifest["memory"] == "summary"
        if self._embeds and not self.embeds:
            raise ConfigError(
                "a decoder on vLLM reads summary embeddings where it is of Llama's shape, with rotary positions, and "
                f"{self.name!r} is not: answer with it in this process"
            )
        self._keys: tuple[bytes, ...] = ()
        if not self._embeds:
            try:
                self._keys = read_keys()
            except ValueError as error:
                raise ConfigError(str(error)) from error
        self._store = store_fingerprint(manifest)
        self._model = served_name(manifest["decoder_fingerprint"])
        self._adapters: dict[str, Path] = {}
        self._replicas: Replicas = Replicas(urls, os.environ.get(API_KEY, ""), patience=LIFETIME)
        self._longest = 0
        try:
            self._served = self._models()
        except BaseException:
            self._replicas.close()
            raise

    def close(self) -> None:
        """Let go of connections."""
        self._replicas.close()

    def _models(self) -> set[str]:
        """What all servers that answer serve; each must have the decoder."""
        found = self._replicas.models()
        for url, models in found.items():
            if self._model not in [one.name for one in models]:
                names = ", ".join(repr(one.name) for one in models) or "nothing"
                raise DecoderUnavailable(
                    f"the vLLM server at {url} must serve the store's decoder, {self.name!r}, as {self._model!r}, and "
                    f"serves {names}: start it as `lloco vllm-args` prints"
                )
        if not self._embeds:
            self._replicas.prove_all(found, self._forbidden())
        lengths = [
            one.longest for models in found.values() for one in models if one.name == self._model and one.longest
        ]
        self._longest = min(lengths, default=0)
        return set.intersection(*({one.name for one in models} for models in found.values()))

    # -- adapters ---------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> tuple[str, ...]:
        """See `AnsweringDecoder`."""
        return tuple(self._adapters)

    def load_adapter(self, folder: str | Path, name: str) -> None:
        """See `AnsweringDecoder`; the servers must have loaded it under the same name.

        Raises:
            AdapterError: the name is taken, a server does not have it, or it cannot work there.
        """
        if not name or name in self._adapters or name in ("none", self._model):
            raise AdapterError(f"an adapter's name must be new and neither 'none' nor empty, not {name!r}")
        if self._embeds:
            check_targets(Path(folder), name)
        if name not in self._served:
            self._served = self._models()  # it may have come since
        if name not in self._served:
            raise AdapterError(
                f"the vLLM servers at {self.place} must all have the adapter {name!r}, and one does not: start it with "
                f"--lora-modules {name}={folder} (`lloco vllm-args` prints the whole command), or ask with another "
                "adapter"
            )
        self._adapters[name] = Path(folder)

    # -- answers ----------------------------------------------------------------------------------------------

    def check(self, prompt: Prompt, ids: list[int], config: GenerateConfig) -> tuple[str, ...]:
        """See `RemoteDecoder`."""
        for name, (only, why) in _REFUSED.items():
            if (value := getattr(config, name)) != only:
                raise ConfigError(f"{name} must be {only} with a decoder on vLLM, not {value!r}: {why}")
        if config.seed is not None and config.seed > _SEEDS:
            raise ConfigError(f"seed must be at most {_SEEDS} with a decoder on vLLM, not {config.seed}")
        if prompt.prefix is not None and prompt.prefix.placement != "parallel" and prompt.prefix.embeddings is None:
            raise ConfigError(
                f"placement must be 'parallel' with a decoder on vLLM, not {prompt.prefix.placement!r}: its servers "
                "share segments between prompts, at the positions they were made at"
            )
        tokens = self._places(prompt) + len(ids)
        if self._longest and tokens + self._least(config) > self._longest:
            raise PromptTooLong(
                f"prompt and answer must fit the {self._longest} tokens that the vLLM servers were started for "
                f"(--max-model-len): the prompt has {tokens} and the answer may have {self._least(config)}; shorten "
                "the question or lower max_new_tokens"
            )
        hints = ", ".join(config.hint_weights)
        return (_OFF.format(hints),) if hints else ()

    def tokens(
        self, prompt: Prompt, ids: list[int], said: list[int], config: GenerateConfig, most: int, adapter: str | None
    ) -> Iterator[int]:
        """See `RemoteDecoder`."""
        if self._longest:
            most = min(most, self._longest - self._places(prompt) - len(ids) - len(said))
        if most < 1:
            return
        body = {
            "model": adapter or self._model,
            "max_tokens": most,
            "min_tokens": max(0, config.min_new_tokens - len(said)),
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.sample_top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": config.seed,
            "stop_token_ids": sorted(self.eos),
            "stream": True,
            "return_token_ids": True,
            "skip_special_tokens": False,
            **self._asked(prompt, [*ids, *said]),
        }
        prefix = prompt.prefix

        def request() -> dict[str, Any]:
            if prefix is None or prefix.embeddings is not None:
                return body
            return body | {"kv_transfer_params": sign(self._memory(prefix, prompt.tenant), self._keys)}

        reads = prefix is not None and prefix.embeddings is None
        for event in self._replicas.complete(request, _key(prompt, ids), self._forbidden() if reads else None):
            tokens = event["choices"][0].get("token_ids")
            if tokens is None:
                raise DecoderUnavailable(
                    f"a vLLM server must send token ids (return_token_ids), and one at {self.place} does not: start it "
                    "with a version that docs/vllm.md names"
                )
            yield from tokens

    def _forbidden(self) -> dict[str, Any]:
        """A request whose memory has expired."""
        expired = Memory(self._store, ("0" * 32,), self.template_tokens, expires=1)
        prompt = [*self.template.prefix_ids, *self.template.question_ids("?")]
        asked = {"model": self._model, "prompt": prompt, "max_tokens": 1}
        return asked | {"kv_transfer_params": sign(expired, self._keys)}

    def _memory(self, prefix: Prefix, tenant: str) -> Memory:
        """What the servers are told of a prefix."""
        ids = tuple(one.segment_id for one in prefix.segments if isinstance(one, SegmentReference))
        assert len(ids) == len(prefix.segments)
        return Memory(
            self._store,
            ids,
            self.template_tokens,
            prefix.focus,
            tuple(map(float, prefix.prior)),
            tenant,
            int(time.time()) + LIFETIME,
        )

    def _asked(self, prompt: Prompt, ids: list[int]) -> dict[str, Any]:
        """The prompt of a request: tokens; or embeddings of all of it, where it begins with such."""
        prefix = prompt.prefix
        if prefix is None or prefix.embeddings is None:
            return {"prompt": [*self.template.prefix_ids, *ids]}
        return {"prompt_embeds": encoded(self.embedded(prefix.embeddings, ids))}

    def _places(self, prompt: Prompt) -> int:
        """What stands before a prompt's text in what a server reads."""
        if prompt.prefix is None or prompt.prefix.embeddings is None:
            return self.template_tokens
        return len(prompt.prefix.embeddings)


def _key(prompt: Prompt, ids: list[int]) -> str:
    """What says which server answers: the best segment, else the prompt."""
    best = None if prompt.prefix is None else next(iter(prompt.prefix.segments), None)
    return best.segment_id if isinstance(best, SegmentReference) else hashlib.sha256(repr(ids).encode()).hexdigest()
