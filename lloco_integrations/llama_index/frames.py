"""The default prompts of LlamaIndex that the model takes apart, so that the engine's own template serves instead."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from llama_index.core.chat_engine.condense_plus_context import (
    DEFAULT_CONTEXT_PROMPT_TEMPLATE as CONDENSE_PLUS_CONTEXT,
)
from llama_index.core.chat_engine.context import DEFAULT_CONTEXT_TEMPLATE as CONTEXT
from llama_index.core.prompts import BasePromptTemplate, ChatPromptTemplate, PromptTemplate
from llama_index.core.prompts.chat_prompts import TEXT_QA_SYSTEM_PROMPT
from llama_index.core.prompts.default_prompts import DEFAULT_TEXT_QA_PROMPT_TMPL, DEFAULT_TREE_SUMMARIZE_TMPL

from lloco_engine import ConfigError
from lloco_integrations.prompt_parser import Frame

__all__ = ["frames_of", "question_frames", "system_frames"]

_LIST = re.compile(r"\s*\[(?:'.*'|\".*\")\]\s*", re.DOTALL)


class _ListFrame(Frame):
    """A frame whose context may be the printed form of a list with one text, as simple_summarize writes it."""

    def match(self, text: str) -> tuple[str, str] | None:
        found = super().match(text)
        if found is None or not _LIST.fullmatch(found[0]):
            return found
        inner = found[0].strip()[2:-2]
        return inner.replace("\\n", "\n").replace("\\'", "'").strip(), found[1]


def question_frames() -> list[Frame]:
    """Of the user's message: question answering and tree_summarize."""
    return [_ListFrame(DEFAULT_TEXT_QA_PROMPT_TMPL), _ListFrame(DEFAULT_TREE_SUMMARIZE_TMPL)]


def system_frames() -> list[Frame]:
    """Of the system's message: question answering, and the chat engines that write the context there."""
    return [
        Frame(TEXT_QA_SYSTEM_PROMPT.content or "", question=""),
        Frame(CONTEXT + "{rest}", question="rest"),
        Frame(CONDENSE_PLUS_CONTEXT + "{rest}", question="rest"),
    ]


def frames_of(prompts: Iterable[BasePromptTemplate | str]) -> list[Frame]:
    """Frames of a user's own question-answering prompts.

    Raises:
        ConfigError: a prompt is not a text with a slot ``{query_str}``.
    """
    frames: list[Frame] = []
    for prompt in prompts:
        if isinstance(prompt, ChatPromptTemplate):
            texts = [
                str(message.content) for message in prompt.message_templates if "{query_str}" in str(message.content)
            ]
        else:
            texts = [prompt.template if isinstance(prompt, PromptTemplate) else str(prompt)]
        if not any("{query_str}" in text for text in texts):
            raise ConfigError(
                f"a prompt to take apart must have the slot {{query_str}}, and {json.dumps(texts)} has not"
            )
        frames += map(_ListFrame, texts)
    return frames
