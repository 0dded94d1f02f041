"""A LangChain vector store over an engine's store: what is added is compressed, what is found can be read as slots."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore, VectorStoreRetriever
from pydantic import Field

from lloco_engine import ConfigError, Engine, Filters, Hit, Turn
from lloco_integrations.adding import ingest_all
from lloco_integrations.handles import Handles
from lloco_integrations.langchain.documents import from_hit, from_stored, retrieved, to_engine
from lloco_integrations.langchain.messages import turns
from lloco_integrations.questions import question_vector

__all__ = ["EngineEmbeddings", "LLoCOStoreRetriever", "LLoCOVectorStore"]


class EngineEmbeddings(Embeddings):
    """The engine's own embedder, as LangChain calls it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """A vector per text, of length 1."""
        vectors: list[list[float]] = self._engine.embedder.encode(texts).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """The vector of a question, of length 1."""
        vector: list[float] = question_vector(self._engine, text).tolist()
        return vector


class LLoCOStoreRetriever(VectorStoreRetriever):
    """A `LLoCOVectorStore` as a retriever: each kind of search, with handles in place of text."""

    annotate: bool = False
    handles: Handles | None = Field(default=None, exclude=True, repr=False)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        return self._find(query, kwargs)

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        return await asyncio.to_thread(self._find, query, kwargs)

    def _find(self, query: str, options: dict[str, Any]) -> list[Document]:
        store = self.vectorstore
        if not isinstance(store, LLoCOVectorStore):
            raise ValueError(f"vectorstore must be a LLoCOVectorStore, not {type(store).__name__}")
        handles = self.handles or Handles.of(store.engine)
        options = {**self.search_kwargs, **options}
        hits = store.search_hits(
            query, search_type=self.search_type, **options | {"history": turns(options.get("history", ()))}
        )
        return retrieved(hits, query, handles, annotate=self.annotate, warning=store.engine.doubt(hits))


class LLoCOVectorStore(VectorStore):
    """The documents of one tenant in an engine's store.

    Searches return real text, as from any vector store; `as_retriever` returns handles, for `ChatLLoCO` and
    `LLoCOLLM` to read as slots. A document longer than a segment is found by its parts, which all carry its id.

    Args:
        engine: whose store it is.
        tenant: whose documents are added, found and deleted; no other's are ever seen.
    """

    def __init__(self, engine: Engine, *, tenant: str = "") -> None:
        self.engine = engine
        self.tenant = tenant

    @property
    def embeddings(self) -> Embeddings:
        """The engine's own embedder."""
        return EngineEmbeddings(self.engine)

    # -- documents ----------------------------------------------------------------------------------------------

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings | None = None,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        engine: Engine | None = None,
        tenant: str = "",
        **kwargs: Any,
    ) -> Self:
        """A vector store that holds ``texts``.

        Args:
            texts: what to add.
            embedding: None, or a store's own `embeddings`: an engine makes its vectors itself.
            metadatas: one for each text.
            ids: one for each text.
            engine: whose store it is; must be given.
            tenant: whose the texts are.
            kwargs: as `add_documents` takes them.

        Raises:
            ValueError: there is no engine, or ``embedding`` is not the engine's.
        """
        if engine is None:
            raise ValueError("engine must be given: LLoCOVectorStore.from_texts(texts, engine=Engine.open(folder))")
        if not (embedding is None or isinstance(embedding, EngineEmbeddings)):
            raise ValueError(
                f"an engine makes its vectors itself, so embedding must be None, not {type(embedding).__name__}; "
                "choose the embedder when the store is made: Engine.open(folder, embedder=...)"
            )
        made = cls(engine, tenant=tenant)
        made.add_texts(texts, metadatas, ids=ids, **kwargs)
        return made

    def add_documents(self, documents: list[Document], *, ids: list[str] | None = None, **kwargs: Any) -> list[str]:
        """Compress documents into the store; one whose id is there replaces it.

        A document that cannot be used (a blank page, metadata that has no form in JSON) is named in a warning, and the
        others are added.

        Args:
            documents: what to add.
            ids: one for each; else each document's own id, or a new one.
            kwargs: ignored (`index` passes a batch size).

        Returns:
            the ids of those that were added.

        Raises:
            ValueError: there are not as many ids as documents; nothing was added.
            DocumentError: no document of several, or the only one, could be used; names them.
        """
        if ids is not None and len(ids) != len(documents):
            raise ValueError(f"ids must be as many as documents, {len(documents)}, not {len(ids)}")
        given: Sequence[str | None] = ids or [document.id for document in documents]
        names = [str(one) if one else str(uuid.uuid4()) for one in given]
        made = [to_engine(document, name, self.tenant) for document, name in zip(documents, names, strict=True)]
        return ingest_all(self.engine, made, self.tenant)

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """As `add_documents`, from texts and their metadata."""
        wanted = list(texts)
        if metadatas is not None and len(metadatas) != len(wanted):
            raise ValueError(f"metadatas must be as many as texts, {len(wanted)}, not {len(metadatas)}")
        every = metadatas or [{} for _ in wanted]
        documents = [Document(page_content=text, metadata=more) for text, more in zip(wanted, every, strict=True)]
        return self.add_documents(documents, ids=ids, **kwargs)

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        """Remove documents with their segments; all of this tenant's when ``ids`` is None. Unknown ids do no harm."""
        self.engine.delete_all(self.engine.store.find_documents(None, self.tenant) if ids is None else ids, self.tenant)
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Whole documents, in the order of their ids; ids that are not there are passed over."""
        found = self.engine.store.load_documents(ids, self.tenant)
        return [from_stored(document, document.text) for document in found]

    # -- search -------------------------------------------------------------------------------------------------

    def search_hits(
        self,
        query: str,
        k: int = 4,
        filter: Filters | None = None,
        *,
        search_type: str = "similarity",
        score_threshold: float | None = None,
        min_score: float | None = None,
        lexical: float | None = None,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        history: Sequence[Turn] = (),
    ) -> list[Hit]:
        """The engine's own hits for a query, best first, by any of LangChain's kinds of search.

        Args:
            query: text; a blank one finds nothing.
            k: how many.
            filter: as in `similarity_search`.
            search_type: ``similarity``, ``similarity_score_threshold`` or ``mmr``.
            score_threshold: least relevance (0 to 1) of the second kind.
            min_score, lexical: of every kind, as in `RetrieveConfig`; None takes the engine's own.
            fetch_k, lambda_mult: as in `max_marginal_relevance_search`, for the third.
            history: earlier turns, which count in the search.
        """
        if not query.strip():
            return []
        mmr = search_type == "mmr"
        hits = self.engine.retrieve(
            query,
            top_k=fetch_k if mmr else k,
            filters=filter,
            min_score=min_score,
            lexical=lexical,
            tenant=self.tenant,
            history=history,
        )
        if mmr:
            return self._diverse(query, hits, k, lambda_mult)
        return hits if score_threshold is None else [hit for hit in hits if _relevance(hit.score) >= score_threshold]

    def _diverse(self, query: str, hits: Sequence[Hit], k: int, lambda_mult: float) -> list[Hit]:
        import numpy as np
        from langchain_core.vectorstores.utils import maximal_marginal_relevance

        if not hits:
            return []
        texts = [hit.quote(hit.windows[0]) if hit.windows else hit.text for hit in hits]
        asked, vectors = question_vector(self.engine, query), self.engine.embedder.encode(texts)
        chosen = maximal_marginal_relevance(np.asarray(asked), list(vectors), lambda_mult=lambda_mult, k=k)
        return [hits[number] for number in chosen]

    def similarity_search(
        self, query: str, k: int = 4, *, filter: Filters | None = None, **kwargs: Any
    ) -> list[Document]:
        """The ``k`` best documents, or parts of documents, best first, with their real text.

        Args:
            query: text.
            k: how many.
            filter: as in LangChain's other stores: metadata keys (and ``source``, ``title``, ``doc_id``) to values,
                collections or operators, ``{"year": {"$gte": 2020}}``; see `lloco_engine.filters`.
            kwargs: none; what is not known is refused, for it may be a filter under another name.
        """
        _no_more(kwargs)
        return [from_hit(hit) for hit in self.search_hits(query, k, filter)]

    def similarity_search_with_score(
        self, query: str, k: int = 4, *, filter: Filters | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """As `similarity_search`, each with its score, at most 1: `lloco_engine.keyword_score`."""
        _no_more(kwargs)
        return [(from_hit(hit), hit.score) for hit in self.search_hits(query, k, filter)]

    def similarity_search_by_vector(
        self, embedding: list[float], k: int = 4, *, filter: Filters | None = None, **kwargs: Any
    ) -> list[Document]:
        """As `similarity_search`, for a vector of `embeddings`."""
        import numpy as np

        _no_more(kwargs)
        vector = np.asarray(embedding, dtype=np.float32)
        hits = self.engine.store.search(vector, top_k=k, tenant=self.tenant, filters=filter)
        return [from_hit(hit) for hit in hits]

    def max_marginal_relevance_search(
        self,
        query: str,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        *,
        filter: Filters | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Of the ``fetch_k`` best, ``k`` that are near the query and unlike each other.

        The vector of a part is that of its best search window. Method: maximal marginal relevance (Carbonell and
        Goldstein 1998), as LangChain computes it.
        """
        _no_more(kwargs)
        hits = self.search_hits(query, k, filter, search_type="mmr", fetch_k=fetch_k, lambda_mult=lambda_mult)
        return [from_hit(hit) for hit in hits]

    def as_retriever(self, **kwargs: Any) -> LLoCOStoreRetriever:
        """A retriever whose documents `ChatLLoCO` and `LLoCOLLM` read as slots.

        Args:
            kwargs: ``search_type``, ``search_kwargs`` and ``tags`` as in LangChain; ``annotate`` and ``handles`` as in
                `LLoCORetriever`.
        """
        tags = kwargs.pop("tags", None) or [*self._get_retriever_tags()]
        return LLoCOStoreRetriever(vectorstore=self, tags=tags, **kwargs)

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return _relevance


def _relevance(score: float) -> float:
    return min(1.0, max(0.0, score))  # LangChain wants 0 to 1; opposite is as good as unrelated


def _no_more(options: Mapping[str, Any]) -> None:
    if options:
        raise ConfigError(f"a search takes query, k and filter, not {sorted(options)[0]!r}; see the method's arguments")
