"""Nodes of LlamaIndex as documents of the engine's store, one each, and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from llama_index.core.schema import BaseNode, MetadataMode, TextNode

from lloco_engine import Document, DocumentError, Engine
from lloco_integrations.handles import Handles

__all__ = ["NODE", "REF", "delete_documents", "ingest_nodes", "node_of"]

REF = "ref_doc_id"  # metadata of a store document: the id of the document that the node was cut from, or is
NODE = "_node"  # the node without its text, as JSON
_RESERVED = ("doc_id", "title", "source")


def ingest_nodes(engine: Engine, nodes: Sequence[BaseNode], tenant: str, handles: Handles) -> None:
    """Compress nodes into the store; those that are there unchanged cost next to nothing.

    Raises:
        DocumentError: a node cannot be stored; the others are.
        StoreError: as `Engine.ingest`.
    """
    documents = {node.node_id: _document(node, tenant) for node in nodes if node.get_content(MetadataMode.NONE).strip()}
    with handles.compressing:
        report = engine.ingest(documents.values(), tenant=tenant)
    if report.failed:
        raise DocumentError(
            f"{len(report.failed)} of {len(documents)} nodes were not stored: {report.failed[0].reason}"
        )


def _document(node: BaseNode, tenant: str) -> Document:
    kept = {key: value for key, value in node.metadata.items() if isinstance(value, str | int | float | bool)}
    body = node.model_dump(mode="json", exclude={"text", "embedding", "text_resource"})
    metadata = {key: value for key, value in kept.items() if key not in _RESERVED}
    return Document(
        node.node_id,
        node.get_content(MetadataMode.NONE),
        title=str(kept.get("title", "")),
        source=str(kept.get("source", "")),
        metadata=metadata | {REF: node.ref_doc_id or node.node_id, NODE: json.dumps(body, sort_keys=True)},
        tenant=tenant,
    )


def node_of(engine: Engine, doc_id: str, tenant: str, metadata: Any) -> TextNode:
    """The node that a store document was made from, as a text node."""
    body = json.loads(metadata[NODE])
    fields = {name: body[name] for name in TextNode.model_fields if name in body}
    return TextNode(**(fields | {"id_": doc_id, "text": engine.store.document_text(doc_id, tenant)}))


def delete_documents(engine: Engine, doc_ids: Iterable[str], tenant: str, handles: Handles) -> None:
    """Remove store documents with their segments."""
    with handles.compressing:
        for doc_id in doc_ids:
            engine.delete(doc_id, tenant)
