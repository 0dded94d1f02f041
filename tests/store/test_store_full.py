"""Full disks: every change ends in StoreFull and leaves the store as it was, and deleting works."""

from __future__ import annotations

import errno
import os
import subprocess
from contextlib import closing, suppress

import pytest
from store_cases import document, make_store, manifest, put, text_vector

from lloco_engine import atomic
from lloco_engine.errors import StoreFull
from lloco_engine.store import Store
from lloco_engine.store.files import Layout
from lloco_engine.store.room import keep_reserve, make_room


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    try:
        subprocess.run(mounted, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(place):
    """Take every byte that is left."""
    with (place / "filler").open("ab", buffering=0) as file, suppress(OSError):
        for size in (65536, 4096, 512, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))


def test_a_store_on_a_full_disk_reads_refuses_and_deletes(disk):
    path = disk / "s"
    with make_store(path, *(document(f"d{n}", 200) for n in range(12))) as store:
        before = store.documents()
    fill(disk)
    with Store.open(path) as store:
        assert store.documents() == before
        assert store.search(text_vector("x"), top_k=3) and store.chunks("d1")
        with store.writer() as writer, pytest.raises(StoreFull, match="free space"):
            for n in range(50):
                put(writer, document(f"new{n}", 400))
        assert [info for info in store.documents() if info.doc_id[0] == "d"] == before
        fill(disk)
        with store.writer() as writer:
            for info in before[:6]:
                writer.delete_document(info.doc_id)
        assert [info for info in store.documents() if info.doc_id[0] == "d"] == before[6:]
    (disk / "filler").unlink()
    with Store.open(path) as store:
        with store.writer() as writer:
            put(writer, document("after", 200))
            writer.collect_garbage()
        assert store.verify() == []
        assert store.search(text_vector(document("after", 200).text[:10]), top_k=1)[0].doc_id == "after"


def test_everything_that_writes_says_that_the_disk_is_full(disk):
    path = disk / "s"
    make_store(path, document("a", 200)).close()
    fill(disk)
    with pytest.raises(StoreFull):
        Store.create(disk / "other", manifest()).close()
    with Store.open(path) as store:
        Layout(path).reserve.unlink(missing_ok=True)
        fill(disk)
        for change in (
            lambda: store.adapters.add({"lloco.json": bytes(9000)}, "", "letters"),
            lambda: store.backup(disk / "copy"),
        ):
            with pytest.raises(StoreFull, match="free space"):
                change()
        assert store.adapters.rows() == [] and not (disk / "copy").exists()
    (disk / "filler").unlink()
    assert Store.verify_path(path) == []
    Store.create(disk / "other", manifest()).close()
    assert Store.verify_path(disk / "other") == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_catalogue_that_cannot_be_made_leaves_a_folder_that_a_store_can_be_made_in(tmp_path, monkeypatch, number):
    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic, "_write", full)
    with pytest.raises(StoreFull):
        Store.create(tmp_path / "s", manifest())
    monkeypatch.undo()
    Store.create(tmp_path / "s", manifest()).close()
    assert Store.verify_path(tmp_path / "s") == []


def test_the_reserve_is_kept_given_up_once_and_made_again(tmp_path):
    store = make_store(tmp_path / "s", document("a"))
    layout = Layout(tmp_path / "s")
    with closing(store):
        assert layout.reserve.stat().st_blocks * 512 >= 2**20
        assert make_room(layout) and not layout.reserve.exists() and not make_room(layout)
        keep_reserve(layout)
        assert layout.reserve.exists()
        assert store.search(text_vector("x"), top_k=1) and [problem.kind for problem in store.verify()] == ["index"]
        with store.writer():
            pass
        assert store.verify() == []
