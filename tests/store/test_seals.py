"""Seals: every table and column is under one, writing renews them, and none is given to what was damaged."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from store_cases import document, make_store, put, segment, set_back, text_vector

from lloco_engine.errors import StoreCorrupt
from lloco_engine.store import Store, schema
from lloco_engine.store.tables import Shape


@pytest.fixture
def path(tmp_path):
    make_store(tmp_path / "s", document("a", year=2020), document("b", 70), document("c", seed="b")).close()
    return tmp_path / "s"


def run(path, statement, *values):
    with closing(sqlite3.connect(path / "catalogue.sqlite", isolation_level=None)) as connection:
        return connection.execute(statement, values).fetchall()


def complaints(path):
    return [problem.detail for problem in Store.verify_path(path) if problem.kind == "catalogue"]


def test_every_table_is_sealed_with_all_its_columns(path):
    with closing(sqlite3.connect(path / "catalogue.sqlite")) as connection:
        shape = Shape(connection)
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        owned = {table.name: table.columns for tables in shape.owned.values() for table in tables}
        assert {"documents", "metadata", "chunks", "windows", "segments"} <= set(owned)
        assert {"generation", "index_file", "adapters", "adapter_groups", "sqlite_sequence"} <= set(shape.others)
        words = {name for (name,) in tables if name == "words" or name.startswith("words_")}
        assert {name for (name,) in tables} == {*owned, *shape.others, *words, "seals", "sealed"}
        for name, columns in owned.items():
            assert list(columns) == [row[1] for row in connection.execute(f"PRAGMA table_info({name})")]


def test_what_a_later_migration_adds_is_sealed_without_being_named(path, monkeypatch):
    later = (
        "ALTER TABLE documents ADD COLUMN mood TEXT NOT NULL DEFAULT 'calm';"
        "CREATE TABLE notes (note INTEGER PRIMARY KEY, chunk_key INTEGER NOT NULL"
        " REFERENCES chunks ON DELETE CASCADE, said TEXT);"
        "INSERT INTO notes SELECT NULL, chunk_key, 'hm' FROM chunks;"
        "CREATE TABLE beside (x); INSERT INTO beside VALUES (1);",
    )
    monkeypatch.setattr(schema, "MIGRATIONS", schema.MIGRATIONS + later)
    with Store.open(path) as store, store.writer() as writer:
        put(writer, document("new"))
    assert complaints(path) == []
    for statement, said in (
        ("UPDATE documents SET mood = 'mad' WHERE doc_id = 'a'", "document 'a'"),
        ("UPDATE notes SET said = 'hmm' WHERE note = 1", "notes"),
        ("UPDATE beside SET x = 2", "'beside'"),
    ):
        shutil.copytree(path, path.parent / "copy")
        run(path.parent / "copy", statement)
        (detail,) = complaints(path.parent / "copy")
        assert said in detail
        shutil.rmtree(path.parent / "copy")


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE documents SET title = 'another' WHERE doc_id = 'a'", "what documents say of document 'a'"),
        ("UPDATE metadata SET value = 'n:2021'", "what metadata say of document 'a'"),
        ("DELETE FROM metadata", "what metadata say of document 'a'"),
        ("UPDATE chunks SET start = 1 WHERE chunk_key = 1", "what chunks say of document 'a'"),
        ("UPDATE windows SET end = 9 WHERE window_id = 1", "what windows say of document 'a'"),
        ("UPDATE segments SET slots = slots + 1 WHERE segment_id IN (SELECT min(segment_id) FROM segments)",
         "what segments say of segment"),
        ("DELETE FROM documents WHERE doc_id = 'a'", "document 'a' is missing"),
        ("DELETE FROM seals WHERE label = 'a'", "document 'a'"),
        ("UPDATE generation SET number = 1", "'generation'"),
        ("UPDATE index_file SET windows = 1", "'index_file'"),
        ("UPDATE sqlite_sequence SET seq = 1", "'sqlite_sequence'"),
        ("DROP TRIGGER words_of_gone_window", "'schema'"),
        ("DELETE FROM words_data WHERE id > 10", "word index"),
        ("UPDATE words_content SET c0 = 'other words' WHERE id = 1", "word index"),
    ],
)  # fmt: skip
def test_a_change_by_another_hand_is_seen_and_named(path, statement, said):
    run(path, statement)
    assert any(said in detail and "--repair" in detail for detail in complaints(path)), complaints(path)


def test_words_of_another_document_are_seen(path):
    """The word index is whole in itself, and not what the chunks say."""
    run(path, "DELETE FROM words WHERE rowid = 1")
    run(path, "INSERT INTO words (rowid, text) VALUES (1, 'words of nobody')")
    assert "word index" in complaints(path)[0]
    assert any("nothing" not in line for line in Store.repair(path))
    assert complaints(path) == []
    with Store.open(path) as store:
        assert len(store.documents()) == 3
        found = store.search(text_vector("else"), top_k=1, question="a000", lexical=1.0)
        assert found[0].doc_id == "a"


@pytest.mark.parametrize("how", ["a writer", "a migration"])
def test_damage_beside_the_documents_is_not_sealed_by(how, path, monkeypatch):
    with Store.open(path) as store:
        store.adapters.add({"lloco.json": b"{}"}, "", "letters", "run1")
    for statement, said in (
        ("UPDATE adapter_groups SET current = 0", "'adapter_groups'"),
        ("UPDATE adapters SET run = 'run2'", "'adapters'"),
        ("DROP TRIGGER words_of_gone_window", "'schema'"),
        ("DELETE FROM seals WHERE label = 'c'; DELETE FROM documents WHERE doc_id = 'c'", "list of documents"),
    ):
        copy = Path(shutil.copytree(path, path.parent / "copy"))
        for one in statement.split(";"):
            run(copy, one)
        with monkeypatch.context() as patch:
            if how == "a migration":
                patch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, "CREATE TABLE beside (x);"))
            with Store.open(copy) as store:
                with store.writer() as writer:
                    put(writer, document("new"))
                store.adapters.add({"lloco.json": b"{ }"}, "", "letters", "run3")
            assert any(said in detail for detail in complaints(copy)), (said, complaints(copy))
        shutil.rmtree(copy)


def test_writing_beside_damage_does_not_seal_it(path):
    run(path, "UPDATE documents SET title = 'another' WHERE doc_id = 'a'")
    of_first = "segment_id IN (SELECT segment_id FROM chunks WHERE chunk_key = 1)"
    run(path, f"UPDATE segments SET source_tokens = 3 WHERE {of_first}")
    before = complaints(path)
    assert len(before) == 2
    with Store.open(path) as store:
        first = store.chunks("a")[0].segment_id
        with store.writer() as writer:
            put(writer, document("new"))
            writer.save_segment(first, segment("made again"))
            with writer._catalogue.transaction(write=True) as connection:
                connection.execute("UPDATE documents SET source = 'elsewhere' WHERE doc_id = 'a'")
                connection.execute("UPDATE documents SET source = 'elsewhere' WHERE doc_id = 'b'")
        assert len(complaints(path)) == 2 and "'a'" in complaints(path)[0], "b, which was sound, still is"
        assert not store.is_sound("a") and store.is_sound("b")
        with store.writer() as writer:
            put(writer, document("a", year=2020))
    assert complaints(path) == []


def test_a_catalogue_made_before_seals_is_sealed_when_it_is_opened(path):
    version = next(number for number, step in enumerate(schema.MIGRATIONS) if "CREATE TABLE seals" in step)
    set_back(path, version)
    assert complaints(path) == [], "an older one is looked at as it would be opened"
    Store.open(path).close()
    run(path, "UPDATE documents SET source = 'x' WHERE doc_id = 'c'")
    assert "document 'c'" in complaints(path)[0]


def test_documents_that_are_whole_survive_a_repair_and_the_others_are_named(path):
    run(path, "UPDATE documents SET title = 'another' WHERE doc_id = 'a'")
    run(path, "UPDATE generation SET number = 77")
    done = Store.repair(path)
    assert any("ingest a again" in line for line in done)
    with Store.open(path) as store:
        assert [info.doc_id for info in store.documents()] == ["b", "c"]
        with store.writer() as writer:
            put(writer, document("a", year=2020))
        assert store.verify() == [] and store.generation() > 77


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM words_data WHERE id > 10",
        "DELETE FROM metadata",
        "UPDATE metadata SET value = 's:x'",
        "UPDATE segments SET slots = 99 WHERE segment_id = (SELECT max(segment_id) FROM segments)",
        "UPDATE index_file SET checksum = 'x'",
        "UPDATE seals SET seal = 'x' WHERE label = 'b'",
        "UPDATE sealed SET manifest = 'x'",
        "DROP TRIGGER words_of_gone_window",
        "DROP TABLE words",
        "DROP INDEX chunks_by_segment",
    ],
)
def test_what_is_derived_is_made_again_without_losing_a_document(path, statement):
    with Store.open(path) as store:
        before = store.documents()
    run(path, statement)
    assert complaints(path)
    assert Store.repair(path)
    with Store.open(path) as store:
        assert store.verify() == [] and store.documents() == before
        assert {hit.doc_id for hit in store.search(text_vector("else"), top_k=9, filters={"year": 2020})} == {"a"}


def test_a_manifest_that_was_changed_is_refused_and_put_back(path):
    file = path / "manifest.json"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"ratio": 16.0', b'"ratio": 17.0'))
    with pytest.raises(StoreCorrupt, match=r"manifest\.json is not the one .*--repair"):
        Store.open(path)
    assert [problem.kind for problem in Store.verify_path(path)] == ["manifest"]
    Store.repair(path)
    assert file.read_bytes() == whole and Store.verify_path(path) == []


def test_a_name_that_is_no_text_is_damage_and_no_crash(path):
    with closing(sqlite3.connect(path / "catalogue.sqlite", isolation_level=None)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    file = path / "catalogue.sqlite"
    file.write_bytes(file.read_bytes().replace(b"windows_by_chunk", b"windows\xff\xfe_chunk"))
    assert complaints(path)
    Store.repair(path)
    assert complaints(path) == []
