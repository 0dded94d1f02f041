"""Faults: damaged files are named and repaired, full disks and dead processes leave the store as it was."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest
from places import TESTS
from store_cases import document, load_all, make_store, manifest, put, segment, segment_file, text_vector

from lloco_engine import atomic
from lloco_engine.errors import (
    NotInStore,
    SegmentUnavailable,
    StoreCorrupt,
    StoreFull,
    StoreLocked,
    StoreMismatch,
    StoreNotFound,
)
from lloco_engine.store import Store, files
from lloco_engine.types import Segment


@pytest.fixture
def path(tmp_path):
    make_store(tmp_path / "s", document("a"), document("b", 70), document("c", seed="b")).close()
    return tmp_path / "s"


def overwrite(file, at, data):
    whole = bytearray(file.read_bytes())
    whole[at : at + len(data)] = data
    file.write_bytes(whole)


def first_segment(path, doc_id):
    with Store.open(path) as store:
        segment_id = store.chunks(doc_id)[0].segment_id
    return segment_id, segment_file(path, segment_id)


def damage_byte(file):
    overwrite(file, file.stat().st_size - 20, b"\x7f\x7f")


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("damage", [damage_byte, truncate, os.remove])
def test_a_damaged_segment_is_named_refused_alone_and_made_again(path, damage):
    segment_id, file = first_segment(path, "b")
    damage(file)
    with Store.open(path) as store:
        (problem,) = store.verify()
        assert (problem.kind, problem.path) == ("segment", file.relative_to(path).as_posix())
        assert problem.doc_ids == ("b", "c") and segment_id in problem.detail
        with pytest.raises(SegmentUnavailable, match=segment_id):
            store.load_segment(segment_id, verify=True)
        ids = [hit.segment_id for hit in store.chunks("b")]
        loaded = load_all(store, ids)
        if damage is not damage_byte:  # a single wrong byte is found by `verify` only
            assert isinstance(loaded[0], SegmentUnavailable) and store.missing_segments("b") == [segment_id]
        assert all(isinstance(other, Segment) for other in loaded[1:])
        assert store.missing_segments("b", verify=True) == store.missing_segments("c", verify=True) == [segment_id]
        assert store.missing_segments("a", verify=True) == []
        with store.writer() as writer:
            assert not writer.segment_stats(segment_id)
            writer.save_segment(segment_id, segment("made by another compressor run"))
        assert store.verify() == [] and store.missing_segments("b", verify=True) == []
        assert store.document("b").version == 1


def test_a_segment_under_another_ones_name_is_noticed(path):
    with Store.open(path) as store:
        one, other = (hit.segment_id for hit in store.chunks("a")[:2])
        segment_file(path, one).write_bytes(segment_file(path, other).read_bytes())
        with pytest.raises(SegmentUnavailable, match=other):
            store.load_segment(one)
        assert [problem.kind for problem in store.verify()] == ["segment"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "\xff\xfe", "{}", '{"format_version": 1}', None],
    ids=["empty", "cut", "list", "binary", "no fields", "few fields", "missing"],
)
def test_a_damaged_manifest_is_named_and_written_again(path, text):
    file = path / "manifest.json"
    if text is None:
        file.unlink()
    else:
        file.write_bytes(text.encode("latin-1"))
    with pytest.raises(StoreCorrupt, match=r"manifest\.json"):
        Store.open(path)
    assert [(problem.kind, problem.path) for problem in Store.verify_path(path)] == [("manifest", "manifest.json")]
    assert any("written anew" in line for line in Store.repair(path)), "the catalogue keeps a copy"
    with Store.open(path, expect=manifest()) as store:
        assert store.verify() == [] and len(store.documents()) == 3
    assert len(list(path.glob("manifest.json.damaged-*"))) == (text is not None)


def test_without_a_manifest_and_a_catalogue_one_must_be_given(path):
    (path / "manifest.json").write_bytes(b"")
    damage_header(path / "catalogue.sqlite")
    with pytest.raises(StoreCorrupt, match=r"manifest\.json"):
        Store.repair(path)
    assert any("written anew" in line for line in Store.repair(path, manifest=manifest()))
    with Store.open(path, expect=manifest()) as store:
        assert {problem.kind for problem in store.verify()} == {"orphan"}


@pytest.mark.parametrize("field", ["layers", "memory", "compressor_settings", "ratio", "decoder_fingerprint"])
def test_a_manifest_field_of_the_wrong_type_is_named(path, field):
    values = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(values | {field: [True]}))
    with pytest.raises(StoreCorrupt, match=field):
        Store.open(path)


def test_a_newer_format_is_refused_by_number(path):
    values = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({"format_version": 9, "unheard_of": values}))
    with pytest.raises(StoreMismatch, match=r"format_version .* is 9; this engine reads up to 2"):
        Store.open(path)


def damage_header(file):
    overwrite(file, 0, b"garbage!")


def damage_page(file):
    overwrite(file, 8192 + 8, b"\xff" * 2000)


@pytest.mark.parametrize("damage", [damage_header, damage_page, truncate, lambda file: os.truncate(file, 0), os.remove])
def test_a_damaged_catalogue_is_named_and_an_ingest_uses_the_segments_again(path, damage):
    damage(path / "catalogue.sqlite")
    with pytest.raises(StoreCorrupt, match=r"catalogue\.sqlite"):
        Store.open(path)
    assert {(p.kind, p.path) for p in Store.verify_path(path)} == {("catalogue", "catalogue.sqlite")}
    (line,) = Store.repair(path)
    assert "catalogue.sqlite" in line and "ingest the documents again" in line
    assert len(list(path.glob("catalogue.sqlite.damaged-*"))) == (damage is not os.remove)
    with Store.open(path) as store:
        assert store.documents() == [] and store.search(text_vector("x"), top_k=3) == []
        assert {problem.kind for problem in store.verify()} == {"orphan"}
        with store.writer() as writer:
            writer.save_segment = None  # every segment is there already
            for doc in (document("a"), document("b", 70), document("c", seed="b")):
                assert put(writer, doc) == "added"
        assert store.verify() == [] and len(store.search(text_vector("x"), top_k=3)) == 3


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE chunks SET text = 'y' || substr(text, 2) WHERE chunk_key = 1",
        "UPDATE windows SET vector = zeroblob(32) WHERE window_id = 1",
        "DELETE FROM windows WHERE window_id = 1",
    ],
)
def test_damage_inside_the_catalogues_rows_is_found(path, statement):
    connection = sqlite3.connect(path / "catalogue.sqlite")
    connection.execute(statement)
    connection.commit()
    connection.close()
    (problem,) = Store.verify_path(path)
    assert (problem.kind, problem.path, problem.doc_ids) == ("catalogue", "catalogue.sqlite", ("a",))
    assert any("ingest a again" in line for line in Store.repair(path))
    with Store.open(path) as store:
        assert [info.doc_id for info in store.documents()] == ["b", "c"]
        assert {problem.kind for problem in store.verify()} == {"orphan"}


def test_a_repair_that_is_cut_off_anywhere_loses_nothing(path, tmp_path, monkeypatch):
    with Store.open(path) as store:
        texts = {info.doc_id: store.document_text(info.doc_id) for info in store.documents()}
    done = 0
    for fatal in range(100):
        place, left = shutil.copytree(path, tmp_path / str(fatal)), [fatal]
        damage_word_index(place)
        with monkeypatch.context() as patch:
            for name in ("link", "replace", "unlink"):
                patch.setattr(os, name, cut_off(getattr(os, name), left))
            with suppress(KeyboardInterrupt):
                Store.repair(place)
                done += 1
        with suppress(StoreCorrupt), Store.open(place):
            pass
        Store.repair(place)
        with Store.open(place) as store:
            assert store.verify() == []
            assert {info.doc_id: store.document_text(info.doc_id) for info in store.documents()} == texts, fatal
        if done:
            break
    assert fatal > 4


def test_a_repair_keeps_the_damaged_catalogue_where_there_are_no_links(path, monkeypatch):
    damage_word_index(path)
    damaged = (path / "catalogue.sqlite").read_bytes()
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here")))
    Store.repair(path)
    (kept,) = path.glob("catalogue.sqlite.damaged-*")
    assert kept.read_bytes() == damaged
    assert Store.verify_path(path) == []


def damage_word_index(path):
    with closing(sqlite3.connect(path / "catalogue.sqlite")) as connection, connection:
        connection.execute("DELETE FROM words_data WHERE id > 10")


def cut_off(work, left):
    """Do so many things more, and no other."""

    def counted(*arguments, **named):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return work(*arguments, **named)

    return counted


def test_repair_removes_what_is_left_over_and_what_is_damaged(path):
    segment_id, file = first_segment(path, "b")
    truncate(file)
    stray = segment_file(path, "0" * 32)
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"x")
    (path / "tmp" / "half").write_bytes(b"x")
    next((path / "index").iterdir()).write_bytes(b"x")
    assert {problem.kind for problem in Store.verify_path(path)} == {"segment", "orphan", "index"}
    assert len(Store.repair(path)) == 3
    assert not stray.exists() and not file.exists() and not list((path / "tmp").iterdir())
    with Store.open(path) as store:
        assert [problem.kind for problem in store.verify()] == ["segment"]
        assert store.missing_segments("b") == [segment_id]
    assert len(Store.repair(path)) == 1, "what only an ingest can make again is still said"
    make_store(path.parent / "clean", document("a")).close()
    assert Store.repair(path.parent / "clean") == []


def test_verify_and_repair_want_a_store(tmp_path):
    for call in (Store.verify_path, Store.repair):
        with pytest.raises(StoreNotFound):
            call(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_verify_reports_progress(path):
    seen = []
    with Store.open(path) as store:
        store.verify(lambda done, total: seen.append((done, total)))
    assert seen == [(n, 8) for n in range(1, 9)]


@pytest.mark.parametrize(
    "bad", ["../../etc/passwd", "ab/../" + "c" * 26, "A" * 32, "g" * 32, "a" * 31, "", "a" * 32 + "\n"]
)
def test_a_segment_id_cannot_leave_the_folder(path, bad):
    with Store.open(path) as store:
        with pytest.raises(NotInStore, match="32 lowercase hex digits"):
            store.load_segment(bad)
        with store.writer() as writer:
            for call in (lambda: writer.save_segment(bad, segment("x")), lambda: writer.segment_stats(bad)):
                with pytest.raises(NotInStore, match="32 lowercase hex digits"):
                    call()


def test_document_ids_never_become_paths(tmp_path):
    evil = ["../../evil", "/etc/passwd", "a/b\\c", "..", "con", "x" * 5000, "~"]
    before = {"s"}
    with make_store(tmp_path / "s", *(document(doc_id, tenant="../t") for doc_id in evil)) as store:
        assert sorted(info.doc_id for info in store.documents()) == sorted(evil)
        assert {entry.name for entry in tmp_path.iterdir()} == before
        names = {p.name for p in (tmp_path / "s").rglob("*") if p.is_file()}
        assert all(len(Path(name).stem) == 32 for name in names if name.endswith(".safetensors"))
        for doc_id in evil:
            assert store.document_text(doc_id, "../t") == document(doc_id).text


# Full disk


def listing(path):
    kept = ("segments", "index", "manifest.json")
    return {p: p.read_bytes() for p in path.rglob("*") if p.is_file() and p.relative_to(path).parts[0] in kept}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_while_a_segment_is_written(path, monkeypatch, number):
    before = listing(path)
    write = atomic._write

    def fill(file, data):
        write(file, data[: len(data) // 2])
        raise OSError(number, os.strerror(number))

    with Store.open(path) as store:
        info = store.documents()
        with store.writer() as writer:
            monkeypatch.setattr(atomic, "_write", fill)
            with pytest.raises(StoreFull, match="the store is as it was: free space"):
                put(writer, document("new"))
            monkeypatch.undo()
        assert listing(path) == before and not list((path / "tmp").iterdir())
        assert store.documents() == info and store.verify() == []


def test_a_file_that_could_not_be_replaced_keeps_its_content(tmp_path, monkeypatch):
    file = tmp_path / "file"
    files.write_atomic(file, b"old", tmp_path / "tmp")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(StoreFull, match="no room to write 3 bytes"):
        files.write_atomic(file, b"new", tmp_path / "tmp")
    assert file.read_bytes() == b"old" and not list((tmp_path / "tmp").iterdir())


def test_a_disk_that_fills_while_the_catalogue_is_written(path):
    with Store.open(path) as store:
        info = store.documents()
        with store.writer() as writer:
            connection = writer._catalogue.connection
            connection.execute(f"PRAGMA max_page_count = {connection.execute('PRAGMA page_count').fetchone()[0]}")
            with pytest.raises(StoreFull, match=r"catalogue\.sqlite .*as it was"):
                for n in range(50):
                    put(writer, document("a", 500, seed=f"v{n}"))
        assert [i for i in store.documents() if i.doc_id != "a"] == info[1:]
        assert {problem.kind for problem in store.verify()} <= {"orphan"}
        assert all(isinstance(s, Segment) for s in load_all(store, [h.segment_id for h in store.chunks("a")]))


def test_a_real_limit_on_file_size(path):
    """The system's own refusal, in a process of its own: the limit is for life."""
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(TESTS)!r})
from store_cases import document, put
from lloco_engine.errors import StoreFull
from lloco_engine.store import Store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Store.open({str(path)!r}) as store, store.writer() as writer:
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
    try:
        put(writer, document("new"))
    except StoreFull as error:
        print("full", error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.stdout.startswith("full no room to write"), out.stderr
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 400
    with Store.open(path) as store:
        assert len(store.documents()) == 3 and store.verify() == []


def test_an_index_that_cannot_be_saved_costs_nothing_but_time(path, monkeypatch, caplog):
    from lloco_engine.store import index

    def refuse(*_):
        raise StoreFull("no room")

    with Store.open(path) as store:
        monkeypatch.setattr(index, "write_atomic", refuse)
        with store.writer() as writer:
            put(writer, document("new"))
        assert "could not be saved" in caplog.text
    with Store.open(path) as store:
        assert store.search(text_vector(document("new").text[:10]), top_k=1)[0].doc_id == "new"
        assert store.verify() == []


# Two writers


def test_a_second_writer_waits_its_turn(path):
    with Store.open(path) as one, Store.open(path) as two:
        order = []

        def second():
            with two.writer() as writer:
                order.append("second")
                put(writer, document("two"))

        thread = threading.Thread(target=second)
        with one.writer() as writer:
            thread.start()
            time.sleep(0.1)
            put(writer, document("one"))
            order.append("first")
        thread.join()
        assert order == ["first", "second"] and {i.doc_id for i in one.documents()} >= {"one", "two"}


def test_a_second_writer_gives_up_and_names_the_holder(path):
    code = f"""
import sys
from lloco_engine.store import Store
with Store.open({str(path)!r}) as store, store.writer():
    print("held", flush=True)
    sys.stdin.read()
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with Store.open(path) as store:
            with pytest.raises(StoreLocked, match=rf"process {other.pid}\); waited 0.05 s"), store.writer(timeout=0.05):
                pass
            assert len(store.documents()) == 3, "readers do not wait"
            other.send_signal(signal.SIGKILL)
            other.wait()
            with store.writer(timeout=5) as writer:
                put(writer, document("new"))
    finally:
        other.kill()
        other.wait()
        other.stdin.close()
        other.stdout.close()


# kill -9

_INGEST = """
import itertools, os, signal, sys, time, random
sys.path.insert(0, {tests!r})
from store_cases import document, put
from lloco_engine.store import Store
import faiss, safetensors.torch, torch
random.seed(7)
began = time.monotonic()  # on a busy machine everything takes longer, and kills must hit all of it
with Store.open({path!r}) as store, store.writer() as writer:
    put(writer, document("d0", 60, seed="d0v0", made=0))
pace = time.monotonic() - began
for round in range({rounds}):
    child = os.fork()  # the imports are paid for once
    if not child:
        try:
            with Store.open({path!r}) as store:
                for n in itertools.count(round * 1000):
                    with store.writer() as writer:
                        for part in range(3):
                            name = f"d{{(n * 3 + part) % 7}}"
                            if n % 5 == 4 and store.document_state(name):
                                writer.delete_document(name)
                            else:
                                put(writer, document(name, 60, seed=f"{{name}}v{{n}}", made=n))
        finally:
            os._exit(1)
    time.sleep(pace * (0.1 + random.random() * 4))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"ingest ended by itself: {{status}}"
    print("killed", flush=True)
    assert sys.stdin.readline() == "go on\\n"
"""


def check_whole(path):
    """Every document is wholly there; returns how many are."""
    with Store.open(path) as store:
        assert {problem.kind for problem in store.verify()} <= {"orphan"}
        for info in store.documents():
            made = info.metadata["made"]
            expected = document(info.doc_id, 60, seed=f"{info.doc_id}v{made}")
            assert store.document_text(info.doc_id) == expected.text and info.content_hash == expected.content_hash
            hits = store.chunks(info.doc_id)
            assert len(hits) == info.segments == 3
            for hit in hits:
                assert (store.load_segment(hit.segment_id, verify=True).keys == segment(hit.text).keys.half()).all()
            best = store.search(text_vector(expected.text[:10]), top_k=1)[0]
            assert (best.doc_id, best.ordinal) == (info.doc_id, 0) and best.score > 0.999
        return len(store.documents())


def test_kill_9_at_any_moment_of_ingest(tmp_path):
    path, rounds = tmp_path / "s", 10
    make_store(path).close()
    code = _INGEST.format(tests=str(TESTS), path=str(path), rounds=rounds)
    ingest = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        seen = []
        for _ in range(rounds):
            assert ingest.stdout.readline() == "killed\n"
            seen.append(check_whole(path))
            ingest.stdin.write("go on\n")
            ingest.stdin.flush()
        assert ingest.wait() == 0 and max(seen) > 3
    finally:
        ingest.kill()
        ingest.wait()
        ingest.stdin.close()
        ingest.stdout.close()
    with Store.open(path) as store:
        with store.writer() as writer:
            put(writer, document("last", made=0))
            writer.collect_garbage()
        assert store.verify() == [] and not list((path / "tmp").iterdir())
