"""Backups: whole, of one state, beside a writer; or not there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from places import TESTS
from store_cases import document, make_store, put, segment_file, text_vector

from lloco_engine.errors import StoreCorrupt, StoreError, StoreNotFound
from lloco_engine.store import Store


@pytest.fixture
def store(tmp_path):
    with make_store(tmp_path / "s", document("a", year=2020), document("b", 90, tenant="red")) as made:
        made.adapters.add({"lloco.json": b"{}", "adapter_model.safetensors": b"weights"}, "", "letters")
        yield made


@pytest.mark.parametrize("link", [False, True])
def test_a_backup_is_the_store_and_is_restored(tmp_path, store, link):
    seen = []
    store.backup(tmp_path / "to" / "b", link=link, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 4
    inside = {path.name for path in (tmp_path / "to").iterdir()}
    assert inside == {"b"}, "nothing is left beside it"
    file = store.chunks("a")[0].segment_id
    same = os.path.samefile(segment_file(tmp_path / "s", file), segment_file(tmp_path / "to" / "b", file))
    assert same == link
    before, found = store.documents(), store.search(text_vector("x"), top_k=5)
    with store.writer() as writer:
        writer.delete_document("a")
        put(writer, document("later"))
    Store.restore(tmp_path / "to" / "b", tmp_path / "back")
    for path in (tmp_path / "to" / "b", tmp_path / "back"):
        assert Store.verify_path(path) == []
        with Store.open(path) as copy:
            assert copy.documents() == before and copy.search(text_vector("x"), top_k=5) == found
            assert copy.document_text("b", "red") == document("b", 90).text
            assert [row.damage() for row in copy.adapters.rows()] == [None]
            with copy.writer() as writer:
                put(writer, document("c"))
            assert copy.verify() == []
    assert store.verify() == []


def test_a_backup_goes_where_nothing_is_and_comes_from_a_sound_store(tmp_path, store):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "file").write_text("x")
    for dest in (tmp_path / "full", tmp_path / "file", tmp_path / "s"):
        with pytest.raises(StoreError, match="missing or empty"):
            store.backup(dest)
    (tmp_path / "empty").mkdir()
    store.backup(tmp_path / "empty")
    assert Store.verify_path(tmp_path / "empty") == []
    with pytest.raises(StoreNotFound):
        Store.restore(tmp_path / "none", tmp_path / "new")
    segment = segment_file(tmp_path / "s", store.chunks("a")[0].segment_id)
    whole = segment.read_bytes()
    for damage in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), None):
        segment.unlink() if damage is None else segment.write_bytes(damage)
        with pytest.raises(StoreCorrupt):
            store.backup(tmp_path / "damaged")
        assert not (tmp_path / "damaged").exists() and not list(tmp_path.glob(".damaged*"))


_WRITE = """
import itertools, sys
sys.path.insert(0, {tests!r})
from store_cases import document, put
from lloco_engine.store import Store
with Store.open({path!r}) as store:
    for n in itertools.count():
        with store.writer() as writer:
            put(writer, document(f"w{{n % 5}}", 60, seed=f"w{{n}}"))
            if n % 3 == 2:
                writer.delete_document(f"w{{n % 5}}")
        if n % 4 == 0:
            store.adapters.add({{"lloco.json": b"%d" % n}}, "", "letters")
            if n % 8 == 0 and n:
                store.adapters.remove("", "letters", store.adapters.rows()[0].version)
        print(n, flush=True)
"""


@pytest.fixture
def busy(store):
    """Another process that adds, replaces and deletes documents and adapters without rest."""
    code = _WRITE.format(tests=str(TESTS), path=str(store.path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "0\n"
    done = [0]

    def count():
        for line in process.stdout:
            done[0] = int(line)

    thread = threading.Thread(target=count)
    thread.start()
    yield done
    assert process.poll() is None, "the writer came to grief"
    process.kill()
    process.wait()
    thread.join()
    process.stdout.close()


def test_beside_a_writer_verify_cries_no_wolf_and_backups_are_whole(tmp_path, store, busy):
    rounds, first = 0, busy[0]
    deadline = time.monotonic() + 60
    while rounds < 6 or (busy[0] < first + 12 and time.monotonic() < deadline):
        assert [problem for problem in store.verify() if problem.kind != "orphan"] == []
        store.backup(tmp_path / f"b{rounds}", link=rounds % 2 == 0)
        assert Store.verify_path(tmp_path / f"b{rounds}") == []
        with Store.open(tmp_path / f"b{rounds}") as copy:
            assert {"a", "b"} <= {info.doc_id for info in copy.documents()}
        rounds += 1
    assert busy[0] > first


def test_a_backup_that_is_killed_is_not_there_and_the_next_one_is(tmp_path, store):
    code = f"""
import os, signal, sys
from lloco_engine.store import Store
def stop(done, total):
    if done == total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
with Store.open({str(store.path)!r}) as store:
    store.backup({str(tmp_path / "b")!r}, progress=stop)
"""
    process = subprocess.run([sys.executable, "-c", code], check=False)
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "b").exists()
    assert store.verify() == []
    store.backup(tmp_path / "b")
    assert Store.verify_path(tmp_path / "b") == [] and not list(tmp_path.glob(".b*"))
