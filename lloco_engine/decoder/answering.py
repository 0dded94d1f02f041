"""A decoder as far as its prompts go: token ids, positions and text of answers, whatever runs its passes, and where."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lloco_engine.config import GenerateConfig
from lloco_engine.decoder.prompt import Generation, Prompt
from lloco_engine.decoder.stopping import TextStream
from lloco_engine.decoder.template import Template
from lloco_engine.decoder.thoughts import Thoughts
from lloco_engine.errors import PromptTooLong
from lloco_engine.shape import DecoderShape

if TYPE_CHECKING:
    import torch

__all__ = ["AnsweringDecoder"]


class AnsweringDecoder(ABC):
    """What an engine needs of a decoder to have questions answered.

    Args:
        name: what the user called it.
        fingerprint, tokenizer_fingerprint: as `lloco_engine.fingerprints` makes them; a decoder that was never in a
            folder may take its own later.
        tokenizer: its tokenizer.
        template: the fixed text of its prompts.
        shape: its sizes.
        eos: tokens that end an answer.
    """

    reads_by_id: ClassVar[bool] = False  # slots are read elsewhere: a prefix holds `SegmentReference`s

    fingerprint: str

    def __init__(
        self,
        name: str,
        *,
        fingerprint: str,
        tokenizer: Any,
        tokenizer_fingerprint: str,
        template: Template,
        shape: DecoderShape,
        eos: Iterable[int],
    ) -> None:
        self.name = name
        self.fingerprint = fingerprint
        self.tokenizer, self.tokenizer_fingerprint = tokenizer, tokenizer_fingerprint
        self.template, self.shape, self.eos = template, shape, set(eos)
        self._thoughts = Thoughts.of(tokenizer, template)

    @property
    def template_tokens(self) -> int:
        """Tokens of the template prefix."""
        return len(self.template.prefix_ids)

    @property
    @abstractmethod
    def device(self) -> torch.device | None:
        """Where its passes run; None where that is not in this process."""

    @property
    @abstractmethod
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that are loaded."""

    @abstractmethod
    def load_adapter(self, folder: str | Path, name: str) -> None:
        """Have answers with the adapter in a folder under a name.

        Raises:
            AdapterError: the folder holds no adapter for this decoder, the name is taken, or it cannot be had.
        """

    def warm(self) -> None:  # noqa: B027
        """Have all ready that the first answer would wait for."""

    def close(self) -> None:  # noqa: B027
        """Let go of what leads to it, where it runs elsewhere."""

    # -- prompts ----------------------------------------------------------------------------------------------

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

        Embeddings stand before the template prefix, which then is a part of the text.
        """
        before = [] if prompt.prefix is None or prompt.prefix.embeddings is None else self.template.prefix_ids
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

    # -- answers ----------------------------------------------------------------------------------------------

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
        generation, ids = Generation(), self._checked_ids(prompt, config)
        generation.prompt_tokens = len(ids)
        return generation, self._answer(prompt, ids, config, adapter, generation)

    @abstractmethod
    def _answer(
        self, prompt: Prompt, ids: list[int], config: GenerateConfig, adapter: str | None, generation: Generation
    ) -> Iterator[str]:
        """Fill a generation with the answer to a prompt whose text has these ids; yields its text as it comes."""

    def _checked_ids(self, prompt: Prompt, config: GenerateConfig) -> list[int]:
        ids = self.prompt_ids(prompt)
        self.check_window(self.position(prompt), len(ids), self._least(config))
        return ids

    def _text(self, config: GenerateConfig, budget: int) -> TextStream:
        """What makes text of an answer's tokens, of which thoughts may take ``budget``."""
        return TextStream(self.tokenizer, config.stop, self._thoughts, budget)

    def _least(self, config: GenerateConfig) -> int:
        """Tokens that an answer must have room for: its own, and the markers of thoughts."""
        if (thoughts := self._thoughts) is None:
            return config.max_new_tokens
        return config.max_new_tokens + sum(map(len, (thoughts.begin, thoughts.close, thoughts.head)))

    def _budget(self, used: int, config: GenerateConfig) -> int:
        """Tokens that thoughts may take after ``used`` positions: what is asked for, as far as the window has room."""
        if self._thoughts is None:
            return 0
        return max(0, min(config.reasoning_tokens, self.shape.window - used - self._least(config)))
