"""The engine's embedder as an embedding model of LlamaIndex."""

from __future__ import annotations

import asyncio
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr

from lloco_engine import Engine
from lloco_integrations.questions import question_vector

__all__ = ["LLoCOEmbedding"]


class LLoCOEmbedding(BaseEmbedding):
    """The embedder that the engine searches with, for an index that asks for one.

    Args:
        engine: whose embedder.
        more: as for `BaseEmbedding`.
    """

    _engine: Engine = PrivateAttr()

    def __init__(self, engine: Engine, **more: Any) -> None:
        super().__init__(**({"model_name": engine.embedder.name} | more))
        self._engine = engine

    @classmethod
    def class_name(cls) -> str:
        return "LLoCOEmbedding"

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return [[float(number) for number in vector] for vector in self._engine.embedder.encode(texts)]

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return [float(number) for number in question_vector(self._engine, query)]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)
