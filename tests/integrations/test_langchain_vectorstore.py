"""The vector store: LangChain's own suite, indexing, filters, and what a retriever of it hands out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import langchain_cases as cases
import pytest
from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_tests.integration_tests import VectorStoreIntegrationTests

from lloco_engine import DocumentError
from lloco_integrations.langchain import LLoCOVectorStore

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture(scope="module")
def decoder():
    return cases.decoder()


@pytest.fixture
def engine(tmp_path, decoder):
    with cases.open_engine(tmp_path / "store", decoder) as made:
        yield made


@pytest.fixture
def store(engine) -> LLoCOVectorStore:
    return LLoCOVectorStore(engine)


class TestStandard(VectorStoreIntegrationTests):
    """LangChain's suite, nothing left out."""

    @pytest.fixture
    def vectorstore(self, store) -> Iterator[LLoCOVectorStore]:
        return store


def test_metadata_comes_back_as_it_was(store):
    metadata = {"source": "a.txt", "title": "", "page": 3, "tags": ["x", "y"], "doc_id": "other", "none": None}
    (doc_id,) = store.add_documents([Document(page_content="words of a page", metadata=metadata)])
    (found,) = store.similarity_search("page")
    assert found.metadata == metadata
    assert store.get_by_ids([doc_id]) == [Document(page_content="words of a page", metadata=metadata, id=doc_id)]


def test_what_cannot_be_added_is_named_and_the_rest_is_added(store):
    good = Document(page_content="words", id="a")
    with pytest.raises(ValueError, match="as many as documents, 1, not 2"):
        store.add_documents([good], ids=["a", "b"])
    unfit = Document(page_content="x", metadata={"when": object()}, id="b")
    with pytest.raises(DocumentError, match=r"1 of 1 documents could not be added: b: metadata 'when' must be text"):
        store.add_documents([unfit])
    assert store.engine.documents() == []
    more = [unfit, Document(page_content=" ", id="c"), Document(page_content="y\ud800", id="d"), good]
    with pytest.warns(
        UserWarning, match="4 of 5 .*b: metadata 'when' .*c: .*blank; d: .*surrogate; a: .*must come once"
    ):
        assert store.add_documents([good, *more]) == ["a"]
    unfit.id = "b"
    with pytest.warns(UserWarning, match="1 of 2 .*b: metadata 'when'"):
        made = LLoCOVectorStore.from_documents([unfit, Document(page_content="z", id="z")], None, engine=store.engine)
    assert [one.id for one in made.get_by_ids(["z", "b", "a"])] == ["z", "a"]


def test_filters_threshold_and_diversity(store):
    texts = [cases.story("pump"), "A pump in the hall.", cases.story("crane")]
    store.add_texts(texts, [{"year": 1}, {"year": 2}, {"year": 3}], ids=["a", "b", "c"])
    assert {one.id for one in store.similarity_search("pump", filter={"year": [2, 3]})} == {"b", "c"}
    scored = store.similarity_search_with_relevance_scores("pump hall", k=3)
    assert all(0 <= score <= 1 for _, score in scored)
    assert [score for _, score in scored] == sorted((score for _, score in scored), reverse=True)
    best, worst = scored[0][1], scored[-1][1]
    above = store.similarity_search_with_relevance_scores("pump hall", k=9, score_threshold=(best + worst) / 2)
    assert above == [one for one in scored if one[1] > worst]
    by_vector = store.similarity_search_by_vector(store.embeddings.embed_query("pump hall"), k=3)
    assert [one.id for one in by_vector] == [one.id for one, _ in scored]
    diverse = store.max_marginal_relevance_search("pump", k=2, lambda_mult=0.1)
    assert {one.id for one in diverse} & {"a", "b"}
    assert "c" in {one.id for one in diverse}


def test_tenants_never_see_each_other(engine):
    mine, other = (LLoCOVectorStore(engine, tenant=name) for name in ("mine", "other"))
    mine.add_texts(["the secret word"], ids=["a"])
    other.add_texts(["another text"], ids=["a"])
    assert [one.page_content for one in mine.similarity_search("word", k=9)] == ["the secret word"]
    assert [one.page_content for one in other.similarity_search("secret word", k=9)] == ["another text"]
    other.delete()
    assert other.get_by_ids(["a"]) == []
    assert len(mine.get_by_ids(["a"])) == 1


def test_from_texts_wants_an_engine_and_no_other_embedder(engine):
    made = LLoCOVectorStore.from_texts(["some words"], None, [{"n": 1}], ids=["a"], engine=engine, tenant="t")
    assert made.get_by_ids(["a"])[0].metadata == {"n": 1}
    assert LLoCOVectorStore.from_documents(made.get_by_ids(["a"]), made.embeddings, engine=engine).get_by_ids(["a"])
    with pytest.raises(ValueError, match="engine must be given"):
        LLoCOVectorStore.from_texts(["x"])
    with pytest.raises(ValueError, match="embedding must be None"):
        LLoCOVectorStore.from_texts(["x"], TestStandard.get_embeddings(), engine=engine)


def run_index(store, manager, documents, **options) -> dict[str, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return index(documents, manager, store, source_id_key="source", key_encoder="sha256", **options)


def test_index_adds_skips_updates_and_cleans_up(store):
    manager = InMemoryRecordManager("lloco")
    manager.create_schema()
    first = [Document(page_content=cases.story(name), metadata={"source": name}) for name in ("pump", "crane")]
    assert run_index(store, manager, first, cleanup="incremental")["num_added"] == 2
    assert run_index(store, manager, first, cleanup="incremental")["num_skipped"] == 2
    changed = [Document(page_content="The pump is broken.", metadata={"source": "pump"})]
    result = run_index(store, manager, changed, cleanup="incremental")
    assert (result["num_added"], result["num_deleted"]) == (1, 1)
    assert {one.page_content for one in store.similarity_search("pump", k=9)} == {
        "The pump is broken.",
        cases.story("crane"),
    }
    assert run_index(store, manager, [], cleanup="full")["num_deleted"] == 2
    assert store.engine.documents() == []
    assert store.engine.verify() == []  # no orphaned segment either
