"""Search: the same answer as a slow reference, whatever the index, the filters and the history of the store."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from store_cases import DIM, document, make_store, manifest, put, text_vector, unit

from lloco_engine.config import StoreConfig
from lloco_engine.errors import ConfigError, StoreMismatch
from lloco_engine.store import Store, index
from lloco_engine.types import Span


def slowly(store, vector, top_k, wanted=lambda info: True, tenant="", min_score=-1.0):
    """(segment id, best score) of the best segments, straight from the texts."""
    best = {}
    for info in store.documents(tenant):
        for hit in store.chunks(info.doc_id, tenant) if wanted(info) else ():
            for at in range(0, len(hit.text), 10):
                score = float(text_vector(hit.text[at : at + 10]) @ vector)
                if score >= min_score:
                    best[hit.segment_id] = max(score, best.get(hit.segment_id, -2.0))
    return sorted(best.items(), key=lambda pair: -pair[1])[:top_k]


def slowly_with_words(store, vector, top_k, question, lexical, wanted=lambda info: True, tenant=""):
    """As `slowly`, by the vector and by the question's words, each window gone through for each word."""
    windows = [
        (hit.segment_id, hit.text[at : at + 10])
        for info in store.documents(tenant)
        for hit in (store.chunks(info.doc_id, tenant) if wanted(info) else ())
        for at in range(0, len(hit.text), 10)
    ]
    weights = {}
    for word in question.lower().split():
        count = sum(word in re.split(r"[^a-z0-9]+", text.lower()) for _, text in windows)
        if count <= len(windows) / 4:
            weights[word] = math.log(1 + (len(windows) - count + 0.5) / (count + 0.5))
    best = {}
    for segment_id, text in windows:
        having = sum(weights[word] for word in weights if word in re.split(r"[^a-z0-9]+", text.lower()))
        score = (1 - lexical) * float(text_vector(text) @ vector) + lexical * having / sum(weights.values())
        best[segment_id] = max(score, best.get(segment_id, -2.0))
    return sorted(best.items(), key=lambda pair: -pair[1])[:top_k]


def same(hits, expected):
    return [hit.segment_id for hit in hits] == [segment_id for segment_id, _ in expected] and np.allclose(
        [hit.score for hit in hits], [score for _, score in expected], atol=1e-5
    )


def corpus():
    return [
        document(f"d{n}", 60, year=2000 + n % 3, kind="even" if n % 2 == 0 else "odd", big=n > 6, share=n / 4)
        for n in range(12)
    ]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with make_store(tmp_path_factory.mktemp("search") / "s", *corpus(), document("t", 60, tenant="other")) as made:
        yield made


@pytest.mark.parametrize("top_k", [1, 4, 36, 100])
def test_it_agrees_with_a_slow_reference(store, top_k):
    for seed in range(5):
        assert same(store.search(unit(seed), top_k=top_k), slowly(store, unit(seed), top_k))


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        ({"year": 2001}, lambda i: i.metadata["year"] == 2001),
        ({"year": 2001.0}, lambda i: i.metadata["year"] == 2001),
        ({"year": "2001"}, lambda i: False),
        ({"year": 2001, "kind": "odd"}, lambda i: i.metadata["year"] == 2001 and i.metadata["kind"] == "odd"),
        ({"big": True}, lambda i: i.metadata["big"]),
        ({"big": 1}, lambda i: False),
        ({"share": 0.25}, lambda i: i.metadata["share"] == 0.25),
        ({"share": 1}, lambda i: i.metadata["share"] == 1.0),
        ({"year": [2000, 2002]}, lambda i: i.metadata["year"] != 2001),
        ({"year": []}, lambda i: False),
        ({"doc_id": "d3"}, lambda i: i.doc_id == "d3"),
        ({"doc_id": {"d3", "d4"}}, lambda i: i.doc_id in ("d3", "d4")),
        ({"source": "d5.txt", "title": "Title of d5"}, lambda i: i.doc_id == "d5"),
        ({"nothing": "x"}, lambda i: False),
        ({"kind": "' OR 1=1 --"}, lambda i: False),
    ],
)
def test_filters_hold_inside_the_search(store, filters, wanted):
    for seed in range(3):
        assert same(store.search(unit(seed), top_k=5, filters=filters), slowly(store, unit(seed), 5, wanted))


def test_a_filter_that_no_metadata_can_meet_is_refused(store):
    with pytest.raises(ConfigError, match="the filter on 'year' must not compare with None"):
        store.search(unit(0), top_k=1, filters={"year": None})


def test_min_score(store):
    scores = [score for _, score in slowly(store, unit(1), 100)]
    assert len(store.search(unit(1), top_k=100, min_score=scores[6] - 1e-4)) == 7
    assert store.search(unit(1), top_k=100, min_score=1.01) == []


def test_windows_come_best_first_and_quote_the_text(store):
    text = store.document_text("d4")[20:30]
    hit = store.search(text_vector(text), top_k=1)[0]
    assert (hit.doc_id, hit.ordinal, hit.windows[0]) == ("d4", 1, Span(20, 30))
    assert hit.quote(hit.windows[0]) == text and hit.score == pytest.approx(1.0, abs=1e-5)
    scores = [float(text_vector(hit.quote(window)) @ text_vector(text)) for window in hit.windows]
    assert scores == sorted(scores, reverse=True)


def test_it_widens_until_there_are_enough_segments(tmp_path):
    crowd, lone = document("crowd", 20), document("lone", 20)
    near = unit(0)
    with make_store(tmp_path / "s") as store, store.writer() as writer:
        texts = {crowd.text[at : at + 10]: near for at in (0, 10)}
        for n in range(60):  # 120 windows of one shared segment lie nearer than any other
            put(writer, document(f"crowd{n}", 20, seed="crowd"), texts)
        put(writer, lone)
        hits = store.search(near, top_k=2)
        assert [hit.doc_id for hit in hits] == ["crowd0", "lone"]
        assert len(hits[0].windows) == 2, "windows of the document that the hit names, not of its copies"


def test_the_index_follows_every_change(tmp_path):
    with make_store(tmp_path / "s", *corpus()) as store, Store.open(tmp_path / "s") as other:
        for n in range(6):
            with store.writer() as writer:
                writer.delete_document(f"d{n}")
                put(writer, document(f"d{n + 6}", 40, seed=f"new{n}"))
                for each in (store, other):  # before the writer has saved the index
                    assert same(each.search(unit(n), top_k=9), slowly(store, unit(n), 9))
            for each in (store, other):
                assert same(each.search(unit(n), top_k=9), slowly(store, unit(n), 9))
        assert len(list((tmp_path / "s" / "index").iterdir())) == 1
        with Store.open(tmp_path / "s") as third:
            assert same(third.search(unit(9), top_k=9), slowly(store, unit(9), 9))


def graph_store(path, count=40):
    config = StoreConfig(hnsw_above=30)
    store = Store.create(path, manifest(), config)
    with store.writer() as writer:
        for n in range(count):
            put(writer, document(f"d{n}", 60, part=n % 4, rare=n == 7))
    return store


@pytest.mark.parametrize("lexical", [0.1, 0.5, 1.0])
def test_words_of_the_question_count_beside_the_vector(store, lexical):
    for seed in range(4):
        for question in (f"d{seed}003 D7001 nowhere", "d1000", "absent d2004 d2005 d3005"):
            for top_k in (1, 4, 12):
                hits = store.search(unit(seed), top_k=top_k, question=question, lexical=lexical)
                if lexical == 1.0:  # windows without any of the words are equal, in whichever order
                    hits = [hit for hit in hits if hit.score > 0]
                expected = slowly_with_words(store, unit(seed), max(top_k, len(hits)), question, lexical)
                assert same(hits, expected[: len(hits)])
            odd = store.search(unit(seed), top_k=3, question=question, lexical=0.5, filters={"kind": "odd"})
            assert same(
                odd, slowly_with_words(store, unit(seed), 3, question, 0.5, lambda i: i.metadata["kind"] == "odd")
            )


def test_a_name_is_found_that_the_vector_misses(store):
    far = -text_vector("d7003".rjust(10, "."))  # nothing is further from the window than this
    hits = store.search(far, top_k=1, question="D7003?", lexical=0.7)
    assert hits[0].doc_id == "d7" and "d7003" in hits[0].quote(hits[0].windows[0])


def test_words_of_other_tenants_and_of_deleted_documents_are_nothing(tmp_path):
    alone = make_store(tmp_path / "alone", *corpus())
    shared = make_store(tmp_path / "shared", *corpus(), document("t", 60, tenant="other"), document("gone", 60))
    with alone, shared:
        with shared.writer() as writer:
            writer.delete_document("gone")
            put(writer, replace(corpus()[3], text="another " + corpus()[3].text[8:]))
            put(writer, corpus()[3])
        for question in ("t003 d1001 gone002", "another d1001", "gone001"):
            hits = [
                [
                    (hit.doc_id, hit.ordinal, hit.score)
                    for hit in each.search(unit(1), top_k=5, question=question, lexical=0.5)
                ]
                for each in (alone, shared)
            ]
            assert hits[0] == hits[1]


def test_a_question_is_no_query_language(store):
    for question in (
        '"',
        'd1001" OR "d2001',
        "NEAR(d1001 d2001)",
        "text: d1001 AND *",
        "(",
        "d1001'; DROP TABLE words",
        "\x00",
    ):
        store.search(unit(0), top_k=3, question=question, lexical=0.5)
    hits = store.search(unit(0), top_k=1, question="d1001 AND NOT d1001", lexical=1.0)
    assert hits[0].doc_id == "d1"


def test_a_word_of_too_many_windows_is_not_looked_at(store, monkeypatch):
    monkeypatch.setattr("lloco_engine.store.index._MOST_WITH", 0)
    assert same(store.search(unit(0), top_k=4, question="d1001", lexical=0.5), slowly(store, unit(0), 4))


def test_words_follow_every_change(tmp_path):
    question = "d3001 new1001 new4000 d8002 nowhere"
    with make_store(tmp_path / "s", *corpus()) as store, Store.open(tmp_path / "s") as other:

        def agree(n):
            for each in (store, other, store, other):  # asked again, they answer from what they have looked up
                hits = each.search(unit(n), top_k=9, question=question, lexical=0.5)
                assert same(hits, slowly_with_words(store, unit(n), 9, question, 0.5))

        agree(6)
        for n in range(6):  # always 72 windows
            with store.writer() as writer:
                writer.delete_document(f"d{n}")
                put(writer, document(f"e{n}", 60))
                put(writer, document(f"d{n + 6}", 60, seed=f"new{n}"))
                agree(n)  # before the writer has saved the index
            agree(n)


def test_words_follow_an_index_that_is_made_again(tmp_path):
    question, filters = "d36001 d38000", {"part": [0, 1, 2]}
    with graph_store(tmp_path / "s") as store:

        def agree():
            hits = store.search(unit(3), top_k=9, question=question, lexical=0.5, filters=filters)
            expected = slowly_with_words(store, unit(3), 9, question, 0.5, lambda info: info.metadata["part"] < 3)
            assert same(hits, expected)

        with store.writer() as writer:
            for n in range(35):
                writer.delete_document(f"d{n}")
            agree()
            rows = len(store._index._ids)
        agree()
        assert (rows, len(store._index._ids)) == (240, 30), "the same windows, in other rows"


def test_few_words_and_filters_are_remembered(store, monkeypatch):
    monkeypatch.setattr("lloco_engine.store.index._CACHED_WORDS", 2)
    monkeypatch.setattr("lloco_engine.store.index._CACHED_FILTERS", 2)
    store._index._having.clear()
    store._index._allowed.clear()
    question = "d1001 d2002 d3003 d4004 d1001"
    for year in (2000, 2001, 2002, 2000):
        hits = store.search(unit(0), top_k=4, question=question, lexical=0.5, filters={"year": year})
        expected = slowly_with_words(store, unit(0), 4, question, 0.5, lambda i, y=year: i.metadata["year"] == y)
        assert same(hits, expected)
    assert len(store._index._having) == len(store._index._allowed) == 2


def is_graph(store):
    import faiss

    return isinstance(faiss.downcast_index(store._index._index.index), faiss.IndexHNSW)


def test_a_large_store_is_searched_by_graph(tmp_path):
    with graph_store(tmp_path / "s") as store:
        found = recalled = 0
        for seed in range(20):
            for filters, wanted in (({}, lambda i: True), ({"part": 1}, lambda i: i.metadata["part"] == 1)):
                hits, expected = (
                    store.search(unit(seed), top_k=4, filters=filters),
                    slowly(store, unit(seed), 4, wanted),
                )
                assert len(hits) == 4 and (not filters or {hit.metadata["part"] for hit in hits} == {1})
                recalled += len({hit.segment_id for hit in hits} & {segment_id for segment_id, _ in expected})
                found += 4
            # among few windows the search is exact, graph or no graph
            rare = store.search(unit(seed), top_k=9, filters={"rare": True})
            assert same(rare, slowly(store, unit(seed), 9, lambda i: i.doc_id == "d7"))
            with_word = store.search(unit(seed), top_k=1, question=f"d{seed}002", lexical=0.7)
            assert with_word[0].doc_id == f"d{seed}", "its vector comes from the graph"
        assert is_graph(store) and recalled / found > 0.95
        assert same(store.search(unit(0), top_k=500), slowly(store, unit(0), 500))


def test_a_graph_that_cannot_reach_the_allowed_windows_is_scanned(tmp_path):
    near, rng = unit(0), np.random.default_rng(0)

    def around(centre, doc):
        noise = 0.05 * rng.normal(size=(len(doc.text) // 10, DIM)).astype(np.float32)
        made = [(centre + each) / np.linalg.norm(centre + each) for each in noise]
        return {doc.text[at * 10 : at * 10 + 10]: vector for at, vector in enumerate(made)}

    with Store.create(tmp_path / "s", manifest(), StoreConfig(hnsw_above=30)) as store:
        with store.writer() as writer:
            for n in range(20):  # a crowd of another tenant stands around the question
                doc = document(f"n{n}", 200, tenant="crowd")
                put(writer, doc, around(near, doc))
            far = document("far", 400)
            vectors = around(-near, far)
            put(writer, far, vectors)
        hits = store.search(near, top_k=20)
        assert is_graph(store) and len(hits) == 20
        scores = sorted((float(vector @ near) for vector in vectors.values()), reverse=True)
        assert hits[0].score == pytest.approx(scores[0], abs=1e-5)


def test_a_graph_forgets_what_was_deleted(tmp_path):
    with graph_store(tmp_path / "s") as store:
        with store.writer() as writer:
            for n in range(10):
                writer.delete_document(f"d{n}")
        assert is_graph(store) and store._index._index.ntotal == 240
        hits = store.search(unit(3), top_k=200)
        assert len(hits) == 90 and not {hit.doc_id for hit in hits} & {f"d{n}" for n in range(10)}
        with store.writer() as writer:
            for n in range(10, 25):
                writer.delete_document(f"d{n}")
        assert store._index._index.ntotal == 90, "more dead than alive: made again"
        with store.writer() as writer:
            for n in range(25, 39):
                writer.delete_document(f"d{n}")
        assert not is_graph(store), "few enough to search exactly"
        assert same(store.search(unit(3), top_k=9), slowly(store, unit(3), 9))


def test_another_process_takes_over_the_graph_that_the_writer_made(tmp_path):
    store = graph_store(tmp_path / "s", count=2)
    with store, Store.open(tmp_path / "s", config=StoreConfig(hnsw_above=30)) as reader:
        with store.writer() as writer:
            for n in range(2, 40):
                put(writer, document(f"d{n}", 60))
            assert len(reader.search(unit(0), top_k=500)) == 120 and not is_graph(reader)
        assert len(reader.search(unit(0), top_k=500)) == 120 and is_graph(reader)


def test_a_lost_or_damaged_index_is_made_again(tmp_path, caplog):
    make_store(tmp_path / "s", *corpus()).close()
    (file,) = (tmp_path / "s" / "index").iterdir()
    whole = file.read_bytes()
    for damage in (None, b"", whole[: len(whole) // 2], whole[:200] + b"\xff" * 8 + whole[208:]):
        if damage is None:
            file.unlink()
        else:
            file.write_bytes(damage)
        with Store.open(tmp_path / "s") as store, caplog.at_level(logging.WARNING):
            assert same(store.search(unit(1), top_k=7), slowly(store, unit(1), 7))
            assert file.name in caplog.text
            (problem,) = store.verify()
            assert (problem.kind, problem.path) == ("index", f"index/{file.name}")
        caplog.clear()
    with Store.open(tmp_path / "s") as store:
        with store.writer():
            pass
        assert store.verify() == [] and file.read_bytes() == whole


def test_a_vector_of_another_embedder_is_refused(store):
    with pytest.raises(StoreMismatch, match=rf"embedder_dim .* is {DIM}, not \(9,\)"):
        store.search(unit(0, 9), top_k=1)
    with pytest.raises(ConfigError, match="lexical must be between 0 and 1, not 2"):
        store.search(unit(0), top_k=1, lexical=2)
    with pytest.raises(ConfigError, match="top_k must be at least 1, not 0"):
        store.search(unit(0), top_k=0)


def test_faiss_is_used_by_what_it_offers():
    """Nothing reaches into its memory: what it hands out of that is not checked, and moves with its versions."""
    source = Path(index.__file__).read_text(encoding="utf-8")
    assert "compute_distance_subset" in source
    for inside in ("get_xb", "rev_swig_ptr", "fvec_", ".data()", "codes"):
        assert inside not in source, f"{inside} of faiss is its own"
