"""The retriever."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, Field

from lloco_engine import Engine, Hit
from lloco_integrations.handles import Handles
from lloco_integrations.langchain.documents import retrieved

__all__ = ["LLoCORetriever"]


class LLoCORetriever(BaseRetriever):
    """Finds segments of an engine's store; what it returns is read by `ChatLLoCO` and `LLoCOLLM` as slots.

    ::

        retriever = LLoCORetriever(engine=engine, k=4)
        retriever.invoke("What does the pump need?")[0].page_content    # a handle

    Args:
        engine: whose store is searched.
        tenant: whose documents are found, and no other's.
        k: how many segments; also an argument of ``invoke``.
        filters: as in `Engine.retrieve`; also an argument of ``invoke``, where they come on top.
        neighbours: segments to add before and after each.
        annotate: keep the real text as ``page_content``, and put the handle into ``metadata["lloco_handle"]``; for
            chains with a reranker, with ``document_prompt=PromptTemplate.from_template("{lloco_handle}")``.
        handles: mints handles; by default what all classes on the engine share.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    engine: Engine = Field(exclude=True, repr=False)
    tenant: str = ""
    k: int = Field(default=4, ge=1)
    filters: dict[str, Any] | None = None
    neighbours: int = Field(default=0, ge=0)
    annotate: bool = False
    handles: Handles | None = Field(default=None, exclude=True, repr=False)

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        filters: Mapping[str, Any] | None = None,
    ) -> list[Document]:
        return self._documents(self.engine.retrieve(query, **self._options(k, filters)))

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        k: int | None = None,
        filters: Mapping[str, Any] | None = None,
    ) -> list[Document]:
        return self._documents(await self.engine.aretrieve(query, **self._options(k, filters)))

    def _options(self, k: int | None, filters: Mapping[str, Any] | None) -> dict[str, Any]:
        return {
            "top_k": self.k if k is None else k,
            "filters": {**(self.filters or {}), **(filters or {})},
            "neighbours": self.neighbours,
            "tenant": self.tenant,
        }

    def _documents(self, hits: Sequence[Hit]) -> list[Document]:
        handles = self.handles or Handles.of(self.engine)
        return [retrieved(hit, handles, annotate=self.annotate) for hit in hits]
