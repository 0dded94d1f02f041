"""Attention over ragged segments on a GPU, compiled by Triton: `reader` is its only door.

Experimental, and off unless the environment says ``LLOCO_GPU_KERNEL=1``: its tests run in Triton's interpreter on a
CPU, and it has not been run on a GPU. Nothing behind the door is imported before a decoder reads its first segments.
Where it does not serve, `lloco_engine.decoder.padded` reads the same by torch, which the kernel is held to.
"""

from __future__ import annotations

import os
from functools import partial
from importlib.util import find_spec

import torch

from lloco_engine.decoder.cpu_kernel import Reader

__all__ = ["SWITCH", "reader"]

SWITCH = "LLOCO_GPU_KERNEL"


def reader(device: torch.device, dtype: torch.dtype, always: bool = False) -> Reader | None:
    """What makes segments ready for the kernel; None where it was not asked for, or Triton is not there.

    Args:
        device, dtype: of the decoder.
        always: also where the environment does not ask for it.
    """
    asked = always or os.environ.get(SWITCH) == "1"
    if device.type != "cuda" or not asked or find_spec("triton") is None:
        return None
    from lloco_engine.decoder.gpu_kernel.ragged import Segments

    return partial(Segments, device=device, dtype=dtype)
