"""A disk with little room or none: every change is done, or refused as `StoreFull` and not done at all."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest
from adapter_cases import adapter
from changes import Expected, Site, actual, drawn

from lloco_engine.errors import StoreFull
from lloco_engine.store import Store

SIZE = 8 * 2**20
REMOVALS = ("delete", "remove")


@pytest.fixture
def disk(tmp_path, report):
    """A small file system of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)]
    try:
        subprocess.run(mounted, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        report("changes on a disk with little room", 0, 0, "this user may not mount a file system")
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(place: Path, left: int) -> None:
    """Leave so many bytes, in blocks of the file system."""
    filler = place / "filler"
    filler.unlink(missing_ok=True)
    size = max(0, shutil.disk_usage(place).free - left)
    with filler.open("wb") as file:
        file.write(bytes(size // 4096 * 4096))


def test_every_change_on_a_disk_with_little_room_is_done_or_refused(request, report, tmp_path, disk, tiny_loaded):
    count, seed = request.config.getoption("--full"), request.config.getoption("--seed")
    rng = random.Random(seed)
    made = adapter(tmp_path / "adapter", tiny_loaded)
    site = Site(disk / "store", tmp_path / "files", tmp_path / "copy", tiny_loaded, made)
    site.make()
    expected, tried, refused, removed = Expected(), 0, 0, 0
    while tried < count:
        change = drawn(rng, expected)
        fill(disk, rng.choice((0, 0, rng.randrange(65_536), rng.randrange(2**20))))
        try:
            site.take(change)
            expected.take(change)
        except StoreFull:
            refused += 1
            assert change[0] not in REMOVALS, "deleting makes room"
        removed += change[0] in REMOVALS
        tried += 1
        (disk / "filler").unlink()
        with Store.open(site.store) as opened:
            state = actual(opened)
            with opened.writer() as writer:
                writer.collect_garbage()
            assert opened.verify() == []
        assert state == expected.state(), change
    note = f"{refused} refused; all of {removed} deletions done"
    report("changes on a disk with little room", tried, 0, note)
    assert count < 30 or 0 < refused < tried
