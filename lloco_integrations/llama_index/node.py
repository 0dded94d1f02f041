"""A node whose text only the model does not see."""

from __future__ import annotations

from typing import Any, Self

from llama_index.core.base.llms.types import TextBlock
from llama_index.core.bridge.pydantic import Field
from llama_index.core.schema import BaseNode, MetadataMode, TextNode

from lloco_integrations.handle_syntax import neutralise

__all__ = ["OF_THE_QUESTION", "WARNING", "LLoCONode"]

WARNING = "lloco_warning"  # metadata of nodes that do not seem to answer the question
OF_THE_QUESTION = frozenset({"windows", WARNING})


class LLoCONode(TextNode):
    """A `TextNode` whose view for the model is a handle. All other views, JSON and repr are the text node's.

    ``llm_view`` is what the model is shown. The hash, by which retrievers' results are fused, is the text node's too,
    but for what depends on the question that a node was found for.
    """

    llm_view: str = Field(default="", exclude=True, repr=False)

    @classmethod
    def class_name(cls) -> str:
        return "TextNode"

    def __repr_name__(self) -> str:
        return "TextNode"

    @property
    def hash(self) -> str:
        if not OF_THE_QUESTION & set(self.metadata):
            return super().hash
        metadata = {key: value for key, value in self.metadata.items() if key not in OF_THE_QUESTION}
        return TextNode(text=f"{self.ref_doc_id}\n{self.text}", metadata=metadata).hash

    @classmethod
    def showing(cls, node: BaseNode, view: str, *, metadata: bool = False) -> Self:
        """A copy of a node that shows ``view`` to the model, below the node's (neutralised) metadata if so asked."""
        if metadata and (above := node.get_metadata_str(mode=MetadataMode.LLM).strip()):
            view = f"{neutralise(above)}\n\n{view}"
        names = set(TextNode.model_fields) & set(type(node).model_fields)
        fields: dict[str, Any] = {name: getattr(node, name) for name in names}
        return cls(**(fields | {"text": node.get_content(MetadataMode.NONE), "llm_view": view}))

    def get_content(self, metadata_mode: MetadataMode = MetadataMode.NONE) -> str:
        if metadata_mode == MetadataMode.LLM and self.llm_view:
            return self.llm_view
        return super().get_content(metadata_mode)

    def get_content_blocks(self, metadata_mode: MetadataMode = MetadataMode.NONE) -> list[Any]:
        if metadata_mode == MetadataMode.LLM and self.llm_view:
            return [TextBlock(text=self.llm_view)]
        return super().get_content_blocks(metadata_mode)
