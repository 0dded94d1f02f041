"""Metadata of stores made before migration 9, in which frameworks kept what is theirs beside the documents' own."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["private_part", "public_part"]


def public_part(metadata: str, doc_id: str) -> str:
    """Metadata without what frameworks kept in it then. JSON in and out; a function of SQL.

    Values that could not be filtered by stood as JSON under ``langchain``; a node of LlamaIndex under ``_node``.
    """
    values = json.loads(metadata)
    node = _node(values, doc_id)
    if node is not None:
        del values["_node"], values["ref_doc_id"]
        fields = {key for key in ("title", "source") if isinstance(node["metadata"].get(key), str)}
        values |= {key: value for key, value in node["metadata"].items() if key not in fields}
    rest = _json_object(values.get("langchain"))
    if rest is not None:
        del values["langchain"]
    return json.dumps(values | (rest or {}), ensure_ascii=False)


def private_part(metadata: str, doc_id: str) -> str:
    """What `public_part` leaves out of a node of LlamaIndex, as `Document.private` has it. A function of SQL."""
    values = json.loads(metadata)
    node = _node(values, doc_id)
    made = {}
    if node is not None:
        del node["metadata"]
        made = {"llama_index.id": doc_id, "llama_index.ref": values["ref_doc_id"], "llama_index.node": node}
    return json.dumps(made, ensure_ascii=False)


def _node(values: dict[str, Any], doc_id: str) -> dict[str, Any] | None:
    """The node in metadata, if it is one that was put under this id, and not merely data under the same name."""
    node = _json_object(values.get("_node"))
    ours = node is not None and node.get("id_") == doc_id and isinstance(node.get("metadata"), dict)
    return node if ours and isinstance(values.get("ref_doc_id"), str) else None


def _json_object(text: object) -> dict[str, Any] | None:
    if not isinstance(text, str):
        return None
    try:
        made = json.loads(text, parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        return None
    return made if isinstance(made, dict) else None
