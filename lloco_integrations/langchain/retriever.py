"""The retriever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.messages import BaseMessage
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, Field

from lloco_engine import And, Engine, Filters, Hit, parse_filter
from lloco_integrations.handles import Handles
from lloco_integrations.langchain.documents import retrieved
from lloco_integrations.langchain.messages import turns

__all__ = ["LLoCORetriever"]


class LLoCORetriever(BaseRetriever):
    """Finds segments of an engine's store; what it returns is read by `ChatLLoCO` and `LLoCOLLM` as slots.

    ::

        retriever = LLoCORetriever(engine=engine, k=4)
        retriever.invoke("What does the pump need?")[0].page_content    # a handle

    Args:
        engine: whose store is searched.
        tenant: whose documents are found, and no other's.
        k: how many segments; also an argument of ``invoke``, as ``min_score`` is.
        filters: as in `Engine.retrieve`; also an argument of ``invoke``, where both must hold.
        neighbours: segments to add before and after each.
        min_score, lexical, floor: as in `RetrieveConfig`; None takes the engine's own. Where the best score is below
            the floor, the documents' metadata has a ``lloco_warning``.
        annotate: keep the real text as ``page_content``, and put the handle into ``metadata["lloco_handle"]``; for
            chains with a reranker, with ``document_prompt=PromptTemplate.from_template("{lloco_handle}")``.
        handles: mints handles; by default what all classes on the engine share.

    ``invoke`` also takes the conversation's ``history``, as messages: a follow-up is searched for with what the user
    said before. Leave it out where a chain has made the follow-up a question of its own.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    engine: Engine = Field(exclude=True, repr=False)
    tenant: str = ""
    k: int = Field(default=4, ge=1)
    filters: Any = None
    neighbours: int = Field(default=0, ge=0)
    min_score: float | None = None
    lexical: float | None = None
    floor: float | None = None
    annotate: bool = False
    handles: Handles | None = Field(default=None, exclude=True, repr=False)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **options: Any
    ) -> list[Document]:
        return self._documents(query, self.engine.retrieve(query, **self._options(**options)))

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **options: Any
    ) -> list[Document]:
        return self._documents(query, await self.engine.aretrieve(query, **self._options(**options)))

    def _options(
        self,
        k: int | None = None,
        filters: Filters | None = None,
        min_score: float | None = None,
        history: Sequence[BaseMessage] = (),
    ) -> dict[str, Any]:
        return {
            "top_k": self.k if k is None else k,
            "filters": And((parse_filter(self.filters), parse_filter(filters))),
            "neighbours": self.neighbours,
            "min_score": self.min_score if min_score is None else min_score,
            "lexical": self.lexical,
            "tenant": self.tenant,
            "history": turns(history),
        }

    def _documents(self, question: str, hits: Sequence[Hit]) -> list[Document]:
        handles = self.handles or Handles.of(self.engine)
        warning = self.engine.doubt(hits, self.floor)
        return retrieved(hits, question, handles, annotate=self.annotate, warning=warning)
