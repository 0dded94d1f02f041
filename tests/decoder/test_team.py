"""Compiled functions on torch's threads, and on one where there is no OpenMP that takes them."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time

import pytest

from lloco_engine.decoder import cpu_kernel
from lloco_engine.decoder.cpu_kernel import call, kernel, team

needs_kernel = pytest.mark.skipif(not cpu_kernel.runs(), reason="the processor does not convert half precision")
ALONE = """
import ctypes, sys
real = ctypes.CDLL
def without(name, *rest, **more):
    if "gomp" in str(name):
        raise OSError("no such library")
    return real(name, *rest, **more)
ctypes.CDLL = without
import pytest
from lloco_engine.decoder.cpu_kernel import team
assert team._openmp() is None and team.threads() == 1
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", sys.argv[1], "-k", "any_size"]))
"""


@needs_kernel
def test_without_openmp_one_thread_does_all_parts(request):
    file = request.path.with_name("test_memory.py")
    done = subprocess.run([sys.executable, "-c", ALONE, str(file)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def test_a_folder_that_cannot_be_written_keeps_nothing(monkeypatch):
    def refused(**options):
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(team, "njit", refused)
    assert team.can_keep.__wrapped__() is False


def test_fields_of_calls_are_words_of_eight_bytes():
    for record in (call.Attend, call.Desk):
        assert ctypes.sizeof(record) == 8 * len(record._fields_)


def test_what_is_kept_is_made_anew_when_what_it_is_made_of_has_changed(tmp_path):
    file, other = tmp_path / "kernel.py", tmp_path / "vectors.py"
    for path, changed in ((file, 1000), (other, 900)):
        path.touch()
        os.utime(path, (changed, changed))
    team.renew(str(file), str(other))
    assert file.stat().st_mtime == 1000
    os.utime(other, (1100, 1100))
    team.renew(str(file), str(other))
    assert file.stat().st_mtime >= 1100


def test_compiling_is_said_to_take_a_while(monkeypatch, caplog):
    monkeypatch.setattr(kernel, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(team, "Task", lambda function: time.sleep(0.5))
    kernel.prepare.__wrapped__()
    assert "compiling attention" in caplog.text
