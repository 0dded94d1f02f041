"""The last step of retrieval: chunks become what the model is shown of them."""

from __future__ import annotations

from typing import Any, Self

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle

from lloco_engine import Engine
from lloco_integrations.chunks import OnMissing, check_on_missing, views
from lloco_integrations.handles import Handles
from lloco_integrations.llama_index.node import LLoCONode

__all__ = ["LLoCONodePostprocessor"]


class LLoCONodePostprocessor(BaseNodePostprocessor):
    """Shows the model a handle in place of each retrieved chunk's text, whatever vector store the chunk is from.

    Sources, evaluators and JSON keep the text. Put it last: what comes after it and reads the model's view sees
    handles.

    Args:
        engine: whose store holds the segments.
        tenant: whose they are; see `for_scope`.
        on_missing: for a chunk without a segment: ``"raw"`` shows its text, ``"compress"`` makes a segment now,
            ``"error"`` refuses.
        metadata: also show the model the node's metadata.
        min_score: nodes with a lower score, by whatever gave it, are left out; those without one stay.
        handles: mints them; by default what all classes on the engine share.

    Raises:
        ConfigError: ``on_missing`` is none of the three.
    """

    tenant: str = Field(default="", description="Whose segments are read.")
    on_missing: OnMissing = Field(default="raw", description="What becomes of a chunk without a segment.")
    metadata: bool = Field(default=False, description="Whether the model is shown the metadata.")

    min_score: float | None = Field(default=None, description="Nodes with a lower score are left out.")

    _engine: Engine = PrivateAttr()
    _handles: Handles = PrivateAttr()

    def __init__(
        self,
        engine: Engine,
        *,
        tenant: str = "",
        on_missing: str = "raw",
        metadata: bool = False,
        min_score: float | None = None,
        handles: Handles | None = None,
        **more: Any,
    ) -> None:
        more |= {"tenant": tenant, "on_missing": check_on_missing(on_missing), "metadata": metadata}
        more |= {"min_score": min_score}
        super().__init__(**more)
        self._engine = engine
        self._handles = Handles.of(engine) if handles is None else handles

    @classmethod
    def class_name(cls) -> str:
        return "LLoCONodePostprocessor"

    def for_scope(self, tenant: str) -> Self:
        """The same for another tenant."""
        return self.model_copy(update={"tenant": tenant})

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        least = self.min_score
        nodes = [scored for scored in nodes if None in (least, scored.score) or scored.get_score() >= (least or 0.0)]
        texts = [scored.node.get_content(MetadataMode.NONE) for scored in nodes]
        shown = views(
            self._engine,
            texts,
            tenant=self.tenant,
            on_missing=self.on_missing,
            handles=self._handles,
            about=[_about(scored.node) for scored in nodes],
            question=query_bundle.query_str if query_bundle else "",
        )
        return [
            NodeWithScore(node=LLoCONode.showing(scored.node, view.text, metadata=self.metadata), score=scored.score)
            for scored, view in zip(nodes, shown, strict=True)
        ]


def _about(node: BaseNode) -> dict[str, Any]:
    """What says whose a node's text is: its metadata, and the ids of the node and of what it was cut from."""
    return node.metadata | {"node_id": node.node_id, "ref_doc_id": node.ref_doc_id or ""}
