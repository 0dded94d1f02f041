"""The engine's own search as a retriever of LlamaIndex."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import NodeRelationship, NodeWithScore, QueryBundle, RelatedNodeInfo, TextNode

from lloco_engine import Engine, Hit
from lloco_integrations.handles import Handles
from lloco_integrations.llama_index.node import LLoCONode

__all__ = ["LLoCORetriever"]


class LLoCORetriever(BaseRetriever):
    """Retrieves segments by the engine's search windows; the nodes show the model handles already.

    A node's ``start_char_idx`` and ``end_char_idx`` are the chunk's place in its document, and ``metadata["windows"]``
    the places of the search windows that matched, best first: verbatim citations.

    Args:
        engine: whose store is searched.
        top_k: how many segments.
        filters: metadata key, doc_id, source or title, to a value or a collection of them.
        neighbours: segments to add before and after each.
        tenant: whose documents.
        handles: mints them; by default what all classes on the engine share.
        more: as for `BaseRetriever`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        top_k: int = 4,
        filters: dict[str, Any] | None = None,
        neighbours: int = 0,
        tenant: str = "",
        handles: Handles | None = None,
        **more: Any,
    ) -> None:
        super().__init__(**more)
        self._engine = engine
        self._options: dict[str, Any] = {
            "top_k": top_k,
            "filters": filters,
            "neighbours": neighbours,
            "tenant": tenant,
        }
        self._handles = Handles.of(engine) if handles is None else handles

    def for_scope(self, tenant: str) -> LLoCORetriever:
        """The same for another tenant."""
        return LLoCORetriever(self._engine, handles=self._handles, **(self._options | {"tenant": tenant}))

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self._nodes(self._engine.retrieve(query_bundle.query_str, **self._options))

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self._nodes(await self._engine.aretrieve(query_bundle.query_str, **self._options))

    def _nodes(self, hits: list[Hit]) -> list[NodeWithScore]:
        return [NodeWithScore(node=_node(hit, self._handles.mint([hit])), score=hit.score) for hit in hits]


def _node(hit: Hit, view: str) -> LLoCONode:
    ours = {"title": hit.title, "source": hit.source, "windows": [[w.start, w.end] for w in hit.windows]}
    hidden = ["windows"]
    node = TextNode(
        id_=hit.segment_id,
        text=hit.text,
        metadata={**hit.metadata, **ours},
        excluded_llm_metadata_keys=hidden,
        excluded_embed_metadata_keys=hidden,
        relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=hit.doc_id)},
        start_char_idx=hit.span.start,
        end_char_idx=hit.span.end,
    )
    return LLoCONode.showing(node, view)
