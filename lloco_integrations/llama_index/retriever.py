"""The engine's own search as a retriever of LlamaIndex."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.schema import NodeRelationship, NodeWithScore, QueryBundle, RelatedNodeInfo, TextNode

from lloco_engine import Engine, Filters, Hit, Turn
from lloco_integrations.handle_syntax import neutralise
from lloco_integrations.handles import Handles
from lloco_integrations.llama_index.node import OF_THE_QUESTION, WARNING, LLoCONode
from lloco_integrations.settings import SEARCH, check_search

__all__ = ["LLoCORetriever"]


class LLoCORetriever(BaseRetriever):
    """Retrieves segments by the engine's search windows; the nodes show the model handles already.

    A node's ``start_char_idx`` and ``end_char_idx`` are the chunk's place in its document, and ``metadata["windows"]``
    the places of the search windows that matched, best first: verbatim citations. Where the document has pages,
    ``metadata["page_label"]`` is that on which the best window begins.

    Args:
        engine: whose store is searched.
        filters: which documents may be found: LlamaIndex's ``MetadataFilters``, or a mapping; `lloco_engine.filters`.
        history: of the conversation: a follow-up is searched for with what the user said before. Leave it out where a
            chat engine condenses the question itself. See `with_history`.
        tenant: whose documents.
        handles: mints them; by default what all classes on the engine share.
        settings: those of `RetrieveConfig`, ``top_k`` for instance, of which None takes the engine's own. Where the
            best score is below the floor, the nodes' metadata, and so the response's, has a ``lloco_warning``. Also
            what `BaseRetriever` takes.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        filters: Filters | None = None,
        tenant: str = "",
        history: Sequence[Turn] = (),
        handles: Handles | None = None,
        **settings: Any,
    ) -> None:
        search = {name: settings.pop(name, None) for name in SEARCH}
        super().__init__(**settings)
        check_search(search)
        self._engine = engine
        self._options: dict[str, Any] = search | {"filters": filters, "tenant": tenant, "history": tuple(history)}
        self._handles = Handles.of(engine) if handles is None else handles

    def for_scope(self, tenant: str) -> LLoCORetriever:
        """The same for another tenant."""
        return LLoCORetriever(self._engine, handles=self._handles, **(self._options | {"tenant": tenant}))

    def with_history(self, messages: Sequence[ChatMessage]) -> LLoCORetriever:
        """The same in a conversation, for the next question."""
        history = [
            Turn("user" if message.role == MessageRole.USER else "assistant", neutralise(message.content or ""))
            for message in messages
            if message.role in (MessageRole.USER, MessageRole.ASSISTANT, MessageRole.CHATBOT)
        ]
        return LLoCORetriever(self._engine, handles=self._handles, **(self._options | {"history": history}))

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        question = query_bundle.query_str
        return self._nodes(question, self._engine.retrieve(question, **self._options))

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        question = query_bundle.query_str
        return self._nodes(question, await self._engine.aretrieve(question, **self._options))

    def _nodes(self, question: str, hits: list[Hit]) -> list[NodeWithScore]:
        warning = self._engine.doubt(hits, self._options["floor"])
        more = {WARNING: warning} if warning else {}
        return [
            NodeWithScore(node=_node(hit, self._handles.mint([hit], question), more), score=hit.score) for hit in hits
        ]


def _node(hit: Hit, view: str, more: dict[str, str]) -> LLoCONode:
    ours = {"title": hit.title, "source": hit.source, "windows": [[w.start, w.end] for w in hit.windows], **more}
    pages = {} if hit.page is None else {"page_label": hit.page.name}  # as LlamaIndex's readers name it
    hidden = sorted(OF_THE_QUESTION)
    node = TextNode(
        id_=hit.segment_id,
        text=hit.text,
        metadata={**pages, **hit.metadata, **ours},
        excluded_llm_metadata_keys=hidden,
        excluded_embed_metadata_keys=hidden,
        relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=hit.doc_id)},
        start_char_idx=hit.span.start,
        end_char_idx=hit.span.end,
    )
    return LLoCONode.showing(node, view)
