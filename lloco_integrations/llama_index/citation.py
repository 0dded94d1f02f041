"""Citations over segments: numbered sources whose text the reader sees and the model does not."""

from __future__ import annotations

from llama_index.core.query_engine import CitationQueryEngine
from llama_index.core.schema import MetadataMode, NodeWithScore

from lloco_integrations.llama_index.node import LLoCONode

__all__ = ["LLoCOCitationQueryEngine"]


class LLoCOCitationQueryEngine(CitationQueryEngine):
    """A `CitationQueryEngine` in which every retrieved chunk is one source.

    The engine of LlamaIndex cuts the model's view of a node into sources and shows those as the sources' text; so with
    handles, its sources would show handles. Here ``Source N:`` stands above the text for the reader and above the
    handle for the model, and a source keeps the id and the character offsets of its node.
    """

    def _create_citation_nodes(self, nodes: list[NodeWithScore]) -> list[NodeWithScore]:
        sources = []
        for number, scored in enumerate(nodes, 1):
            label, node = f"Source {number}:\n", scored.node
            text, view = node.get_content(MetadataMode.NONE), node.get_content(MetadataMode.LLM)
            source = LLoCONode.showing(node, f"{label}{view}\n")
            source.set_content(f"{label}{text}\n")
            sources.append(NodeWithScore(node=source, score=scored.score))
        return sources
