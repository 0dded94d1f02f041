"""The engine's store as a vector store of LlamaIndex, so that its upserts and deletes reach the segments."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)

from lloco_engine import And, Condition, ConfigError, Engine, Filter, Hit, Not, Or, parse_filter
from lloco_integrations.handles import Handles
from lloco_integrations.llama_index.documents import ID, NODE, REF, ingest_nodes, node_of

__all__ = ["LLoCOVectorStore"]


class LLoCOVectorStore(BasePydanticVectorStore):
    """Nodes with their text, segments and search vectors, in the engine's store. What is on disk is all there is.

    Adding a node compresses it; deleting it, or the document it was cut from, removes its segments. Search is by the
    engine's own embedder and small search windows; embeddings that the index made are not used.

    Args:
        engine: whose store.
        tenant: whose nodes; no other's are ever seen.
        min_score, lexical: as in `RetrieveConfig`; None takes the engine's own.
        inner: another vector store that searches instead; this one then only keeps the segments in step with it.
        handles: takes turns with other writers; by default what all classes on the engine share.
    """

    stores_text: bool = True
    is_embedding_query: bool = False
    tenant: str = Field(default="", description="Whose nodes.")

    min_score: float | None = Field(default=None, description="Nodes with a lower score are not found.")
    lexical: float | None = Field(default=None, description="Share of the question's own words in a score.")

    _engine: Engine = PrivateAttr()
    _handles: Handles = PrivateAttr()
    _inner: BasePydanticVectorStore | None = PrivateAttr(default=None)

    def __init__(
        self,
        engine: Engine,
        *,
        tenant: str = "",
        min_score: float | None = None,
        lexical: float | None = None,
        inner: BasePydanticVectorStore | None = None,
        handles: Handles | None = None,
    ) -> None:
        fields: dict[str, Any] = {"tenant": tenant, "min_score": min_score, "lexical": lexical}
        if inner is not None:
            fields |= {"stores_text": inner.stores_text, "is_embedding_query": inner.is_embedding_query}
        super().__init__(**fields)
        self._engine = engine
        self._inner = inner
        self._handles = Handles.of(engine) if handles is None else handles

    @classmethod
    def class_name(cls) -> str:
        return "LLoCOVectorStore"

    @property
    def client(self) -> Engine:
        """The engine."""
        return self._engine

    def for_scope(self, tenant: str) -> Self:
        """The same for another tenant."""
        return self.model_copy(update={"tenant": tenant})

    # -- writing --------------------------------------------------------------------------------------------------

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Compress nodes into the store; a node with a known id replaces the earlier one.

        A node that cannot be stored is named in a warning, and the others are stored. Returns the ids of all, as an
        index wants them.

        Raises:
            DocumentError: none of several, or the only one, could be stored, and not because they were blank.
        """
        ingest_nodes(self._engine, nodes, self.tenant, self._handles)
        if self._inner is not None:
            return self._inner.add(list(nodes), **kwargs)
        return [node.node_id for node in nodes]

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Remove every node that was cut from a document, with its segments; none is no error."""
        if self._inner is not None:
            self._inner.delete(ref_doc_id, **delete_kwargs)
        self._delete(Condition(REF, "in", (ref_doc_id,), private=True))

    def delete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Remove the nodes of these ids that meet the filters, with their segments."""
        if self._inner is not None:
            self._inner.delete_nodes(node_ids, filters, **delete_kwargs)
        self._delete(_wanted(node_ids, filters))

    def clear(self) -> None:
        """Remove every node of the tenant, with its segments."""
        if self._inner is not None:
            self._inner.clear()
        self._delete(_IS_NODE)

    def _delete(self, wanted: Filter) -> None:
        with self._handles.compressing:
            self._engine.delete_all(self._engine.store.find_documents(wanted, self.tenant), self.tenant)

    # -- reading --------------------------------------------------------------------------------------------------

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """The nodes of these ids (all of them for None), in their order, that meet the filters."""
        store = self._engine.store
        found = set(store.find_documents(_wanted(node_ids, filters), self.tenant))
        ids = sorted(found) if node_ids is None else [node_id for node_id in node_ids if node_id in found]
        return [node_of(document) for document in store.load_documents(ids, self.tenant)]

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """The nodes whose segments the engine finds for ``query_str``, best first, with their scores.

        Filters act inside the search; what they mean is in `lloco_engine.filters`.

        Raises:
            ConfigError: the query has no text, asks for another mode than the default, or a filter is not understood.
        """
        if self._inner is not None:
            return self._inner.query(query, **kwargs)
        mode = VectorStoreQueryMode(query.mode)
        if mode not in (VectorStoreQueryMode.DEFAULT, VectorStoreQueryMode.TEXT_SEARCH):
            raise ConfigError(f"query mode must be 'default' or 'text_search', not {mode.value!r}")
        if not query.query_str:
            raise ConfigError("a query must have its text in query_str: the store searches with its own embedder")
        wanted = _wanted(query.node_ids or None, query.filters)
        if query.doc_ids:
            wanted = And((wanted, Condition(REF, "in", tuple(query.doc_ids), private=True)))
        found = self._search(query.query_str, query.similarity_top_k, wanted)
        documents = self._engine.store.load_documents(list(found), self.tenant)  # one may have gone since
        return VectorStoreQueryResult(
            nodes=[node_of(document) for document in documents],
            similarities=[found[document.doc_id].score for document in documents],
            ids=[document.doc_id for document in documents],
        )

    def _search(self, question: str, wanted: int, filters: Filter) -> dict[str, Hit]:
        """The best hit of each of the best nodes. A long node has several segments, so more of those may be needed."""
        top_k = wanted
        while True:
            hits = self._engine.retrieve(
                question,
                top_k=top_k,
                filters=filters,
                min_score=self.min_score,
                lexical=self.lexical,
                tenant=self.tenant,
            )
            best: dict[str, Hit] = {}
            for hit in hits:
                best.setdefault(hit.doc_id, hit)
            if len(best) >= wanted or len(hits) < top_k:
                return dict(list(best.items())[:wanted])
            top_k *= 2

    # -- async twins, in a thread -----------------------------------------------------------------------------------

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        return await asyncio.to_thread(self.add, nodes, **kwargs)

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        await asyncio.to_thread(self.delete, ref_doc_id, **delete_kwargs)

    async def adelete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        await asyncio.to_thread(self.delete_nodes, node_ids, filters, **delete_kwargs)

    async def aclear(self) -> None:
        await asyncio.to_thread(self.clear)

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        return await asyncio.to_thread(self.get_nodes, node_ids, filters)

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        return await asyncio.to_thread(self.query, query, **kwargs)

    def persist(self, persist_path: str, fs: Any = None) -> None:
        """The engine's store is on disk already; an inner store is asked to persist itself."""
        if self._inner is not None:
            self._inner.persist(persist_path, fs)


_IS_NODE = Condition(NODE, "exists", private=True)


def _wanted(node_ids: Sequence[str] | None, filters: MetadataFilters | None) -> Filter:
    """Documents of the store that are nodes, with one of these ids if any are given, and meet the filters."""
    ids = () if node_ids is None else (Condition(ID, "in", tuple(node_ids), private=True),)
    return And((_IS_NODE, *ids, _knowing_refs(parse_filter(filters))))


def _knowing_refs(part: Filter) -> Filter:
    """A filter whose key ``ref_doc_id`` also means the document that a node was cut from."""
    match part:
        case Condition(key="ref_doc_id"):
            return Or((part, replace(part, key=REF, private=True)))
        case Not():
            return Not(_knowing_refs(part.part))
        case And() | Or():
            return type(part)(tuple(_knowing_refs(inner) for inner in part.parts))
    return part
