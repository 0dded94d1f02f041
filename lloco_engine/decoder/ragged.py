"""A prefix's ragged slots for the compiled kernel: a float32 decoder on the CPU, without gradients.

Nothing is copied: the kernel is told where the segments' tensors are, which may be files mapped into memory, and reads
them there. Keys and values stay in half precision if the segments are (docs/decisions/0002).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lloco_engine.decoder import kernel, team
from lloco_engine.decoder.slots import LayerSlots
from lloco_engine.types import Segment

__all__ = ["Ragged", "Segments", "serves"]

_ALONE = 4096  # queries times tokens and slots below which a second thread costs more than it saves


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel serves a decoder on this machine."""
    return device.type == "cpu" and dtype == torch.float32 and kernel.runs()


class Segments:
    """The segments of a memory, as the kernel is told of them.

    Args:
        rows: the segments of each row, on the CPU.
        focus: of each row, how many of them a query reads (0: all).
        prior: of each row, one number a segment, or none: see `lloco_engine.decoder.focus`.
    """

    def __init__(
        self, rows: Sequence[Sequence[Segment]], focus: Sequence[int], prior: Sequence[Sequence[float]]
    ) -> None:
        segments = [segment for row in rows for segment in row]
        half = all(t.dtype == torch.float16 for one in segments for t in (one.keys, one.values))
        dtype = torch.float16 if half else torch.float32
        given = [(one.keys.to(dtype), one.values.to(dtype), one.bias.float()) for one in segments]
        # held, since the kernel is given addresses
        self._held = [[tensor.contiguous() for tensor in one] for one in given]
        self._tensors = np.array([[tensor.data_ptr() for tensor in one] for one in self._held], np.int64)
        lengths = np.array([one.lengths.numpy() for one in segments], np.int64)
        ends = lengths.reshape(len(segments), -1).cumsum(1).reshape(lengths.shape)
        begins = np.concatenate((ends[:, :, :1] - lengths[:, :, :1], ends), 2)
        self._begins = np.ascontiguousarray(begins.swapaxes(0, 1))  # (layers, segments, heads + 1)
        many = [len(row) for row in rows]
        self._many = np.array(many, np.int64)
        self._of_row = np.cumsum(many, dtype=np.int64) - many
        self._focus = np.array(
            [most if most < len(row) else 0 for most, row in zip(focus, rows, strict=True)], np.int64
        )
        priors = [given or [0.0] * len(row) for given, row in zip(prior, rows, strict=True)]
        self._prior = np.array([one for given in priors for one in given], np.float32)
        of_rows = np.split(lengths, self._of_row[1:])
        self._slots = np.stack([of_row.sum(0) for of_row in of_rows], 1)  # (layers, rows, heads)
        self._shapes: tuple[object, ...] = ()  # of what was last asked
        self._kept = torch.empty(0)  # room for logits
        self._call = kernel.Attend(
            tensors=self._tensors.ctypes.data,
            of_row=self._of_row.ctypes.data,
            segments=len(segments),
            shared=len(rows) == 1,
            half=half,
            focused=bool(self._focus.any()),
            many=self._many.ctypes.data,
            most=max(many),
            focus=self._focus.ctypes.data,
            prior=self._prior.ctypes.data,
        )

    def layer(self, index: int) -> tuple[int, int, int]:
        """Where a layer's `kernel.Attend.begins` and ``slots`` are, and how many slots there are."""
        slots = self._slots[index]
        return self._begins[index].ctypes.data, slots.ctypes.data, int(slots.sum())

    def call(self, q: torch.Tensor, keys: torch.Tensor, scale: float, threads: int) -> kernel.Attend:
        """A call that says all but the layer, how many live tokens there are, and where they, mask and result are.

        The next one takes its place.
        """
        shapes = q.shape, q.stride(), keys.shape[1], keys.stride(), scale, threads
        if shapes != self._shapes:  # else an earlier layer's or step's serves
            self._shapes, call = shapes, self._call
            call.rows, query_heads, call.tokens, call.dim = q.shape
            call.heads, call.group, call.scale = keys.shape[1], query_heads // keys.shape[1], scale
            call.q_row, call.q_head, call.q_token, _ = q.stride()
            call.live_row, call.live_head, *_ = keys.stride()
            call.each, call.filled, call.few, call.step = kernel.parts(call.group * call.tokens, call.dim)
            call.places = -(-call.group * call.tokens // call.each) * call.rows * call.heads
            self._desks = kernel.furnish(call, threads)
            self._largest = torch.empty(threads if call.focused else 0, call.places, call.most, call.filled)
            call.largest = self._largest.data_ptr()
        self._call.q = q.data_ptr()
        return self._call

    def keep(self, live: int, slots: int, threads: int) -> None:
        """Have room for the logits of so many live tokens and slots, where queries choose among segments."""
        call = self._call
        line = call.places * live + call.places // (call.rows * call.heads) * slots
        numbers = kernel.kept(line, call.places, threads, call.step)
        if call.focused and self._kept.numel() < numbers:
            self._kept = torch.empty(numbers + numbers // 4)  # more, since the live tokens become more
            call.kept = self._kept.data_ptr()


class Ragged(LayerSlots):
    """One layer's slots.

    Args:
        segments: what the layers share.
        layer: the layer's number.
    """

    def __init__(self, segments: Segments, layer: int) -> None:
        self._segments = segments
        self._begins, self._slots, self._total = segments.layer(layer)

    def attend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """See `LayerSlots.attend`."""
        rows, query_heads, tokens, dim = q.shape
        heads, live = keys.shape[1:3]
        threads = team.threads()
        call = self._segments.call(q, keys, scale, threads)
        call.begins, call.slots, call.live = self._begins, self._slots, live
        self._segments.keep(live, self._total * (rows if call.shared else 1), threads)
        call.live_keys, call.live_values = keys.data_ptr(), values.data_ptr()
        call.mask, call.mask_row = 0, 0
        if mask is not None:
            mask = mask.contiguous()
            call.mask, call.mask_row = mask.data_ptr(), 0 if len(mask) == 1 else tokens * live
        out = torch.empty(rows, tokens, query_heads * dim)
        call.out = out.data_ptr()
        much = query_heads // heads * tokens * (rows * heads * live + self._total) >= _ALONE
        kernel.attend(call, threads if much else 1)
        return out
