"""The retriever: one embedding, the store's ranking, neighbours once each."""

from __future__ import annotations

import numpy as np
import pytest
from store_cases import document, make_store, text_vector

from lloco_engine.config import RetrieveConfig
from lloco_engine.errors import ConfigError, StoreMismatch
from lloco_engine.retrieve import Retriever


class TextEmbedder:
    """Embeds a text as the store's test windows are."""

    def encode(self, texts, batch_size=32):
        return np.stack([text_vector(text) for text in texts])


@pytest.fixture
def store(tmp_path):
    documents = [document("a", 100, kind="x"), document("b", 100, kind="y"), document("a", 40, tenant="t")]
    with make_store(tmp_path / "s", *documents) as made:
        yield made


def test_the_segment_that_holds_the_passage_comes_first(store):
    retriever = Retriever(store, TextEmbedder())
    question = store.document_text("b")[40:50]
    hits = retriever.retrieve(question)
    assert len(hits) == 4 and (hits[0].doc_id, hits[0].ordinal) == ("b", 2)
    assert hits[0].quote(hits[0].windows[0]) == question
    assert hits == store.search(text_vector(question), top_k=4, question=question, lexical=RetrieveConfig.lexical)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_settings_filters_and_tenant_reach_the_store(store):
    retriever = Retriever(store, TextEmbedder())
    question = store.document_text("b")[40:50]
    assert {hit.doc_id for hit in retriever.retrieve(question, RetrieveConfig(top_k=9), {"kind": "x"})} == {"a"}
    assert [hit.tenant for hit in retriever.retrieve(question, RetrieveConfig(top_k=9), tenant="t")] == ["t", "t"]
    assert len(retriever.retrieve(question, RetrieveConfig(top_k=9, min_score=0.99))) == 1


def test_neighbours_follow_the_hits_once_each(store):
    retriever = Retriever(store, TextEmbedder())
    question = store.document_text("b")[40:50]
    hits = retriever.retrieve(question, RetrieveConfig(top_k=1, neighbours=1))
    assert [(hit.doc_id, hit.ordinal) for hit in hits] == [("b", 2), ("b", 1), ("b", 3)]
    assert [hit.score for hit in hits[1:]] == [0.0, 0.0]
    every = retriever.retrieve(question, RetrieveConfig(top_k=3, neighbours=9))
    assert len({hit.segment_id for hit in every}) == len(every)
    assert every[:3] == retriever.retrieve(question, RetrieveConfig(top_k=3))


def test_an_empty_question_and_another_embedder_are_refused(store):
    with pytest.raises(ConfigError, match="must not be empty"):
        Retriever(store, TextEmbedder()).retrieve(" ")

    class Other:
        def encode(self, texts):
            return np.ones((1, 5), np.float32)

    with pytest.raises(StoreMismatch, match="embedder_dim"):
        Retriever(store, Other()).retrieve("x")
