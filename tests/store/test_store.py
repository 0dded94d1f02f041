"""The store's door: what goes in comes out, replaced and deleted as told, apart by tenant, while others read."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from store_cases import (
    CHUNK,
    DIM,
    chunks_of,
    document,
    load_all,
    make_store,
    manifest,
    put,
    segment,
    segment_file,
    text_vector,
)

from lloco_engine.config import StoreConfig
from lloco_engine.errors import (
    ConfigError,
    DocumentError,
    NotInStore,
    SegmentUnavailable,
    StoreError,
    StoreMismatch,
    StoreNotFound,
)
from lloco_engine.store import Store
from lloco_engine.types import Document, Span


def test_a_document_comes_back_as_it_was_put(tmp_path):
    doc = document("a", 50, year=2020, ratio=0.5, draft=True, author="Ann")
    with make_store(tmp_path / "s", doc) as store:
        info = store.document("a")
        assert (info.title, info.source, info.version, info.chars) == ("Title of a", "a.txt", 1, 50)
        assert (info.segments, info.windows, info.source_tokens, info.compress_s) == (3, 5, 50, 0.5)
        assert dict(info.metadata) == {"year": 2020, "ratio": 0.5, "draft": True, "author": "Ann"}
        assert {key: type(value) for key, value in info.metadata.items()} == {
            "year": int,
            "ratio": float,
            "draft": bool,
            "author": str,
        }
        assert info.content_hash == doc.content_hash and store.document_state("a") == (doc.content_hash, 1)
        assert store.document_text("a") == doc.text
        hits = store.chunks("a")
        assert [hit.text for hit in hits] == [chunk.text for chunk in chunks_of(doc)]
        assert [hit.span for hit in hits] == [Span(0, 20), Span(20, 40), Span(40, 50)]
        assert [hit.score for hit in hits] == [1.0] * 3
        assert info.slots == sum(segment(hit.text).slots for hit in hits)
        assert info.bytes == sum(segment_file(store.path, hit.segment_id).stat().st_size for hit in hits)
        loaded = load_all(store, [hit.segment_id for hit in hits])
        for hit, got in zip(hits, loaded, strict=True):
            made = segment(hit.text)
            assert torch.equal(got.keys, made.keys.half()) and torch.equal(got.values, made.values.half())
            assert torch.equal(got.bias, made.bias) and torch.equal(got.lengths, made.lengths)
            assert got.source_tokens == len(hit.text) and got.lengths.dtype == torch.int64
    with Store.open(tmp_path / "s", expect=manifest()) as again:
        assert again.document("a") == info and again.manifest == manifest()
        assert again.verify() == []


def test_text_survives_that_sqlite_finds_hard(tmp_path):
    doc = Document("odd'\"%id", "a\x01b\r\n\ufffe\N{GRINNING FACE}" * 10, title="\x1b")
    with make_store(tmp_path / "s", doc) as store:
        assert store.document_text(doc.doc_id) == doc.text
        assert store.document(doc.doc_id).title == "\x1b"
        assert store.verify() == []


@pytest.mark.parametrize("field", ["doc_id", "text", "title", "source", "tenant", "origin"])
def test_nul_is_refused_for_sqlite_would_find_no_word_behind_it(tmp_path, field):
    doc = replace(document("a"), **{field: "a\x00b"})
    with (
        make_store(tmp_path / "s") as store,
        store.writer() as writer,
        pytest.raises(DocumentError, match=rf"{field} must not be binary, and character 1 is NUL"),
    ):
        put(writer, doc)


def test_replacing_counts_versions_and_removes_what_is_no_longer_used(tmp_path):
    with make_store(tmp_path / "s", document("a", 50)) as store:
        before = {hit.segment_id for hit in store.chunks("a")}
        changed = Document("a", document("a", 50).text[:CHUNK] + "x" * CHUNK)
        with store.writer() as writer:
            assert put(writer, changed) == "replaced"
        after = {hit.segment_id for hit in store.chunks("a")}
        assert store.document_state("a") == (changed.content_hash, 2)
        assert store.chunks("a")[0].version == 2 and store.document_text("a") == changed.text
        assert len(before & after) == 1, "the unchanged chunk keeps its segment"
        for segment_id in before - after:
            assert not segment_file(store.path, segment_id).exists()
            with pytest.raises(SegmentUnavailable, match="missing"):
                store.load_segment(segment_id)
        assert all(store.load_segment(segment_id) for segment_id in after)
        assert [hit.version for hit in store.search(text_vector("x" * 10), top_k=9)] == [2, 2]
        assert store.verify() == []


def test_deleting_keeps_a_segment_that_another_document_has(tmp_path):
    with make_store(tmp_path / "s", document("a", seed="same"), document("b", 70, seed="same")) as store:
        shared = {hit.segment_id for hit in store.chunks("a")} & {hit.segment_id for hit in store.chunks("b")}
        assert len(shared) == 2
        only_a = {hit.segment_id for hit in store.chunks("a")} - shared
        with store.writer() as writer:
            writer.delete_document("a")
        assert all(store.load_segment(segment_id) for segment_id in shared)
        assert only_a and not any(segment_file(store.path, segment_id).exists() for segment_id in only_a)
        with pytest.raises(NotInStore, match="no document 'a'"):
            store.document("a")
        with store.writer() as writer, pytest.raises(NotInStore, match="no document 'a'"):
            writer.delete_document("a")
        with store.writer() as writer:
            writer.delete_document("b")
        assert not list((store.path / "segments").rglob("*.safetensors"))
        assert store.search(text_vector("x"), top_k=3) == [] and store.documents() == []
        assert store.verify() == []


def test_tenants_never_meet(tmp_path):
    same = [document("a", seed="same", tenant=tenant, owner=tenant) for tenant in ("", "red", "blue")]
    with make_store(tmp_path / "s", *same) as store:
        ids = {tenant: {hit.segment_id for hit in store.chunks("a", tenant)} for tenant in ("", "red", "blue")}
        assert len(set.union(*ids.values())) == sum(map(len, ids.values())), "no segment is shared across tenants"
        vector = text_vector(same[0].text[:10])
        for tenant, own in ids.items():
            hits = store.search(vector, top_k=50, tenant=tenant)
            assert {hit.tenant for hit in hits} == {tenant} and {hit.segment_id for hit in hits} == own
        assert store.search(vector, top_k=5, tenant="red", filters={"owner": "blue"}) == []
        assert store.search(vector, top_k=5, tenant="green") == []
        assert [info.tenant for info in store.documents()] == ["", "blue", "red"]
        assert [info.tenant for info in store.documents("red")] == ["red"]
        for call in (store.document, store.document_text, store.chunks, store.missing_segments):
            with pytest.raises(NotInStore, match="tenant 'green'"):
                call("a", "green")
        assert store.document_state("a", "green") is None
        with store.writer() as writer:
            writer.delete_document("a", "red")
        assert store.document_state("a", "red") is None and store.document_state("a", "blue") is not None
        neighbours = store.neighbours(store.chunks("a", "blue")[0], 1)
        assert {hit.tenant for hit in neighbours} == {"blue"}


def test_neighbours_are_of_the_same_version(tmp_path):
    with make_store(tmp_path / "s", document("a", 100)) as store:
        hits = store.chunks("a")
        assert [hit.ordinal for hit in store.neighbours(hits[2], 1)] == [1, 3]
        assert [hit.ordinal for hit in store.neighbours(hits[0], 2)] == [1, 2]
        assert [hit.ordinal for hit in store.neighbours(hits[4], 9)] == [0, 1, 2, 3]
        assert {hit.score for hit in store.neighbours(hits[0], 2)} == {0.0}
        assert store.neighbours(hits[0], 0) == []
        with store.writer() as writer:
            put(writer, document("a", 100, seed="other"))
        assert store.neighbours(hits[2], 1) == []


def test_the_ledger_adds_up(tmp_path):
    with make_store(tmp_path / "s") as store:
        assert store.stats()["bytes_per_source_token"] == 0.0 and store.stats()["documents"] == 0
    with make_store(tmp_path / "t", document("a"), document("b"), document("c", seed="a")) as store:
        stats = store.stats()
        assert (stats["documents"], stats["segments"], stats["windows"]) == (3, 6, 15)
        assert stats["source_tokens"] == 100, "a shared segment stands for its tokens once"
        assert stats["compress_s"] == 1.5
        on_disk = sum(path.stat().st_size for path in (store.path / "segments").rglob("*.safetensors"))
        assert stats["bytes"]["segments"] == on_disk and stats["bytes"]["index"] > 15 * DIM * 4
        assert stats["bytes"]["total"] == sum(stats["bytes"][part] for part in ("segments", "catalogue", "index"))
        assert stats["bytes_per_source_token"] == stats["bytes"]["total"] / 100


@pytest.mark.parametrize(("dtype", "steps"), [("int8", 127), ("int4", 15)])
def test_few_bits_stay_close(tmp_path, dtype, steps):
    with make_store(tmp_path / "s", document("a"), dtype=dtype) as store:
        for hit in store.chunks("a"):
            got, made = store.load_segment(hit.segment_id, verify=True), segment(hit.text)
            assert got.keys.dtype == torch.float16
            assert (got.keys - made.keys).abs().max() <= made.keys.abs().max() / steps
        assert store.verify() == [] and store.missing_segments("a", verify=True) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_fingerprint": "other"}, r"decoder_fingerprint .* is 'dec0' \(decoder 'tiny'\), not 'other'"),
        ({"compressor": "other"}, "compressor .* is 'attention_matching', not 'other'"),
        ({"compressor_settings": {"score": "rms"}}, "compressor_settings .*max.* not .*rms"),
        ({"ratio": 30}, r"ratio .* is 16\.0, not 30"),
        ({"embedder_dim": 9}, r"embedder_dim .* is 8 \(embedder 'tiny-embedder'\), not 9"),
        ({"dtype": "int8"}, "dtype .* is 'float16', not 'int8'"),
        ({"layers": 3, "compressor": "other"}, "layers .* is 2, not 3"),  # the first field that differs
    ],
)
def test_another_model_or_compressor_is_refused_by_name(tmp_path, changes, message):
    make_store(tmp_path / "s").close()
    with pytest.raises(StoreMismatch, match=message):
        Store.open(tmp_path / "s", expect=manifest(**changes))
    with pytest.raises(StoreMismatch, match=message):
        Store.open(tmp_path / "s", expect=changes)


def test_names_of_models_may_differ(tmp_path):
    make_store(tmp_path / "s", compressor_settings={"layers": (1, 2)}).close()
    same = manifest(decoder="a/copy", embedder="another", created="", engine_version="9", ratio=16)
    with Store.open(tmp_path / "s", expect={**same.to_json(), "compressor_settings": {"layers": (1, 2)}}) as store:
        assert store.manifest.decoder == "tiny"
    with pytest.raises(ConfigError, match="no field 'modle'"):
        Store.open(tmp_path / "s", expect={"modle": 1})


def test_creation_takes_only_an_empty_folder(tmp_path):
    with pytest.raises(StoreNotFound, match="no store at"):
        Store.open(tmp_path / "nothing")
    make_store(tmp_path / "s").close()
    with pytest.raises(StoreError, match="already holds a store"):
        Store.create(tmp_path / "s", manifest())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(StoreError, match=r"'thesis\.txt' and is not a store"):
        Store.create(tmp_path / "mine", manifest())
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot make a folder"):
        Store.create(tmp_path / "file", manifest())
    with pytest.raises(ConfigError, match="dtype must be the manifest's, 'float16', not 'int8'"):
        Store.create(tmp_path / "t", manifest(), StoreConfig(dtype="int8"))


def test_a_creation_that_was_cut_off_is_no_store_and_can_be_done_again(tmp_path):
    make_store(tmp_path / "s").close()
    (tmp_path / "s" / "manifest.json").unlink()  # it is written last
    (tmp_path / "s" / "index").rename(tmp_path / "index")
    with pytest.raises(StoreNotFound):
        Store.open(tmp_path / "s")
    make_store(tmp_path / "s", document("a")).close()
    with Store.open(tmp_path / "s") as store:
        assert store.verify() == []


def test_what_cannot_be_put_is_refused_and_changes_nothing(tmp_path):
    doc = document("a")
    chunks = chunks_of(doc)
    with make_store(tmp_path / "s", doc) as store, store.writer() as writer:
        ids = [writer.segment_id("", chunk.token_ids) for chunk in chunks]
        stats = [writer.segment_stats(segment_id) for segment_id in ids]
        vectors = [np.stack([text_vector("x")] * len(chunk.windows)) for chunk in chunks]

        def attempt(document=doc, chunks=chunks, ids=ids, vectors=vectors, stats=stats):
            writer.put_document(document, chunks, ids, vectors, seconds=0, segment_stats=stats)

        for error, message, arguments in (
            (
                DocumentError,
                "must tile document 'a'; 2 chunks end at 40 of 50",
                {"chunks": chunks[:2], "ids": ids[:2], "vectors": vectors[:2], "stats": stats[:2]},
            ),
            (DocumentError, "chunk 1 breaks off at 0", {"chunks": [chunks[1], chunks[0], chunks[2]]}),
            (
                DocumentError,
                "must tile",
                {"document": doc, "chunks": [], "ids": [], "vectors": [], "stats": []},
            ),
            (DocumentError, "must hold text", {"document": Document("a", "")}),
            (DocumentError, "no control characters, and character 1 is one", {"document": Document("a\nb", doc.text)}),
            (DocumentError, "at most 10,000 characters, not 10,001", {"document": Document("a" * 10_001, doc.text)}),
            (DocumentError, "id must not be empty", {"document": Document("", doc.text)}),
            (
                DocumentError,
                "metadata 'k' must be text, a finite number",
                {"document": Document("a", doc.text, metadata={"k": [b"1"]})},
            ),
            (
                DocumentError,
                "finite number, not inf",
                {"document": Document("a", doc.text, metadata={"k": float("inf")})},
            ),
            (StoreError, "3 chunks but 2 segment ids", {"ids": ids[:2]}),
            (StoreError, r"of shape \(2, 8\), not \(2, 7\)", {"vectors": [vectors[0][:, :7], *vectors[1:]]}),
            (StoreError, "must be finite", {"vectors": [vectors[0] * np.nan, *vectors[1:]]}),
            (SegmentUnavailable, "is not in the store; save it", {"ids": ["0" * 32, *ids[1:]]}),
        ):
            with pytest.raises(error, match=message):
                attempt(**arguments)
        assert store.document_state("a") == (doc.content_hash, 1)
    assert Store.verify_path(tmp_path / "s") == []


def test_an_ingest_that_was_cut_off_goes_on_from_its_segments(tmp_path):
    doc = document("a")
    with make_store(tmp_path / "s") as store:
        with store.writer() as writer:
            chunk = chunks_of(doc)[0]
            segment_id = writer.segment_id("", chunk.token_ids)
            assert not writer.segment_stats(segment_id)
            saved = writer.save_segment(segment_id, segment(chunk.text))
        assert [problem.kind for problem in store.verify()] == ["orphan"] and store.documents() == []
        with store.writer() as writer:
            assert writer.segment_stats(segment_id) == saved
            put(writer, doc)
            assert writer.collect_garbage() == 0
        assert store.verify() == []


def test_garbage_is_removed_only_when_asked(tmp_path):
    with make_store(tmp_path / "s", document("a")) as store:
        with store.writer() as writer:
            writer.save_segment("0" * 32, segment("x"))
            (store.path / "segments" / "stray.txt").write_text("x")
        with store.writer() as writer:
            assert writer.segment_stats("0" * 32)
            assert writer.collect_garbage() == 2
        assert store.verify() == [] and not segment_file(store.path, "0" * 32).exists()


def test_segment_ids_follow_everything_that_a_segment_is_made_from(tmp_path):
    base = manifest()
    assert base.segment_id("", (1, 2)) == "0902a7b32736db52965fa8711497564f", "or stores lose what they hold"
    ids = {base.segment_id("", (1, 2)), base.segment_id("", (12,)), base.segment_id("t", (1, 2))}
    changes = [
        {"decoder_fingerprint": "x"},
        {"tokenizer_fingerprint": "x"},
        {"template_fingerprint": "x"},
        {"compressor": "x"},
        {"compressor_settings": {}},
        {"ratio": 8.0},
        {"dtype": "int8"},
        {"memory": "summary", "summary_dim": 8},
    ]
    ids |= {manifest(**change).segment_id("", (1, 2)) for change in changes}
    assert len(ids) == 3 + len(changes) and all(len(i) == 32 for i in ids)
    unrelated = manifest(decoder="x", embedder_fingerprint="x", created="", ratio=16)
    assert unrelated.segment_id("", iter([1, 2])) == base.segment_id("", (1, 2))
    assert base.segment_id("", (1, 2), "0" * 32) not in ids


def test_readers_go_on_while_a_writer_writes(tmp_path):
    path = tmp_path / "s"
    make_store(path, *(document(f"d{n}", 40, seed=f"d{n}v0") for n in range(4))).close()
    stop, wrong, reads = threading.Event(), [], [0]

    def read(store):
        while not stop.is_set():
            hits = store.search(text_vector("x"), top_k=100)
            versions = {}
            for hit in hits:
                versions.setdefault(hit.doc_id, set()).add(hit.version)
            if len(hits) != 8 or any(len(seen) != 1 for seen in versions.values()):
                wrong.append(versions)
            for loaded in load_all(store, [hit.segment_id for hit in hits]):
                if isinstance(loaded, Exception) and not isinstance(loaded, SegmentUnavailable):
                    wrong.append(loaded)
            reads[0] += 1

    with Store.open(path) as one, Store.open(path) as two:
        threads = [threading.Thread(target=read, args=(store,)) for store in (one, one, two)]
        for thread in threads:
            thread.start()
        for version in range(1, 9):
            with one.writer() as writer:
                for n in range(4):
                    put(writer, document(f"d{n}", 40, seed=f"d{n}v{version}"))
        stop.set()
        for thread in threads:
            thread.join()
        assert not wrong and reads[0] > 3
        assert {info.version for info in two.documents()} == {9}
        assert two.verify() == []


def test_a_closed_store_says_so(tmp_path):
    store = make_store(tmp_path / "s", document("a"))
    store.close()
    with pytest.raises(StoreError, match="was closed"):
        store.documents()
