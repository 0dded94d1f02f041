"""What a store reads while it is open: checked when it is read, and private from then on."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing

import pytest
import torch
from store_cases import document, load_all, make_store, segment, segment_file

from lloco_engine.errors import SegmentUnavailable
from lloco_engine.store import Store, segments
from lloco_engine.store.held import HeldSegments
from lloco_engine.store.segments import SegmentFiles


@pytest.fixture
def store(tmp_path):
    with make_store(tmp_path / "s", document("a", 100)) as made:
        yield made


def files(store):
    return [(hit, segment_file(store.path, hit.segment_id)) for hit in store.chunks("a")]


def overwrite_in_place(file, at, flip=0x40):
    with open(file, "r+b") as handle:
        handle.seek(at)
        byte = handle.read(1)[0]
        handle.seek(at)
        handle.write(bytes([byte ^ flip]))


def test_a_byte_that_changes_under_an_open_store_is_noticed_or_cannot_matter(store):
    for hit, file in files(store):
        before = store.load_segment(hit.segment_id)
        status = os.stat(file)
        overwrite_in_place(file, file.stat().st_size - 3)
        assert torch.equal(before.values, segment(hit.text).values.half()), "what is in use is our own"
        with pytest.raises(SegmentUnavailable, match="checksum"):
            store.load_segment(hit.segment_id)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # as if nobody had written
        with pytest.raises(SegmentUnavailable, match="checksum"):
            store.load_segment(hit.segment_id)
        overwrite_in_place(file, file.stat().st_size - 3)
        assert torch.equal(store.load_segment(hit.segment_id).values, before.values)


@pytest.mark.parametrize("size", [0, 1, 8, 100, -1])
def test_a_file_that_is_cut_under_an_open_store_is_an_error_and_no_signal(store, size):
    (hit, file), *_ = files(store)
    kept = store.load_segment(hit.segment_id)
    os.truncate(file, size if size >= 0 else file.stat().st_size - 1)
    assert torch.equal(kept.keys, segment(hit.text).keys.half())
    for verify in (False, True):
        with pytest.raises(SegmentUnavailable, match="damaged"):
            store.load_segment(hit.segment_id, verify=verify)


def test_what_is_no_file_is_refused_and_waited_for_by_nobody(store):
    (one, first), (other, second), *_ = files(store)
    for path in (first, second):
        path.unlink()
    first.mkdir()
    os.mkfifo(second)
    for hit in (one, other):
        with pytest.raises(SegmentUnavailable, match="it is not a file"):
            store.load_segment(hit.segment_id)


def test_a_file_that_gets_shorter_while_it_is_read_is_an_error(store, monkeypatch):
    (hit, file), *_ = files(store)
    read = os.preadv

    def cut_first(handle, buffers, at):
        os.truncate(file, file.stat().st_size - 9)
        return read(handle, buffers, at)

    monkeypatch.setattr(segments.os, "preadv", cut_first)
    with pytest.raises(SegmentUnavailable, match="ends 9 bytes early"):
        store.load_segment(hit.segment_id)


def test_segments_are_read_once_and_held_up_to_a_number_of_bytes(store, monkeypatch):
    reads = []
    read = SegmentFiles.read
    monkeypatch.setattr(SegmentFiles, "read", lambda files, name: reads.append(name) or read(files, name))
    ids = [hit.segment_id for hit in store.chunks("a")]
    first = load_all(store, ids)
    assert [id(one) for one in load_all(store, ids)] == [id(one) for one in first] and len(reads) == len(ids)
    store.forget_segments()
    load_all(store, ids)
    assert len(reads) == 2 * len(ids)

    small = HeldSegments(store._files, most_bytes=1)
    for _ in range(2):
        small.read(ids[0])
    assert len(reads) == 2 * len(ids) + 2 and not small._held and not small._bytes


def test_a_segment_that_is_made_again_is_read_again(store):
    hit = store.chunks("a")[0]
    store.load_segment(hit.segment_id)
    made = segment("another run of the compressor")
    with store.writer() as writer:
        writer.save_segment(hit.segment_id, made)
    assert torch.equal(store.load_segment(hit.segment_id).keys, made.keys.half())
    with Store.open(store.path) as other:
        assert torch.equal(other.load_segment(hit.segment_id).keys, made.keys.half())


def test_writers_share_a_connection_while_the_file_is_the_same(store, tmp_path):
    def connection():
        with store.writer() as writer:
            return writer._catalogue

    first = connection()
    assert connection() is first
    with pytest.raises(ZeroDivisionError), store.writer() as writer:
        assert writer._catalogue is first
        _ = 1 / 0
    second = connection()
    assert second is not first, "one that an error came out of is not kept"
    with closing(sqlite3.connect(store.path / "catalogue.sqlite")) as other:
        other.execute("CREATE TABLE later (x)")
    assert connection() is not second, "its triggers know nothing of a new table"
    third = connection()
    copy = tmp_path / "copy"
    copy.write_bytes((store.path / "catalogue.sqlite").read_bytes())
    os.replace(copy, store.path / "catalogue.sqlite")
    assert connection() is not third, "another file"
