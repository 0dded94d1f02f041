"""Readers that may not write, and processes that were forked: they are served, or refused in a sentence."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import traceback

import pytest
from places import TESTS
from store_cases import document, make_store, put, text_vector, unit
from test_store_catalogue import golden

from lloco_engine.errors import StoreError, WrongProcess
from lloco_engine.store import Store
from lloco_engine.store.schema import is_latest

DOCUMENTS = [document(f"d{n}", 60) for n in range(3)]


def served(path):
    """What a reader sees of a store of `DOCUMENTS`."""
    with Store.open(path) as store:
        best = store.search(text_vector(DOCUMENTS[1].text[:10]), top_k=1, question="d1000", lexical=0.5)[0]
        assert best.doc_id == "d1" and store.stats()["documents"] == 3
        assert [info.doc_id for info in store.documents()] == ["d0", "d1", "d2"]
        assert store.load_segment(best.segment_id).source_tokens
        assert [problem.kind for problem in store.verify()] == []


def as_another(path, act):
    """Run ``act`` in a child of another user, who may read what lies under ``path`` and write nothing."""
    for folder in (path, *path.parents):
        if folder.stat().st_uid == os.getuid() and len(folder.parts) > 2:
            folder.chmod(folder.stat().st_mode | 0o055)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            act()
            os.write(write, b"served")
        except BaseException:
            os.write(write, traceback.format_exc().encode()[-3000:])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as said:
        result = said.read()
    os.waitpid(child, 0)
    assert result == "served", result


root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def files(path):
    return sorted((str(file), file.stat().st_size) for file in path.rglob("*"))


@root
def test_another_user_reads_and_does_not_write(tmp_path):
    path = tmp_path / "s"
    make_store(path, *DOCUMENTS).close()
    before = files(path)

    def act():
        served(path)
        with (
            pytest.raises(StoreError, match=r"cannot be written \(Permission denied\)"),
            Store.open(path) as store,
            store.writer(),
        ):
            pass

    as_another(path, act)
    assert files(path) == before


@root
def test_another_user_reads_beside_a_writer_and_after_it(tmp_path):
    path = tmp_path / "s"
    make_store(path, *DOCUMENTS[:2]).close()

    def act():
        with Store.open(path) as store:
            assert len(store.documents()) == 2
            go.write(b"x")
            go.flush()
            assert come.read(1) == b"x"
            assert len(store.documents()) == 3, "the file is another than the one that was opened"
        served(path)

    ends = [os.pipe() for _ in range(2)]
    go, come = os.fdopen(ends[0][1], "wb"), os.fdopen(ends[1][0], "rb")
    open_ends = []

    def write():
        with os.fdopen(ends[0][0], "rb") as asked:
            assert asked.read(1) == b"x"
        store = Store.open(path)
        open_ends.append(store)
        with store.writer() as writer:
            put(writer, DOCUMENTS[2])
        os.write(ends[1][1], b"x")

    writing = threading.Thread(target=write)
    writing.start()
    as_another(path, act)
    writing.join()
    open_ends[0].close()
    for each in (go, come):
        each.close()
    os.close(ends[1][1])


@root
def test_another_user_reads_what_a_killed_writer_left(tmp_path):
    path = tmp_path / "s"
    make_store(path, *DOCUMENTS[:2]).close()
    code = (
        f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
        "import os\nfrom store_cases import *\n"
        f"store = Store.open({str(path)!r})\n"
        "with store.writer() as writer:\n    put(writer, document('d2', 60))\n    os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    (path / "catalogue.sqlite-shm").unlink()
    assert (path / "catalogue.sqlite-wal").stat().st_size
    before = files(path)
    as_another(path, lambda: served(path))
    assert files(path) == before


@root
def test_an_older_catalogue_is_brought_up_to_date_in_memory(tmp_path):
    path = tmp_path / "s"
    golden("store_v1_float16", path)
    before = files(path)

    def act():
        with Store.open(path) as store:
            assert store.documents() and not store.verify()
            assert is_latest(store._catalogue.connection, "the copy")

    as_another(path, act)
    assert files(path) == before


def in_child(act):
    """What ``act`` raises in a forked child; it must not take a minute."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        import signal

        signal.alarm(60)
        try:
            act()
            os.write(write, b"nothing")
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as said:
        result = said.read()
    os.waitpid(child, 0)
    return result


def test_a_store_that_was_opened_before_a_fork_is_refused_after_it(tmp_path):
    with make_store(tmp_path / "s", *DOCUMENTS) as store:
        with store._lock:  # as when another thread is in the middle of a search
            result = in_child(lambda: store.search(unit(0), top_k=1))
        assert result.startswith("WrongProcess: the store at ") and f"opened it ({os.getpid()})" in result
        assert in_child(store.documents).startswith("WrongProcess")
        assert in_child(store.close) == "nothing", "its end is no error"
        assert in_child(lambda: store.writer().__enter__()).startswith("WrongProcess")
        assert in_child(lambda: served(tmp_path / "s")) == "nothing", "one of its own can be opened"
        assert len(store.documents()) == 3
        with pytest.raises(WrongProcess):
            store._lock._process += 1
            store.documents()
        store._lock._process -= 1
