"""Compiled functions on torch's threads, and on one where there is no OpenMP that takes them."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

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


@needs_kernel
def test_every_part_is_done_by_any_number_of_threads():
    segments, heads, dim = 1, 1, kernel.WIDTH
    slots = 5 * kernel.WIDTH
    given, bias = torch.randn(slots, dim), torch.randn(slots)
    addresses = torch.tensor([[given.data_ptr(), given.data_ptr(), bias.data_ptr()]])
    begins, first, number = torch.tensor([[0, slots]]), torch.tensor([0]), torch.tensor([5])
    for threads in (1, 2, 3, 40):
        keys, values = (torch.full((5, 1, kernel.WIDTH, kernel.WIDTH), torch.nan) for _ in range(2))
        biases = torch.full((5, kernel.WIDTH), torch.nan)
        call = kernel.Place(segments=segments, heads=heads, dim=dim, blocks=5)
        parts = {"tensors": addresses, "begins": begins, "first": first, "number": number}
        for name, part in (parts | {"keys": keys, "values": values, "bias": biases}).items():
            setattr(call, name, part.data_ptr())
        kernel.place(call, False, threads)
        assert torch.equal(values.view(slots, dim), given)
        assert torch.equal(keys[:, 0].transpose(1, 2).reshape(slots, dim), given)
        assert torch.equal(biases.view(slots), bias)


def test_a_folder_that_cannot_be_written_keeps_nothing(monkeypatch):
    def refused(**options):
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(team, "njit", refused)
    assert team.can_keep.__wrapped__() is False


def test_fields_of_calls_are_words_of_eight_bytes():
    for call in (kernel.Attend, kernel.Place):
        assert ctypes.sizeof(call) == 8 * len(call._fields_)
