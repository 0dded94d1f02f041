"""A context chat engine whose searches know the conversation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Self

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.schema import NodeWithScore

from lloco_integrations.llama_index.retriever import LLoCORetriever

__all__ = ["LLoCOContextChatEngine"]


class LLoCOContextChatEngine(ContextChatEngine):
    """A `ContextChatEngine` that searches a follow-up with what the user said before.

    The engine of LlamaIndex searches each message by itself, so that "How large is it?" finds anything large. With an
    `LLoCORetriever`, this one lets the search see the conversation. `CondensePlusContextChatEngine` has no need of it:
    the decoder makes the follow-up a question of its own there, at the cost of one more answer.
    """

    def _get_nodes(self, message: str) -> list[NodeWithScore]:
        return super(LLoCOContextChatEngine, self._knowing(self._memory.get_all()))._get_nodes(message)

    async def _aget_nodes(self, message: str) -> list[NodeWithScore]:
        said = await self._memory.aget_all()
        return await super(LLoCOContextChatEngine, self._knowing(said))._aget_nodes(message)

    def _knowing(self, messages: Sequence[ChatMessage]) -> Self:
        knowing = copy.copy(self)
        if isinstance(self._retriever, LLoCORetriever):
            knowing._retriever = self._retriever.with_history(messages)
        return knowing
