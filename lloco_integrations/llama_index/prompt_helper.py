"""Packing prompts by what segments really cost: LlamaIndex would count a handle's letters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.indices.prompt_helper import PromptHelper

from lloco_engine import Engine, PromptTooLong
from lloco_integrations.handle_syntax import SENTINEL
from lloco_integrations.handles import Handles

__all__ = ["LLoCOPromptHelper", "TokenCounter"]


class TokenCounter:
    """A tokenizer for LlamaIndex: the decoder's token ids of a text, and one 0 for each slot behind its handles.

    Args:
        engine: whose tokenizer counts.
        handles: know what their segments cost; by default what all classes on the engine share.
    """

    def __init__(self, engine: Engine, handles: Handles | None = None) -> None:
        self._engine = engine
        self._handles = Handles.of(engine) if handles is None else handles

    def __call__(self, text: str) -> list[int]:
        plain = SENTINEL.sub("", text)
        slots = self._handles.slots(text) if len(plain) < len(text) else 0
        return self._engine.token_ids(plain) + [0] * slots


class LLoCOPromptHelper(PromptHelper):
    """A `PromptHelper` that refuses to drop a chunk's handle or to cut one in two. Made by `LLoCOLLM.prompt_helper`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)  # takes a tokenizer, which is no field

    @classmethod
    def class_name(cls) -> str:
        return "LLoCOPromptHelper"

    def truncate(self, prompt: Any, text_chunks: Sequence[str], *args: Any, **kwargs: Any) -> list[str]:
        """As `PromptHelper.truncate`; `PromptTooLong` where a segment would be left out."""
        return _whole(text_chunks, super().truncate(prompt, text_chunks, *args, **kwargs), self.context_window)

    def repack(self, prompt: Any, text_chunks: Sequence[str], *args: Any, **kwargs: Any) -> list[str]:
        """As `PromptHelper.repack`; `PromptTooLong` where one segment alone does not fit a prompt."""
        return _whole(text_chunks, super().repack(prompt, text_chunks, *args, **kwargs), self.context_window)


def _whole(given: Sequence[str], packed: list[str], window: int) -> list[str]:
    wanted = set(SENTINEL.findall("\n".join(given)))
    lost = wanted - {body for text in packed for body in SENTINEL.findall(text)}
    if lost:
        raise PromptTooLong(
            f"every segment must be read, and {len(lost)} of {len(wanted)} do not fit a prompt of {window} tokens and "
            "slots: retrieve fewer chunks, raise context_window, or use response_mode 'compact' or 'tree_summarize', "
            "which make several calls"
        )
    return packed
