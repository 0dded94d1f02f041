"""The engine's store as a vector store of LlamaIndex, so that its upserts and deletes reach the segments."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
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
from llama_index.core.vector_stores.utils import build_metadata_filter_fn

from lloco_engine import ConfigError, Engine, Hit
from lloco_integrations.handles import Handles
from lloco_integrations.llama_index.documents import NODE, REF, delete_documents, ingest_nodes, node_of

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
        """Compress nodes into the store; a node with a known id replaces the earlier one."""
        ingest_nodes(self._engine, nodes, self.tenant, self._handles)
        if self._inner is not None:
            return self._inner.add(list(nodes), **kwargs)
        return [node.node_id for node in nodes]

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Remove every node that was cut from a document, with its segments; none is no error."""
        if self._inner is not None:
            self._inner.delete(ref_doc_id, **delete_kwargs)
        self._delete(doc_id for doc_id, metadata in self._all().items() if metadata[REF] == ref_doc_id)

    def delete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Remove the nodes of these ids that meet the filters, with their segments."""
        if self._inner is not None:
            self._inner.delete_nodes(node_ids, filters, **delete_kwargs)
        self._delete(self._matching(node_ids, filters))

    def clear(self) -> None:
        """Remove every node of the tenant, with its segments."""
        if self._inner is not None:
            self._inner.clear()
        self._delete(list(self._all()))

    def _delete(self, doc_ids: Any) -> None:
        delete_documents(self._engine, list(doc_ids), self.tenant, self._handles)

    # -- reading --------------------------------------------------------------------------------------------------

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """The nodes of these ids (all of them for None) that meet the filters."""
        known = self._all()
        return [self._node(doc_id, known[doc_id]) for doc_id in self._matching(node_ids, filters)]

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """The nodes whose segments the engine finds for ``query_str``, best first, with their scores.

        Raises:
            ConfigError: the query has no text, or asks for another mode than the default.
        """
        if self._inner is not None:
            return self._inner.query(query, **kwargs)
        mode = VectorStoreQueryMode(query.mode)
        if mode not in (VectorStoreQueryMode.DEFAULT, VectorStoreQueryMode.TEXT_SEARCH):
            raise ConfigError(f"query mode must be 'default' or 'text_search', not {mode.value!r}")
        if not query.query_str:
            raise ConfigError("a query must have its text in query_str: the store searches with its own embedder")
        filters: dict[str, Any] | None = None
        if query.node_ids or query.doc_ids or query.filters:
            allowed = set(self._matching(query.node_ids or None, query.filters))
            if query.doc_ids:
                refs = set(query.doc_ids)
                allowed = {doc_id for doc_id, metadata in self._all().items() if metadata[REF] in refs} & allowed
            filters = {"doc_id": sorted(allowed)}
        found = self._search(query.query_str, query.similarity_top_k, filters)
        return VectorStoreQueryResult(
            nodes=[self._node(doc_id, hit.metadata) for doc_id, hit in found.items()],
            similarities=[hit.score for hit in found.values()],
            ids=list(found),
        )

    def _search(self, question: str, wanted: int, filters: dict[str, Any] | None) -> dict[str, Hit]:
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
                if NODE in hit.metadata:
                    best.setdefault(hit.doc_id, hit)
            if len(best) >= wanted or len(hits) < top_k:
                return dict(list(best.items())[:wanted])
            top_k *= 2

    def _node(self, doc_id: str, metadata: Any) -> BaseNode:
        return node_of(self._engine, doc_id, self.tenant, metadata)

    def _all(self) -> dict[str, Any]:
        """Metadata of every store document of the tenant that is a node, by its id."""
        return {
            info.doc_id: dict(info.metadata) | {"title": info.title, "source": info.source}
            for info in self._engine.documents(self.tenant)
            if NODE in info.metadata
        }

    def _matching(self, node_ids: list[str] | None, filters: MetadataFilters | None) -> list[str]:
        known = self._all()
        wanted = known if node_ids is None else [doc_id for doc_id in dict.fromkeys(node_ids) if doc_id in known]
        fits = build_metadata_filter_fn(lambda doc_id: known[doc_id], filters)
        return [doc_id for doc_id in wanted if fits(doc_id)]

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
