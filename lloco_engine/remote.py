"""Decoders that run elsewhere, by the scheme of their names: ``vllm:http://host:8000`` and others.

An engine keeps documents, search, tenants and the making of prompts to itself, and asks such a decoder for tokens. A
package offers one through the entry-point group ``lloco.decoders``::

    [project.entry-points."lloco.decoders"]
    vllm = "lloco_integrations.vllm.client:VLLMDecoder"

and a user's file by `register_decoder` (`lloco_engine.plugins`).
"""

from __future__ import annotations

import re
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from lloco_engine import models
from lloco_engine.config import GenerateConfig
from lloco_engine.decoder.answering import AnsweringDecoder
from lloco_engine.decoder.prompt import Generation, Prompt
from lloco_engine.errors import ConfigError
from lloco_engine.plugins import run_plugins
from lloco_engine.pretrained import read_ends

if TYPE_CHECKING:
    import torch

    from lloco_engine.decoder.facts import DecoderFacts

__all__ = ["GROUP", "Address", "RemoteDecoder", "register_decoder"]

GROUP = "lloco.decoders"

_NAME = re.compile(r"([a-z][a-z0-9_]+):([^#]+)(?:#(.+))?")


class RemoteDecoder(AnsweringDecoder):
    """Base of decoders that run elsewhere: a class of one's own says how tokens are come by, and the rest is here.

    What ends an answer, its text, its thoughts and their budget are as with a decoder in this process.

    Args:
        place: where it runs, as the user wrote it after the scheme.
        facts: the decoder as its folder on this machine says it, from which no weights are read.
        manifest: that of the store, as ``manifest.json`` has it.

    folder : of the decoder on this machine
    """

    reads_by_id: ClassVar[bool] = True

    def __init__(self, place: str, facts: DecoderFacts, manifest: Mapping[str, Any]) -> None:
        folder = Path(models.decoder_folder(facts.name))
        super().__init__(
            facts.name,
            fingerprint=facts.fingerprint,
            tokenizer=facts.tokenizer,
            tokenizer_fingerprint=facts.tokenizer_fingerprint,
            template=facts.template,
            shape=facts.shape,
            eos=read_ends(folder, facts.tokenizer),
        )
        self.place, self.folder = place, folder

    @property
    def embeds(self) -> bool:
        """Whether `embedded` can be had: in decoders of Llama's shape an input embedding is a row of a table."""
        return not self.shape.immovable

    def embedded(self, vectors: torch.Tensor, ids: list[int]) -> torch.Tensor:
        """Input embeddings (S + T, E) of vectors (S, E) and T tokens after them, in the type of the decoder's weights.

        Raises:
            ModelNotFound: the decoder's folder here holds no table of input embeddings.
        """
        import torch

        table = self._table
        return torch.cat((vectors.to(table.dtype), table[torch.tensor(ids, dtype=torch.int64)]))

    @cached_property
    def _table(self) -> torch.Tensor:
        return models.read_tensor(self.folder, "embed_tokens.weight")

    @property
    def device(self) -> None:
        """None: its passes run elsewhere."""
        return None

    @abstractmethod
    def check(self, prompt: Prompt, ids: list[int], config: GenerateConfig) -> tuple[str, ...]:
        """Refuse what cannot be done, before anything is sent.

        Args:
            prompt: what is asked.
            ids: tokens of its text.
            config: how tokens are to be chosen. Of it ``max_new_tokens``, ``stop`` and ``reasoning_tokens`` are seen
                to here.

        Returns:
            what is to be said in the answer's warnings.

        Raises:
            ConfigError: a setting that cannot be had, by its name.
            PromptTooLong: the prompt does not fit.
        """

    @abstractmethod
    def tokens(
        self, prompt: Prompt, ids: list[int], said: list[int], config: GenerateConfig, most: int, adapter: str | None
    ) -> Iterator[int]:
        """The tokens that follow a prompt and what was said after it, as they come.

        It is closed where no more are wanted, and must then let the decoder go.

        Args:
            prompt: its ``prefix`` holds references to segments, or embeddings, which stand before all text.
            ids: tokens of its text, the template prefix left aside where slots are read after it.
            said: tokens of the answer so far.
            config: how tokens are chosen.
            most: tokens that may follow.
            adapter: name of a loaded one; None for the base weights.

        Raises:
            DecoderUnavailable: it cannot be reached, or refuses.
        """

    def _checked_ids(self, prompt: Prompt, config: GenerateConfig) -> list[int]:
        ids = super()._checked_ids(prompt, config)
        self.check(prompt, ids, config)
        return ids

    def _answer(
        self, prompt: Prompt, ids: list[int], config: GenerateConfig, adapter: str | None, generation: Generation
    ) -> Iterator[str]:
        from lloco_engine.decoder.decoding import Row
        from lloco_engine.decoder.processors import Pipeline

        adapter = None if adapter == "none" else adapter
        generation.notes = self.check(prompt, ids, config)
        budget = self._budget(self.position(prompt) + len(ids), config)
        text = self._text(config, budget)
        row = Row(generation, text, Pipeline(()), config.max_new_tokens, self.eos, time.perf_counter())
        most, said = self._least(config) + budget, generation.token_ids
        source: Iterator[int] | None = None
        try:
            while not row.ended:
                token = text.must_follow()
                if token is not None:  # its thoughts are ended for it, and it goes on after that
                    _close(source)
                    source = None
                else:
                    source = source or self.tokens(prompt, ids, [*said], config, most - len(said), adapter)
                    token = next(source, None)
                new = row.end("length" if len(said) >= most else "stop") if token is None else row.take(token)
                if new:
                    yield new
        finally:
            _close(source)


def _close(source: Iterator[int] | None) -> None:
    close = getattr(source, "close", None)
    if close is not None:
        close()


# -- by name ---------------------------------------------------------------------------------------------------------

Opens = Callable[[str, "DecoderFacts", Mapping[str, Any]], RemoteDecoder]

_registered: dict[str, Opens] = {}
_Opens = TypeVar("_Opens", bound=Opens)


def register_decoder(scheme: str, opens: _Opens) -> _Opens:
    """Make decoders that run elsewhere known by the scheme of their names, in this process. Returns ``opens``.

    Args:
        scheme: two or more small letters, digits and _.
        opens: a class derived from `RemoteDecoder`, or a function that takes what such a class does.

    Raises:
        ConfigError: the scheme cannot be one.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]+", scheme) or not callable(opens):
        raise ConfigError(f"a decoder's scheme must be two or more small letters, digits and _, not {scheme!r}")
    _registered[scheme] = opens
    return opens


@dataclass(frozen=True)
class Address:
    """The name of a decoder that runs elsewhere, ``SCHEME:PLACE#LOCAL``.

    ``local`` names the same decoder on this machine, for its tokenizer and its sizes; "" where that is the store's.
    """

    scheme: str
    place: str
    local: str
    opens: Opens

    @classmethod
    def of(cls, name: object) -> Address | None:
        """What a name says; None where its scheme is none of a decoder that runs elsewhere."""
        found = _NAME.fullmatch(name) if isinstance(name, str) else None
        if found is None:
            return None
        scheme, place, local = found.groups()
        if scheme not in _registered:
            run_plugins()
        if scheme not in _registered:
            for point in entry_points(group=GROUP, name=scheme):
                register_decoder(scheme, point.load())
        opens = _registered.get(scheme)
        return None if opens is None else cls(scheme, place, local or "", opens)
