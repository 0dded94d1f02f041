"""The document compressor: chunks of any vector store are read from their segments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import ConfigDict, Field

from lloco_engine import Engine
from lloco_integrations.chunks import views
from lloco_integrations.handles import Handles
from lloco_integrations.langchain.documents import LLoCODocument, shown

__all__ = ["LLoCODocumentCompressor"]


class LLoCODocumentCompressor(BaseDocumentCompressor):
    """Puts handles in place of the text of retrieved documents that the engine's store has segments of.

    ::

        ContextualCompressionRetriever(
            base_retriever=any_vector_store.as_retriever(),
            base_compressor=LLoCODocumentCompressor(engine=engine),
        )

    In a `DocumentCompressorPipeline` it comes last: rerankers and filters before it see real text.

    Args:
        engine: whose store is looked in.
        tenant: whose documents they are.
        on_missing: what becomes of a text that the store does not know: ``"raw"`` shows the model the text itself,
            ``"compress"`` compresses it into the store now, ``"error"`` refuses.
        annotate: keep real text, and put handles into ``metadata["lloco_handle"]``.
        score_key: the metadata that holds a document's score; that of the LLoCO retrievers by default.
        min_score: documents with a lower score are left out; those without one stay.
        handles: mints handles; by default what all classes on the engine share.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    engine: Engine = Field(exclude=True, repr=False)
    tenant: str = ""
    on_missing: Literal["raw", "compress", "error"] = "raw"
    annotate: bool = False
    score_key: str = "lloco_score"
    min_score: float | None = None
    handles: Handles | None = Field(default=None, exclude=True, repr=False)

    def _is_good(self, document: Document) -> bool:
        score = document.metadata.get(self.score_key)
        return self.min_score is None or not isinstance(score, int | float) or score >= self.min_score

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """The same documents in the same order, as a model is shown them.

        Raises:
            SegmentUnavailable: a text is not known, and ``on_missing`` is ``"error"``.
        """
        documents = [document for document in documents if self._is_good(document)]
        # only the class tells: metadata, with which a foreign store could claim to hold a handle, is untrusted
        rest = [document for document in documents if not isinstance(document, LLoCODocument)]
        made = iter(
            views(
                self.engine,
                [document.page_content for document in rest],
                tenant=self.tenant,
                on_missing=self.on_missing,
                handles=self.handles,
                about=[document.metadata | ({"id": document.id} if document.id else {}) for document in rest],
                question=query,
            )
        )
        return [
            document if isinstance(document, LLoCODocument) else shown(document, next(made), annotate=self.annotate)
            for document in documents
        ]
