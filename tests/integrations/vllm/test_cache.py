"""Files from an object store: fetched once, wholly or not at all, and no more of them than fit."""

from __future__ import annotations

import os
import time

import pytest

from lloco_integrations.vllm.cache import FileCache


@pytest.fixture
def remote(tmp_path):
    """Ten files of 100 bytes, as fsspec reads them."""
    memory = pytest.importorskip("fsspec").filesystem("memory")
    base = f"/bucket-{tmp_path.name}"
    for number in range(10):
        memory.pipe(f"{base}/segments/{number}.bin", bytes([number]) * 100)
    yield memory, base
    memory.rm(base, recursive=True)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_file_is_fetched_once_and_again_where_it_is_damaged(remote, tmp_path):
    memory, base = remote
    cache = FileCache(f"memory:/{base}", tmp_path / "c", 10_000)
    path = cache.path("segments/3.bin")
    assert path == tmp_path / "c" / "segments" / "3.bin" and path.read_bytes() == b"\3" * 100
    memory.pipe(f"{base}/segments/3.bin", b"other")
    assert cache.path("segments/3.bin").read_bytes() == b"\3" * 100
    assert cache.path("segments/3.bin", again=True).read_bytes() == b"other"
    assert names(tmp_path / "c") == ["3.bin"]


def test_the_files_used_longest_ago_make_room_and_those_just_used_stay(remote, tmp_path):
    _, base = remote
    cache = FileCache(f"memory:/{base}", tmp_path / "c", 400)
    for number in range(4):
        past = time.time() - 1000 + number
        os.utime(cache.path(f"segments/{number}.bin"), (past, past))
    cache.path("segments/0.bin")  # is used again
    cache.path("segments/4.bin")
    assert names(tmp_path / "c") == ["0.bin", "3.bin", "4.bin"]
    for number in range(5, 10):
        cache.path(f"segments/{number}.bin")
    assert len(names(tmp_path / "c")) == 7, "what was just used may be about to be opened"
    assert FileCache(f"memory:/{base}", tmp_path / "c", 400)._held == 700


def test_what_cannot_be_fetched_leaves_nothing_behind(remote, tmp_path):
    _, base = remote
    cache = FileCache(f"memory:/{base}", tmp_path / "c", 400)
    with pytest.raises(OSError):
        cache.path("segments/99.bin")
    for name in ("../1.bin", "/etc/passwd", "segments/../../1.bin", ""):
        with pytest.raises(ValueError, match="must lead into the folder"):
            cache.path(name)
    assert names(tmp_path / "c") == []
    with pytest.raises(ValueError, match="above 0 bytes"):
        FileCache(f"memory:/{base}", tmp_path / "c", 0)
