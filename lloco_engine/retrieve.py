"""Question -> ranked hits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lloco_engine.config import RetrieveConfig
from lloco_engine.errors import ConfigError
from lloco_engine.store import Filters, Store
from lloco_engine.types import Hit

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Encoder", "Retriever"]


class Encoder(Protocol):
    """What a retriever needs of an embedder."""

    def encode(self, texts: list[str], /) -> npt.NDArray[np.float32]:
        """(texts, dim) float32, rows L2-normalised."""
        ...


class Retriever:
    """Finds the segments of a store that a question needs, with the embedder that the store was made with."""

    def __init__(self, store: Store, embedder: Encoder) -> None:
        self._store = store
        self._embedder = embedder

    def retrieve(
        self,
        question: str,
        config: RetrieveConfig | None = None,
        filters: Filters | None = None,
        tenant: str = "",
    ) -> list[Hit]:
        """The ``top_k`` best segments, best first; then their neighbours, those of the best hit first.

        Args:
            question: text, not empty.
            config: how many, how similar, and how many neighbours before and after each (score 0.0).
            filters: as in `Store.search`.
            tenant: whose documents are searched.

        Raises:
            ConfigError: the question is empty.
            StoreMismatch: the embedder's vectors are not of the store's length.
        """
        config = RetrieveConfig() if config is None else config
        if not question.strip():
            raise ConfigError(f"a question must not be empty, not {question!r}")
        vector = self._embedder.encode([question])[0]
        hits = self._store.search(
            vector,
            top_k=config.top_k,
            tenant=tenant,
            filters=filters,
            min_score=config.min_score,
            question=question,
            lexical=config.lexical,
        )
        if not config.neighbours:
            return hits
        # A segment is wanted once, also where two hits share a neighbour or one is the other's.
        found = {hit.segment_id: hit for hit in hits}
        for hit in hits:
            for other in self._store.neighbours(hit, config.neighbours):
                found.setdefault(other.segment_id, other)
        return list(found.values())
