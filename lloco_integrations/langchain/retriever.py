"""The retriever."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.messages import BaseMessage
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, Field, create_model, model_validator

from lloco_engine import And, Engine, Filters, Hit, parse_filter
from lloco_integrations.handles import Handles
from lloco_integrations.langchain.documents import retrieved
from lloco_integrations.langchain.messages import turns
from lloco_integrations.settings import SEARCH, check_search, pydantic_fields

__all__ = ["LLoCORetriever"]


_SETTINGS = {"k" if name == "top_k" else name: one for name, one in SEARCH.items()}  # as LangChain's own have it

if TYPE_CHECKING:
    _Retriever = BaseRetriever
else:
    _Retriever = create_model("_Retriever", __base__=BaseRetriever, **pydantic_fields(_SETTINGS))


class LLoCORetriever(_Retriever):
    """Finds segments of an engine's store; what it returns is read by `ChatLLoCO` and `LLoCOLLM` as slots.

    ::

        retriever = LLoCORetriever(engine=engine, k=4)
        retriever.invoke("What does the pump need?")[0].page_content    # a handle

    Args:
        engine: whose store is searched.
        tenant: whose documents are found, and no other's.
        k: how many segments; None takes the engine's own, as it does of other settings.
        filters: as in `Engine.retrieve`; also an argument of ``invoke``, where both must hold.
        annotate: keep the real text as ``page_content``, and put the handle into ``metadata["lloco_handle"]``; for
            chains with a reranker, with ``document_prompt=PromptTemplate.from_template("{lloco_handle}")``.
        handles: mints handles; by default what all classes on the engine share.
        settings: those of `RetrieveConfig`, also arguments of ``invoke``. Where the best score is below the floor, the
            documents' metadata has a ``lloco_warning``.

    ``invoke`` also takes the conversation's ``history``, as messages: a follow-up is searched for with what the user
    said before. Leave it out where a chain has made the follow-up a question of its own.
    """

    if TYPE_CHECKING:

        def __init__(self, *, engine: Engine, **settings: Any) -> None: ...

    model_config = ConfigDict(arbitrary_types_allowed=True)

    engine: Engine = Field(exclude=True, repr=False)
    tenant: str = ""
    filters: Any = None
    annotate: bool = False
    handles: Handles | None = Field(default=None, exclude=True, repr=False)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **options: Any
    ) -> list[Document]:
        asked = self._options(**options)
        return self._documents(query, self.engine.retrieve(query, **asked), asked["floor"])

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **options: Any
    ) -> list[Document]:
        asked = self._options(**options)
        return self._documents(query, await self.engine.aretrieve(query, **asked), asked["floor"])

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        check_search(self._search({}))
        return self

    def _search(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a search, those that are given first."""
        wanted = {name: given.get(name) for name in _SETTINGS}
        return {
            one.name: getattr(self, name) if wanted[name] is None else wanted[name] for name, one in _SETTINGS.items()
        }

    def _options(
        self, filters: Filters | None = None, history: Sequence[BaseMessage] = (), **given: Any
    ) -> dict[str, Any]:
        if unknown := sorted(set(given) - set(_SETTINGS)):
            raise TypeError(f"a call takes filters, history, {', '.join(_SETTINGS)}, not {unknown[0]!r}")
        return {
            "filters": And((parse_filter(self.filters), parse_filter(filters))),
            "tenant": self.tenant,
            "history": turns(history),
            **self._search(given),
        }

    def _documents(self, question: str, hits: Sequence[Hit], floor: float | None) -> list[Document]:
        handles = self.handles or Handles.of(self.engine)
        warning = self.engine.doubt(hits, floor)
        return retrieved(hits, question, handles, annotate=self.annotate, warning=warning)
