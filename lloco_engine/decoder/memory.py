"""Prefixes made ready for attention: the ragged heads of many segments, by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import torch

from lloco_engine.decoder import cpu_kernel, gpu_kernel, padded
from lloco_engine.decoder.slots import LayerSlots, SegmentSlots
from lloco_engine.types import Prefix, Segment

__all__ = ["Memory", "segment_slots"]

Rotate = Callable[[torch.Tensor, int], torch.Tensor]


class Memory:
    """The prefixes of a batch of rows.

    Args:
        prefixes: one prefix per row, None where a row has none; a single entry is shared by all rows.
        device, dtype: of the decoder.
        rotate: turns keys (N, D) by a number of positions, for prefixes placed in sequence.
    """

    def __init__(
        self, prefixes: Sequence[Prefix | None], device: torch.device, dtype: torch.dtype, rotate: Rotate
    ) -> None:
        self._device, self._dtype = device, dtype
        self._rows = [
            [
                _moved(segment, offset, rotate) if offset else segment
                for segment, offset in zip(prefix.compact, prefix.offsets, strict=True)
            ]
            if prefix is not None
            else []
            for prefix in prefixes
        ]
        self._focus = [0 if prefix is None else prefix.focus for prefix in prefixes]
        self._prior = [() if prefix is None else prefix.prior for prefix in prefixes]
        self._segments: dict[bool, SegmentSlots] = {}  # by whether the kernel reads them
        self._layers: dict[tuple[int, bool], LayerSlots] = {}

    @classmethod
    def of(
        cls, prefixes: Sequence[Prefix | None], device: torch.device, dtype: torch.dtype, rotate: Rotate
    ) -> Memory | None:
        """The memory of a batch, or None when no row has compact KV. Rows with one prefix object share it."""
        if not any(prefix is not None and prefix.compact for prefix in prefixes):
            return None
        shared = all(prefix is prefixes[0] for prefix in prefixes)
        return cls(prefixes[:1] if shared else prefixes, device, dtype, rotate)

    @cached_property
    def kernel(self) -> cpu_kernel.Reader | None:
        """What reads layers without rules in place of torch; None where nothing does."""
        return cpu_kernel.reader(self._device, self._dtype) or gpu_kernel.reader(self._device, self._dtype)

    def layer(self, index: int, plain: bool = True) -> LayerSlots:
        """The slots of one layer, made ready when first asked for: for the kernel where it serves, or for torch.

        ``plain`` says whether the layer's attention has no rules of its own.
        """
        kernel = self.kernel if plain and not torch.is_grad_enabled() else None
        place = index, kernel is not None
        if place not in self._layers:
            self._layers[place] = self.segments(kernel).layer(index)
        return self._layers[place]

    def segments(self, kernel: cpu_kernel.Reader | None) -> SegmentSlots:
        """All layers' slots, for a kernel or for torch."""
        compiled = kernel is not None
        if compiled not in self._segments:
            told = self._rows, self._focus, self._prior
            self._segments[compiled] = (
                padded.Segments(*told, self._device, self._dtype) if kernel is None else kernel(*told)
            )
        return self._segments[compiled]


def segment_slots(segments: Sequence[Segment], focus: int = 0, prior: Sequence[float] = ()) -> SegmentSlots:
    """What reads some segments in parallel for a float32 decoder on the CPU: the compiled kernel, or torch without it.

    For engines that have a loop of their own; `lloco_engine.decoder.slots.LayerSlots.attend` says how a layer is read.

    Args:
        segments: on the CPU; of a decoder whose heads are shared out, those of one share.
        focus: how many of them a query reads (0: all).
        prior: of each, what is added to its largest logit where they are compared; empty: nothing.
    """
    device, dtype = torch.device("cpu"), torch.float32
    rows, reader = [list(segments)], cpu_kernel.reader(device, dtype)
    if reader is not None:
        return reader(rows, [focus], [prior])
    return padded.Segments(rows, [focus], [prior], device, dtype)


def _moved(segment: Segment, offset: int, rotate: Rotate) -> Segment:
    """The segment so many positions further on."""
    keys = rotate(segment.keys, offset).to(segment.keys.device)
    positions = None if segment.positions is None else segment.positions + offset
    return replace(segment, keys=keys, positions=positions)
