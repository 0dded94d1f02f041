"""A prefix's ragged slots for the compiled kernel: a float32 decoder on the CPU, without gradients.

Nothing is copied: the kernel is told where the segments' tensors are, and reads them there. Keys and values stay in
half precision if the segments are (docs/decisions/0002).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from lloco_engine.decoder.cpu_kernel import call as calls
from lloco_engine.decoder.cpu_kernel import kernel, team
from lloco_engine.decoder.slots import LayerSlots
from lloco_engine.types import Segment

__all__ = ["Ragged", "Segments"]

_ALONE = 4096  # queries times tokens and slots below which a second thread costs more than it saves


class _Room(NamedTuple):
    """A call of the kernel for what is asked in one shape.

    ``result`` is the shape of what it makes; there is room for at most ``live`` live tokens. What the call is given the
    addresses of is ``held``.
    """

    call: calls.Attend
    result: tuple[int, int, int]
    live: int
    held: list[object]


class Segments:
    """The segments of a memory, as the kernel is told of them.

    Args:
        rows: the segments of each row, on the CPU.
        focus: of each row, how many of them a query reads (0: all).
        prior: of each row, one number a segment, or none: see `lloco_engine.decoder.slots`.
    """

    def __init__(
        self, rows: Sequence[Sequence[Segment]], focus: Sequence[int], prior: Sequence[Sequence[float]]
    ) -> None:
        segments = [segment for row in rows for segment in row]
        for segment in segments:
            _check_segment(segment, segments[0])
        self._rows, self._form = len(rows), (segments[0].lengths.shape[1], segments[0].keys.shape[1])
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
        self._most = int(self._slots.sum((1, 2)).max())  # slots of a layer
        self._threads = team.threads()
        self._run = kernel.prepare()
        self._rooms: dict[tuple[object, ...], _Room] = {}  # by the shapes of what is asked: steps alternate between few
        self._facts: dict[str, int] = {
            "tensors": self._tensors.ctypes.data,
            "of_row": self._of_row.ctypes.data,
            "segments": len(segments),
            "shared": len(rows) == 1,
            "half": half,
            "focused": bool(self._focus.any()),
            "many": self._many.ctypes.data,
            "most": max(many),
            "focus": self._focus.ctypes.data,
            "prior": self._prior.ctypes.data,
        }

    def layer(self, index: int) -> Ragged:
        """The slots of one layer."""
        return Ragged(self, self._begins[index].ctypes.data, self._slots[index].ctypes.data)

    def attend(
        self,
        begins: int,
        slots: int,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """`LayerSlots.attend` of the layer whose `calls.Attend.begins` and ``slots`` are there."""
        live, shapes = keys.shape[2], (q.shape, q.stride(), _form(keys), _form(values), q.dtype, scale)
        if values.shape[2] != live:
            raise ValueError(f"live values must be of as many tokens as keys, {live}, not of {values.shape[2]}")
        room = self._rooms.get(shapes)
        if room is None or live > room.live:
            room = self._rooms[shapes] = self._prepare(q, keys, values, scale)
        call, out = room.call, torch.empty(room.result)
        call.q, call.out, call.begins, call.slots = q.data_ptr(), out.data_ptr(), begins, slots
        call.live_keys, call.live_values, call.live = keys.data_ptr(), values.data_ptr(), live
        call.mask = 0
        if mask is not None:
            if mask.shape[0] not in (1, call.rows) or mask.shape[1:] != (1, call.tokens, live) or mask.dtype != q.dtype:
                raise ValueError(
                    f"a mask must be (1 or {call.rows}, 1, {call.tokens}, {live}) in float32, not "
                    f"{tuple(mask.shape)} in {mask.dtype}"
                )
            mask = mask.contiguous()
            call.mask, call.mask_row = mask.data_ptr(), 0 if len(mask) == 1 else call.tokens * live
        much = call.group * call.tokens * (call.rows * call.heads * live + self._most) >= _ALONE
        self._run(call, self._threads if much else 1)
        return out

    def _prepare(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> _Room:
        """A call that says all but the layer, how many live tokens there are, and where they, mask and result are."""
        _check_tokens(q, keys, values, self._rows, self._form)
        call, (heads, live) = calls.Attend(**self._facts), keys.shape[1:3]
        call.rows, query_heads, call.tokens, call.dim = q.shape
        call.heads, call.group, call.scale = heads, query_heads // heads, scale
        call.q_row, call.q_head, call.q_token, _ = q.stride()
        call.live_row, call.live_head, *_ = keys.stride()
        call.each, call.filled, call.few, call.step = calls.parts(call.group * call.tokens, call.dim)
        parts = -(-call.group * call.tokens // call.each)
        call.places = parts * call.rows * call.heads
        held = [calls.furnish(call, self._threads)]
        if call.focused:  # room for logits
            live += live // 4  # more, since the live tokens become more
            line = call.places * live + parts * self._most * (call.rows if call.shared else 1)
            held.append(largest := torch.empty(self._threads, call.places, call.most, call.filled))
            held.append(kept := torch.empty(calls.kept(line, call.places, self._threads, call.step)))
            call.largest, call.kept = largest.data_ptr(), kept.data_ptr()
        else:
            live = sys.maxsize
        return _Room(call, (call.rows, call.tokens, query_heads * call.dim), live, held)


def _check_segment(segment: Segment, first: Segment) -> None:
    """Raise unless the kernel, which is given addresses, finds at them what it will look for."""
    slots, dim, lengths = len(segment.keys), first.keys.shape[1], segment.lengths
    shapes = segment.keys.shape, segment.values.shape, segment.bias.shape
    if shapes != ((slots, dim), (slots, dim), (slots,)):
        raise ValueError(
            f"a segment's keys, values and bias must be (N, {dim}), (N, {dim}) and (N,), not "
            f"{', '.join(str(tuple(shape)) for shape in shapes)}"
        )
    if lengths.shape != first.lengths.shape or lengths.dtype != torch.int64 or bool((lengths < 0).any()):
        raise ValueError(
            f"a segment's lengths must be {tuple(first.lengths.shape)} int64 of at least 0, not "
            f"{tuple(lengths.shape)} {lengths.dtype}"
        )
    if int(lengths.sum()) != slots:
        raise ValueError(f"a segment's lengths must add up to its {slots} slots, not to {int(lengths.sum())}")
    for tensor in (segment.keys, segment.values, segment.bias, lengths):
        if tensor.device.type != "cpu":
            raise ValueError(f"a segment that the kernel reads must be on the CPU, not on {tensor.device}")


def _form(tensor: torch.Tensor) -> tuple[object, ...]:
    """All that must stay as it is for a call to be made again with other live tokens: not how many there are."""
    rows, heads, _, dim = tensor.shape
    return rows, heads, dim, tensor.stride(), tensor.dtype


def _check_tokens(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: int, form: tuple[int, int]) -> None:
    """Raise unless queries and live tokens lie as the kernel takes them: see `calls.Attend`."""
    heads, dim = form
    if q.shape[0] != rows and rows != 1:
        raise ValueError(f"queries must be of the memory's {rows} rows, not of {q.shape[0]}")
    if q.shape[1] % heads or q.shape[3] != dim or q.shape[1] < heads:
        raise ValueError(f"queries must be (B, a multiple of {heads}, T, {dim}), not {tuple(q.shape)}")
    if _form(keys) != _form(values) or keys.shape[:2] != (q.shape[0], heads) or keys.shape[3] != dim:
        raise ValueError(
            f"live keys and values must both be ({q.shape[0]}, {heads}, S, {dim}) and lie alike, not "
            f"{tuple(keys.shape)} by strides {keys.stride()} and {tuple(values.shape)} by {values.stride()}"
        )
    if q.stride(3) != 1 or keys.stride()[2:] != (dim, 1):
        raise ValueError(
            f"a token's numbers must lie side by side, and a head's live tokens one after another: strides are "
            f"{q.stride()} of queries and {keys.stride()} of keys; call contiguous()"
        )
    for tensor in (q, keys, values):
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise ValueError(
                f"queries and live tokens must be float32 on the CPU, not {tensor.dtype} on {tensor.device}"
            )


class Ragged(LayerSlots):
    """One layer's slots.

    Args:
        segments: what the layers share.
        begins, slots: where the layer's `calls.Attend.begins` and ``slots`` are.
    """

    def __init__(self, segments: Segments, begins: int, slots: int) -> None:
        self._segments = segments
        self._place = begins, slots

    def attend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """See `LayerSlots.attend`."""
        return self._segments.attend(*self._place, q, keys, values, mask, scale)
