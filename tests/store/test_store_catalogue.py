"""The catalogue: migrations go forward, whole or not at all, and stores of past formats go on opening."""

from __future__ import annotations

import shutil
import sqlite3

import pytest
from places import GOLDEN
from store_cases import document, make_store, put, text_vector

from lloco_engine.errors import StoreCorrupt, StoreMismatch
from lloco_engine.store import Store, schema

# of the first segment of document "beta"
LENGTHS = [[4, 1, 1], [2, 3, 2]]
KEY = [0.354981, -0.481201, -0.298096, -0.410400]
VALUE = [-0.049255, -0.260254, -0.220337, -0.326172]
BIAS = [0.989944, 0.553021]


def golden(name, folder):
    """A store as an earlier engine left it: the catalogue is kept as text, and the index is derived."""
    folder.mkdir()
    connection = sqlite3.connect(folder / "catalogue.sqlite")
    connection.executescript((GOLDEN / name / "catalogue.sql").read_text(encoding="utf-8"))
    connection.close()
    shutil.copy(GOLDEN / name / "manifest.json", folder)
    for file in (GOLDEN / name).glob("*.safetensors"):
        home = folder / "segments" / file.name[:2]
        home.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, home)
    return folder


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_store_of_format_1_opens_answers_and_takes_documents(tmp_path, dtype):
    with Store.open(golden(f"store_v1_{dtype}", tmp_path / "s"), expect={"dtype": dtype, "head_dim": 4}) as store:
        assert store.verify() == []
        alpha, beta = store.documents()
        assert (alpha.doc_id, alpha.version, alpha.tenant) == ("alpha", 2, "")
        assert dict(alpha.metadata) == {"year": 2021, "draft": False, "share": 1.0, "author": "Ann"}
        assert (beta.doc_id, beta.version, beta.tenant) == ("beta", 1, "red")
        assert store.document_text("beta", "red") == "...beta000...beta001...beta002...beta003"
        hit = store.search(text_vector(".second002"), top_k=1, filters={"year": 2021})[0]
        assert (hit.doc_id, hit.ordinal) == ("alpha", 1) and hit.score == pytest.approx(1.0, abs=1e-5)
        (first,) = store.hits_of_text("  ...beta000...beta001\n", "red")  # a column that format 1 did not have
        assert first == store.chunks("beta", "red")[0] == store.hits_of_segment(first.segment_id, "red")[0]
        assert first.slots > 0 and not store.hits_of_text("...beta000...beta001", "blue")
        words = {"question": "beta002", "lexical": 1.0, "tenant": "red"}  # nor a table of words
        assert [hit.ordinal for hit in store.search(text_vector("else"), top_k=1, **words)] == [1]
        got = store.load_segment(store.chunks("beta", "red")[0].segment_id, verify=True)
        assert got.lengths.tolist() == LENGTHS and got.source_tokens == 20
        assert got.keys[0].tolist() == pytest.approx(KEY, abs=0.02)
        assert got.values[-1].tolist() == pytest.approx(VALUE, abs=0.02)
        assert got.bias[:2].tolist() == pytest.approx(BIAS)
        with store.writer() as writer:
            # the same content gets the same address as it had then
            assert (
                writer.segment_id("red", map(ord, "...beta000...beta001")) == store.chunks("beta", "red")[0].segment_id
            )
            assert put(writer, document("alpha", 30)) == "replaced"
        assert store.document("alpha").version == 3 and store.verify() == []


def schema_of(path):
    connection = sqlite3.connect(path / "catalogue.sqlite")
    try:
        tables = connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
        return tables, connection.execute("PRAGMA user_version").fetchone()[0]
    finally:
        connection.close()


def test_opening_brings_an_older_catalogue_up_to_date(tmp_path, monkeypatch):
    make_store(tmp_path / "s", document("a")).close()
    later = ("ALTER TABLE documents ADD COLUMN mood TEXT NOT NULL DEFAULT 'calm';", "CREATE TABLE more (x);")
    monkeypatch.setattr(schema, "MIGRATIONS", schema.MIGRATIONS + later)
    with Store.open(tmp_path / "s") as store:
        assert store.document("a").version == 1 and store.verify() == []
    assert schema_of(tmp_path / "s")[1] == len(schema.MIGRATIONS)
    make_store(tmp_path / "t").close()
    assert [name for name, _ in schema_of(tmp_path / "t")[0]] == [name for name, _ in schema_of(tmp_path / "s")[0]]


def test_a_migration_that_fails_leaves_the_catalogue_as_it_was(tmp_path, monkeypatch):
    make_store(tmp_path / "s", document("a")).close()
    before = schema_of(tmp_path / "s")
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, "CREATE TABLE more (x); SELECT no_such_function();"))
    with pytest.raises(StoreCorrupt, match="no_such_function"):
        Store.open(tmp_path / "s")
    monkeypatch.undo()
    assert schema_of(tmp_path / "s") == before
    with Store.open(tmp_path / "s") as store:
        assert store.document("a")


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_store_of_summaries_opens_and_keeps_its_chains(tmp_path, dtype):
    expect = {"memory": "summary", "summary_dim": 6, "dtype": dtype}
    with Store.open(golden(f"store_v1_summary_{dtype}", tmp_path / "s"), expect=expect) as store:
        assert store.verify() == []
        first, second, third = store.chunks("alpha")
        assert [hit.segment_id for hit in store.earlier(third)] == [first.segment_id, second.segment_id]
        got = store.load_segment(third.segment_id, verify=True)
        assert got.slots == 3 and got.source_tokens == 20
        assert got.vectors[0, :3].tolist() == pytest.approx([1.527344, 0.053040, 0.493408], abs=0.01)
        with store.writer() as writer:
            ids = list(map(ord, third.text))  # the same content after the same past has the same address
            assert writer.segment_id("", ids, second.segment_id) == third.segment_id != writer.segment_id("", ids)
            writer.delete_document("alpha")
        assert store.verify() == [] and len(store.chunks("beta", "red")) == 2


def test_a_newer_catalogue_is_refused(tmp_path):
    make_store(tmp_path / "s").close()
    connection = sqlite3.connect(tmp_path / "s" / "catalogue.sqlite")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    latest = len(schema.MIGRATIONS)
    with pytest.raises(StoreMismatch, match=rf"user_version .* is 99; this engine reads up to {latest}: upgrade"):
        Store.open(tmp_path / "s")


def test_another_programs_database_is_refused(tmp_path):
    make_store(tmp_path / "s").close()
    (tmp_path / "s" / "catalogue.sqlite").unlink()
    connection = sqlite3.connect(tmp_path / "s" / "catalogue.sqlite")
    connection.execute("CREATE TABLE recipes (x)")
    connection.close()
    with pytest.raises(StoreCorrupt, match="is not a store's catalogue"):
        Store.open(tmp_path / "s")
