"""Attention over ragged segments for a float32 decoder on the CPU, compiled by numba: `reader` is its only door.

Nothing behind the door is imported or compiled before a decoder on the CPU reads its first segments. Where the kernel
does not serve, `lloco_engine.decoder.padded` reads the same by torch, which is what the kernel is held to.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch

from lloco_engine import processor
from lloco_engine.decoder.slots import SegmentSlots
from lloco_engine.types import Segment

if TYPE_CHECKING:
    from lloco_engine.decoder.cpu_kernel.joint import Joint

__all__ = ["Reader", "joint_reader", "reader", "warm"]

# (segments of each row, how many of them a query reads, priors) -> their slots: see `ragged.Segments`
Reader = Callable[[Sequence[Sequence[Segment]], Sequence[int], Sequence[Sequence[float]]], SegmentSlots]


@cache
def runs() -> bool:
    """Whether the processor converts half precision by itself, which the kernel relies on."""
    return platform.machine().lower() in ("arm64", "aarch64") or processor.has("f16c")


def reader(device: torch.device, dtype: torch.dtype) -> Reader | None:
    """What makes segments ready for the kernel; None where the kernel does not serve such a decoder on this machine.

    The first time on a machine it takes some seconds to be compiled, and a fraction of one in every later process.
    """
    if device.type != "cpu" or dtype != torch.float32 or not runs():
        return None
    from lloco_engine.decoder.cpu_kernel.ragged import Segments

    return Segments


def warm(device: torch.device, dtype: torch.dtype) -> None:
    """Have the kernel compiled, where it serves such a decoder on this machine."""
    if reader(device, dtype) is not None:
        from lloco_engine.decoder.cpu_kernel import kernel

        kernel.prepare()


def joint_reader(heads: int, dim: int) -> Joint:
    """What reads for several streams at once, for a decoder that `reader` serves.

    Args:
        heads, dim: KV heads and their size.
    """
    from lloco_engine.decoder.cpu_kernel.joint import Joint

    return Joint(heads, dim)
