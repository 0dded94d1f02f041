"""Nodes of LlamaIndex as documents of the engine's store, one each, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llama_index.core.schema import BaseNode, MetadataMode, TextNode
from pydantic import ValidationError

from lloco_engine import ConfigError, Document, Engine, Failure, plain_metadata
from lloco_integrations.adding import ingest_all
from lloco_integrations.handles import Handles

__all__ = ["ID", "NODE", "REF", "ingest_nodes", "node_of"]

# What is kept with a store document besides its metadata, where no record of others can reach (`Document.private`).
ID = "llama_index.id"  # the node's id
REF = "llama_index.ref"  # the id of the document that the node was cut from, or is
NODE = "llama_index.node"  # the node without its text and metadata
_FIELDS = ("title", "source")
_KEPT = set(TextNode.model_fields) - {"id_", "text", "embedding", "metadata"}


def ingest_nodes(engine: Engine, nodes: Sequence[BaseNode], tenant: str, handles: Handles) -> None:
    """Compress nodes into the store; those that are there unchanged cost next to nothing.

    A node that cannot be stored, a blank one too, is named in a warning, and the others are stored.

    Raises:
        DocumentError: none of them could be stored, and not because they were blank.
        StoreError: as `Engine.ingest`.
    """
    items = {node.node_id: _document(node, tenant) for node in nodes}
    with handles.compressing:
        ingest_all(engine, list(items.values()), tenant)


def _document(node: BaseNode, tenant: str) -> Document | Failure:
    try:
        metadata = plain_metadata(node.metadata)
        body = node.model_dump(include=_KEPT)
        private = plain_metadata({ID: node.node_id, REF: node.ref_doc_id or node.node_id, NODE: body})
    except ConfigError as error:
        return Failure(node.node_id, str(error))
    fields = {name: value for name in _FIELDS if isinstance(value := metadata.get(name), str) and value}
    return Document(
        node.node_id,
        node.get_content(MetadataMode.NONE),
        title=fields.get("title", ""),
        source=fields.get("source", ""),
        metadata={key: value for key, value in metadata.items() if key not in fields},
        tenant=tenant,
        private=private,
    )


def node_of(document: Document) -> TextNode:
    """The node that a store document was made from, as a text node; a plain one where what was kept is no node."""
    fields = {name: value for name in _FIELDS if (value := getattr(document, name))}
    own = {"id_": document.doc_id, "text": document.text, "metadata": {**document.metadata, **fields}}
    body = document.private.get(NODE)
    kept = {name: value for name, value in body.items() if name in _KEPT} if isinstance(body, Mapping) else {}
    try:
        return TextNode.model_validate({**kept, **own})
    except ValidationError:
        return TextNode.model_validate(own)
