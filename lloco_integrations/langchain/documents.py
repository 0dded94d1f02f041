"""LangChain documents in and out of a store, and the document whose text is a handle."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.documents import Document
from pydantic import Field, SerializationInfo, SerializerFunctionWrapHandler, model_serializer

from lloco_engine import Document as EngineDocument
from lloco_engine import Hit
from lloco_integrations.chunks import View
from lloco_integrations.handles import Handles

__all__ = ["HANDLE", "LLoCODocument", "from_hit", "from_stored", "retrieved", "shown", "to_engine"]

HANDLE = "lloco_handle"  # metadata key of a handle beside real text
MetadataValue = str | int | float | bool

_REST = "langchain"  # metadata that a store cannot filter by, as JSON
_FIELDS = ("source", "title")  # what LangChain keeps in metadata and a store has a field for


class RetrievedDocument(Document):
    """A chunk that search found. Two are equal where they are the same chunk, whatever it was found for.

    So retrievers that fuse results of several questions see it once; its ``id`` is the chunk's, and stays the same.
    """

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) if self.id is None else type(other) is type(self) and other.id == self.id

    def __hash__(self) -> int:
        return hash((type(self), self.id))


class LLoCODocument(RetrievedDocument):
    """A retrieved document whose ``page_content`` is a handle, so that a chain's prompt never holds its text.

    ``text`` is the real text, for rerankers, evaluators and citations. It is left out of every print and of JSON, which
    is what traces are made of; Python's own forms (``model_dump``, pickles, LangGraph's checkpoints) keep it.
    ``metadata`` says where the text comes from: ``lloco_doc_id``, ``lloco_segments`` and ``lloco_span`` (start and end,
    in characters of the document), beside the document's own and, from a retriever, ``lloco_score`` and, where no
    document seems to answer, ``lloco_warning``.
    """

    text: str = Field(default="", repr=False)

    @model_serializer(mode="wrap")
    def _without_text(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        if info.mode == "json":
            fields.pop("text", None)
        return fields


class SegmentIds(list[str]):
    """Ids of segments, as a list that can be a key: ``EnsembleRetriever(id_key="lloco_segments")``."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self))


def to_engine(document: Document, doc_id: str, tenant: str) -> EngineDocument:
    """A LangChain document as the engine's, its metadata kept whole.

    Raises:
        ValueError: a metadata value is not JSON.
    """
    plain: dict[str, MetadataValue] = {}
    fields: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in document.metadata.items():
        if key in _FIELDS and isinstance(value, str) and value:
            fields[key] = value
        elif key not in (*_FIELDS, "doc_id", _REST) and _is_plain(value):
            plain[key] = value
        else:
            rest[key] = value
    if rest:
        try:
            plain[_REST] = json.dumps(rest, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"metadata must be JSON, and that of document {doc_id!r} is not ({error}): {sorted(rest)}"
            ) from error
    return EngineDocument(doc_id, document.page_content, metadata=plain, tenant=tenant, **fields)


def from_stored(doc_id: str, text: str, *, title: str, source: str, metadata: Mapping[str, MetadataValue]) -> Document:
    """A stored document, or a part of it, as the LangChain document that it was."""
    values: dict[str, Any] = {key: value for key, value in metadata.items() if key != _REST}
    values |= {key: value for key, value in (("source", source), ("title", title)) if value}
    if isinstance(rest := metadata.get(_REST), str):
        values |= json.loads(rest)
    return Document(page_content=text, metadata=values, id=doc_id)


def from_hit(hit: Hit) -> Document:
    """A hit's real text as a document; its id is the stored document's.

    Where the document has pages, ``page`` (from 0) and ``page_label`` are those where the best search window begins, as
    LangChain's loaders write them.
    """
    document = from_stored(hit.doc_id, hit.text, title=hit.title, source=hit.source, metadata=hit.metadata)
    if (page := hit.page) is not None:
        document.metadata = {"page": page.number - 1, "page_label": page.name, **document.metadata}
    return document


def retrieved(
    hits: Sequence[Hit], question: str, handles: Handles, *, annotate: bool, warning: str | None = None
) -> list[Document]:
    """Hits as a model is shown them, under handles that are the same for the same chunk and question."""
    documents = []
    for hit in hits:
        stored = from_hit(hit)
        more = {"lloco_score": hit.score} | ({"lloco_warning": warning} if warning else {})
        document = RetrievedDocument(
            page_content=hit.text, metadata={**stored.metadata, **more}, id=f"{hit.doc_id}#{hit.ordinal}"
        )
        documents.append(shown(document, View(handles.mint([hit], question), (hit,)), annotate=annotate))
    return documents


def shown(document: Document, view: View, *, annotate: bool) -> Document:
    """A document as a model is shown it.

    Args:
        document: with its real text.
        view: the handles that stand for the text, or the text made harmless.
        annotate: keep the text, and put the handles into the metadata, for ``document_prompt="{lloco_handle}"``.
    """
    if annotate:
        return document.model_copy(update={"metadata": {**document.metadata, HANDLE: view.text}})
    if not view.hits:
        return document.model_copy(update={"page_content": view.text})
    hits = view.hits
    where = {
        "lloco_doc_id": hits[0].doc_id,
        "lloco_segments": SegmentIds(hit.segment_id for hit in hits),
        "lloco_span": [hits[0].span.start, hits[-1].span.end],
    }
    return LLoCODocument(
        page_content=view.text, metadata={**document.metadata, **where}, id=document.id, text=document.page_content
    )


def _is_plain(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | int | bool)
