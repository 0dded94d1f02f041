"""LangChain documents in and out of a store, and the document whose text is a handle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from langchain_core.documents import Document
from langchain_core.load.serializable import SerializedConstructor, SerializedNotImplemented
from pydantic import Field, SerializationInfo, SerializerFunctionWrapHandler, model_serializer

from lloco_engine import ConfigError, Failure, Hit, plain_metadata
from lloco_engine import Document as EngineDocument
from lloco_integrations.chunks import View
from lloco_integrations.handles import Handles

__all__ = ["HANDLE", "LLoCODocument", "from_hit", "from_stored", "retrieved", "shown", "to_engine"]

HANDLE = "lloco_handle"  # metadata key of a handle beside real text
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

    def to_json(self) -> SerializedConstructor | SerializedNotImplemented:
        """LangChain's own form, of its ``dumps`` and of traces: without the text."""
        form = super().to_json()
        if form["type"] == "constructor":
            form["kwargs"].pop("text", None)
        return form


class SegmentIds(list[str]):
    """Ids of segments, as a list that can be a key: ``EnsembleRetriever(id_key="lloco_segments")``."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self))


def to_engine(document: Document, doc_id: str, tenant: str) -> EngineDocument | Failure:
    """A LangChain document as the engine's, its metadata kept whole; a Failure where that cannot be."""
    try:
        metadata = plain_metadata(document.metadata)
    except ConfigError as error:
        return Failure(doc_id, str(error))
    fields = {name: value for name in _FIELDS if isinstance(value := metadata.get(name), str) and value}
    kept = {key: value for key, value in metadata.items() if key not in fields}
    made = EngineDocument(doc_id, document.page_content, metadata=kept, tenant=tenant)
    return replace(made, title=fields.get("title", ""), source=fields.get("source", ""))


def from_stored(document: EngineDocument | Hit, text: str) -> Document:
    """A stored document, or a part of it, as the LangChain document that it was."""
    fields = {name: value for name in _FIELDS if (value := getattr(document, name))}
    return Document(page_content=text, metadata={**document.metadata, **fields}, id=document.doc_id)


def from_hit(hit: Hit) -> Document:
    """A hit's real text as a document; its id is the stored document's.

    Where the document has pages, ``page`` (from 0) and ``page_label`` are those where the best search window begins, as
    LangChain's loaders write them.
    """
    document = from_stored(hit, hit.text)
    if (page := hit.page) is not None:
        document.metadata = {"page": page.number - 1, "page_label": page.name, **document.metadata}
    return document


def retrieved(
    hits: Sequence[Hit], question: str, handles: Handles, *, annotate: bool, warning: str | None = None
) -> list[Document]:
    """Hits as a model is shown them, under handles that are the same for the same chunk and question."""
    documents = []
    for hit in hits:
        more = {"lloco_score": hit.score} | ({"lloco_warning": warning} if warning else {})
        document = RetrievedDocument(
            page_content=hit.text, metadata=from_hit(hit).metadata, id=f"{hit.doc_id}#{hit.ordinal}"
        )
        view = View(handles.mint([hit], question), (hit,))
        documents.append(shown(document, view, annotate=annotate, more=more))
    return documents


def shown(document: Document, view: View, *, annotate: bool, more: Mapping[str, Any] | None = None) -> Document:
    """A document as a model is shown it.

    Metadata under names that are ours, or that a prompt's template would take for the text, is left out: a stored
    record may have anything there.

    Args:
        document: with its real text.
        view: the handles that stand for the text, or the text made harmless.
        annotate: keep the text, and put the handles into the metadata, for ``document_prompt="{lloco_handle}"``.
        more: metadata of ours.
    """
    metadata = {key: value for key, value in document.metadata.items() if not _is_ours(key)} | dict(more or {})
    if annotate:
        return document.model_copy(update={"metadata": {**metadata, HANDLE: view.text}})
    if not view.hits:
        return document.model_copy(update={"metadata": metadata, "page_content": view.text})
    hits = view.hits
    where = {
        "lloco_doc_id": hits[0].doc_id,
        "lloco_segments": SegmentIds(hit.segment_id for hit in hits),
        "lloco_span": [hits[0].span.start, hits[-1].span.end],
    }
    return LLoCODocument(
        page_content=view.text, metadata={**metadata, **where}, id=document.id, text=document.page_content
    )


def _is_ours(key: object) -> bool:
    return key == "page_content" or (isinstance(key, str) and key.startswith("lloco_"))
