"""Single changes of what a store keeps: each is seen by verify, or nothing that the store says has changed."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from store_cases import document, make_store, put, segment

from lloco_engine.errors import LLoCOError
from lloco_engine.store import Store, verify
from lloco_engine.store.catalogue import Catalogue
from lloco_engine.store.files import Layout
from lloco_engine.types import Divergence

KINDS = 3  # among which the changes of --flips are shared: cells, bits of the catalogue, bits of other files
A_REPAIR = 32  # changes for each that is repaired


@pytest.fixture
def flips(pytestconfig):
    """Changes to make in all."""
    return pytestconfig.getoption("--flips")


@pytest.fixture
def rng(pytestconfig):
    return random.Random(pytestconfig.getoption("--seed"))


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Nobody writes here, so what does not fit needs no second look."""
    monkeypatch.setattr(verify, "_LOOKS", 0)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A store of two tenants, with shared and refined segments, metadata of every type and an adapter; at rest."""
    path = tmp_path_factory.mktemp("flips") / "s"
    documents = [document(f"d{n}", 70, year=2000 + n, draft=n % 2 == 0, share=n / 7, who="Ann") for n in range(4)]
    documents += [document("copy", 70, seed="d1"), document("d1", 50, tenant="red", note="é漢")]
    with make_store(path, *documents) as store:
        files = {
            "adapter_config.json": b'{"r": 4}',
            "adapter_model.safetensors": bytes(range(200)),
            "lloco.json": b"{}",
        }
        store.adapters.add(files, "", "letters", "run1")
        former = store.chunks("d0")[0]
        made = replace(segment(former.text), divergence=Divergence(0.5, 0.25, 8))
        with store.writer() as writer:
            writer.replace_segments({former.segment_id: writer.save_segment("ab" * 16, made)})
    assert Store.verify_path(path) == []
    with closing(sqlite3.connect(path / "catalogue.sqlite")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path


@pytest.fixture
def store(original, tmp_path):
    """A copy of the original."""
    return Path(shutil.copytree(original, tmp_path / "s"))


def said(path):
    """Everything that the catalogue can say: its tables, and where each word is found."""
    with closing(Catalogue(Layout(path).catalogue)) as catalogue, closing(catalogue.copy()) as copy:
        connection = copy.connection
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY 1")]
        tables = [name for name in names if not name.startswith("words")]
        made = {name: sorted(map(repr, connection.execute(f'SELECT * FROM "{name}"'))) for name in tables}
        connection.execute("CREATE VIRTUAL TABLE temp.places USING fts5vocab ('main', 'words', 'instance')")
        made["words"] = connection.execute("SELECT * FROM temp.places").fetchall()
        for word in sorted({row[0] for row in made["words"]}):
            found = connection.execute("SELECT rowid FROM words WHERE words MATCH ?", (f'"{word}"',))
            made[f"word {word}"] = sorted(found.fetchall())
        made["schema"] = connection.execute("SELECT name, sql FROM sqlite_master ORDER BY 1").fetchall()
        made["pragmas"] = [connection.execute(f"PRAGMA {name}").fetchone() for name in ("user_version", "encoding")]
    return made


def harmful(path):
    return [problem for problem in Store.verify_path(path) if problem.kind != "orphan"]


def restore(original, store, *names):
    for name in names or ("catalogue.sqlite",):
        for suffix in ("", "-wal", "-shm"):
            (store / f"{name}{suffix}").unlink(missing_ok=True)
        shutil.copy(original / name, store / name)


def changed(value, rng):
    """Another value of a cell, as like it as can be."""
    if value is None:
        return "x"
    if isinstance(value, int):
        return value ^ (1 << rng.randrange(8))
    if isinstance(value, float):
        return value + 2.0**-20
    if not value:
        return "x" if isinstance(value, str) else b"x"
    at = rng.randrange(len(value))
    if isinstance(value, bytes):
        return value[:at] + bytes([value[at] ^ (1 << rng.randrange(8))]) + value[at + 1 :]
    return value[:at] + chr(ord(value[at]) ^ 1) + value[at + 1 :]


def cells(path):
    """Every cell of every table, those behind the word index too: table, row, column, value."""
    found = []
    with closing(sqlite3.connect(path / "catalogue.sqlite")) as connection:
        schema = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'").fetchall()
        for table, sql in schema:
            if sql and sql.upper().startswith("CREATE VIRTUAL"):
                continue
            info = connection.execute(f'PRAGMA table_info("{table}")').fetchall()
            keys = [row[1] for row in info if row[5]] or ["rowid"]
            for row in connection.execute(f'SELECT {", ".join(keys)}, * FROM "{table}"').fetchall():
                where = dict(zip(keys, row, strict=False))
                found += [(table, where, column[1], row[len(keys) + at]) for at, column in enumerate(info)]
    return found


def test_every_changed_cell_is_seen(original, store, rng, report, flips):
    """By SQL: each cell of each table, another value in it."""
    before, everything = said(original), cells(original)
    tables = {}
    for cell in everything:
        tables.setdefault((cell[0], cell[2]), []).append(cell)
    chosen = [rng.choice(some) for some in tables.values()]  # each column of each table at least once
    chosen += rng.choices(everything, k=max(0, -(-flips // KINDS) - len(chosen)))
    tried = 0
    for table, where, column, value in chosen:
        with closing(sqlite3.connect(store / "catalogue.sqlite", isolation_level=None)) as connection:
            terms = " AND ".join(f'"{key}" IS ?' if key != "rowid" else "rowid = ?" for key in where)
            try:
                connection.execute("PRAGMA writable_schema = ON")
                connection.execute(
                    f'UPDATE "{table}" SET "{column}" = ? WHERE {terms}', (changed(value, rng), *where.values())
                )
            except sqlite3.Error:
                continue  # a constraint of the table, or a value that it cannot have
        tried += 1
        assert harmful(store) or said(store) == before, (table, where, column)
        restore(original, store)
    report("changed cells", tried, 0, f"of {len(everything)} in {len(tables)} columns")


def test_every_lost_row_is_seen(original, store, rng, report, flips):
    with closing(sqlite3.connect(original / "catalogue.sqlite")) as connection:
        names = "SELECT name FROM sqlite_master WHERE type = 'table' AND sql NOT LIKE 'CREATE VIRTUAL%'"
        tables = [row[0] for row in connection.execute(names)]
    tried, before = 0, said(original)
    for table in tables:
        for which in ("min", "max"):
            with closing(sqlite3.connect(store / "catalogue.sqlite", isolation_level=None)) as connection:
                key = "rowid"
                info = connection.execute(f'PRAGMA table_info("{table}")').fetchall()
                without = connection.execute(
                    "SELECT sql LIKE '%WITHOUT ROWID%' FROM sqlite_master WHERE name = ?", (table,)
                )
                if without.fetchone()[0]:
                    key = next(row[1] for row in info if row[5])
                gone = connection.execute(f'DELETE FROM "{table}" WHERE {key} = (SELECT {which}({key}) FROM "{table}")')
                if not gone.rowcount:
                    continue
            tried += 1
            assert harmful(store) or (table.startswith("words_") and said(store) == before), (table, which)
            restore(original, store)
    for statement in ("DELETE FROM words_data WHERE id > 10", "DELETE FROM words", "DROP TRIGGER words_of_gone_window"):
        with closing(sqlite3.connect(store / "catalogue.sqlite", isolation_level=None)) as connection:
            connection.execute(statement)
        tried += 1
        assert harmful(store), statement
        restore(original, store)
    report("lost rows", tried, 0)


def flipped(file, at, bit):
    with open(file, "r+b") as handle:
        handle.seek(at)
        (byte,) = handle.read(1)
        handle.seek(at)
        handle.write(bytes([byte ^ (1 << bit)]))


def test_every_flipped_bit_of_the_catalogue_is_seen(original, store, rng, report, flips):
    """In the file itself: also where no cell lies, as in free pages, which say nothing."""
    before = said(original)
    whole = (original / "catalogue.sqlite").read_bytes()
    written = [at for at, byte in enumerate(whole) if byte]  # most of a small catalogue is room
    count, without = -(-flips // KINDS), 0
    for number in range(count):
        at = rng.randrange(100) if number % 10 == 0 else rng.choice(written if number % 4 else range(len(whole)))
        flipped(store / "catalogue.sqlite", at, rng.randrange(8))
        if not harmful(store):
            without += 1
            assert said(store) == before, f"byte {at}"
        restore(original, store)
    report("flipped bits of the catalogue", count, 0, f"{without} of them in what says nothing")


def test_every_flipped_bit_of_the_other_files_is_seen(original, store, rng, report, flips):
    files = [
        file.relative_to(original)
        for file in sorted(original.rglob("*"))
        if file.is_file() and not file.name.startswith(("catalogue", "write.lock", "reserve"))
    ]
    kinds = {}
    for file in files:
        kinds.setdefault(file.parts[0], []).append(file)
    assert set(kinds) == {"manifest.json", "segments", "index", "adapters"}
    count, padding = -(-flips // KINDS), 0
    for number in range(count):
        file = rng.choice(kinds[sorted(kinds)[number % len(kinds)]])
        at = rng.randrange((original / file).stat().st_size)
        flipped(store / file, at, rng.randrange(8))
        if not harmful(store):
            padding += 1  # white space of a segment's header, for it is the only one that is not compared as bytes
            assert file.parts[0] == "segments" and same_segment(original, store, file)
        shutil.copy(original / file, store / file)
    report("flipped bits of the other files", count, 0, f"{padding} of them in white space of a header")


def same_segment(original, store, file):
    from safetensors import safe_open

    def content(path):
        with safe_open(str(path), "np") as opened:
            return opened.metadata(), {name: opened.get_tensor(name).tobytes() for name in opened.keys()}  # noqa: SIM118

    return content(original / file) == content(store / file)


@pytest.mark.parametrize("kind", ["cut", "empty", "gone", "folder", "zeros", "garbage"])
def test_whole_files_that_are_damaged_are_named(original, store, kind, rng, report, flips):
    files = [file.relative_to(original) for file in sorted(original.rglob("*")) if file.is_file()]
    files = [file for file in files if file.name not in ("write.lock", "reserve")]
    for file in [rng.choice(files) for _ in range(4)] + [Path("catalogue.sqlite"), Path("manifest.json")]:
        path, size = store / file, (original / file).stat().st_size
        if kind == "cut":
            os.truncate(path, rng.randrange(size))
        elif kind in ("gone", "folder"):
            path.unlink()
            if kind == "folder":
                path.mkdir()
        else:
            path.write_bytes({"empty": b"", "zeros": bytes(size), "garbage": rng.randbytes(size)}[kind])
        problems = harmful(store)
        assert problems and all(problem.detail for problem in problems), file
        for function in (lambda: Store.open(store).close(), lambda: Store.verify_path(store)):
            with suppress(LLoCOError):
                function()
        if path.is_dir():
            path.rmdir()
        restore(original, store, str(file))
    report(f"files: {kind}", 6, 0)


def test_files_that_say_nothing_may_be_anything(store, rng, report):
    """The lock and the reserve: a store goes on without them, and with others in their place."""
    names, kinds = ("reserve", "write.lock"), ("gone", "garbage", "empty")
    for name in names:
        for kind in kinds:
            (store / name).unlink(missing_ok=True)
            if kind != "gone":
                (store / name).write_bytes(rng.randbytes(99) if kind == "garbage" else b"")
            assert harmful(store) == []
            with Store.open(store) as opened, opened.writer() as writer:
                put(writer, document("new", 30, seed=f"{name} {kind}"))
                writer.delete_document("new")
            assert (store / "reserve").stat().st_size == 2**20
    report("the reserve and the lock", len(names) * len(kinds), 0)


def test_blocks_of_zeros_in_the_catalogue_are_seen(original, store, rng, report, flips):
    before = said(original)
    pages = (original / "catalogue.sqlite").stat().st_size // 4096
    numbers = list(range(pages))
    for page in numbers:
        with open(store / "catalogue.sqlite", "r+b") as handle:
            handle.seek(page * 4096 + rng.choice([0, 512, 2048]))
            handle.write(bytes(512))
        assert harmful(store) or said(store) == before, page
        restore(original, store)
    report("blocks of zeros", len(numbers), 0)


def test_what_is_repaired_is_as_it_was_or_named(original, store, rng, report, flips):
    """After repair the store is sound, and every document is there as it was, or named."""
    with Store.open(original) as opened:
        infos = {(info.tenant, info.doc_id): info for info in opened.documents()}
        texts = {key: opened.document_text(key[1], key[0]) for key in infos}
    size, lost, count = (original / "catalogue.sqlite").stat().st_size, 0, max(1, flips // A_REPAIR)
    for _ in range(count):
        shutil.rmtree(store)
        shutil.copytree(original, store)
        at = rng.randrange(size)
        flipped(store / "catalogue.sqlite", at, rng.randrange(8))
        done = " ".join(Store.repair(store))
        assert not [problem for problem in harmful(store) if problem.kind != "segment"], at
        with Store.open(store) as opened:
            kept = {(info.tenant, info.doc_id): info for info in opened.documents()}
            for key, info in infos.items():
                if key in kept:
                    assert kept[key] == info and opened.document_text(key[1], key[0]) == texts[key]
                else:
                    lost += 1
                    assert f"ingest {key[1]} again" in done or "ingest the documents again" in done, (at, done)
    report("repairs", count, 0, f"{lost} of {count * len(infos)} documents named to be ingested again")
