"""Compiled functions on torch's threads, and on one where there is no OpenMP that takes them."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from lloco_engine.decoder import kernel, team

needs_kernel = pytest.mark.skipif(not kernel.runs(), reason="the processor does not convert half precision")
ALONE = """
import ctypes, sys
real = ctypes.CDLL
def without(name, *rest, **more):
    if "gomp" in str(name):
        raise OSError("no such library")
    return real(name, *rest, **more)
ctypes.CDLL = without
import pytest
from lloco_engine.decoder import team
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
    assert ctypes.sizeof(kernel.Attend) == 8 * len(kernel.Attend._fields_)
