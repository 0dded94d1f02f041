"""A prefix's ragged slots for the compiled kernel: a float32 decoder on the CPU, without gradients.

Nothing is copied: the kernel is told where the segments' tensors are, and reads them there. Keys and values stay in
half precision if the segments are (docs/decisions/0002).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from lloco_engine.decoder.cpu_kernel import call as calls
from lloco_engine.decoder.cpu_kernel import kernel, team
from lloco_engine.decoder.rules import PLAIN, Rules
from lloco_engine.decoder.slots import LayerSlots
from lloco_engine.types import Segment

__all__ = ["Ragged", "Room", "Segments", "Table"]

_ALONE = 4096  # queries times tokens and slots below which a second thread costs more than it saves


@dataclass(frozen=True, eq=False)
class Table:
    """What the kernel is told of rows' segments, for all layers: see `calls.Attend`.

    tensors : (segments, 4). begins : (layers, segments, H + 1). slots : (layers, rows, H). prior : (segments,)
    of_row, many, focus : (rows,). dim : D. held : what there are addresses of
    """

    tensors: np.ndarray
    begins: np.ndarray
    slots: np.ndarray
    of_row: np.ndarray
    many: np.ndarray
    focus: np.ndarray
    prior: np.ndarray
    dim: int
    held: object

    @classmethod
    def of(cls, rows: Sequence[Sequence[Segment]], focus: Sequence[int], prior: Sequence[Sequence[float]]) -> Table:
        """That of segments, as `Segments` takes them."""
        segments = [segment for row in rows for segment in row]
        for segment in segments:
            _check_segment(segment, segments[0])
        held = [_given(segment) for segment in segments]
        tensors = [[*(one.data_ptr() for one in given), given[0].dtype == torch.float16] for given in held]
        lengths = np.array([one.lengths.numpy() for one in segments], np.int64)
        ends = lengths.reshape(len(segments), -1).cumsum(1).reshape(lengths.shape)
        begins = np.concatenate((ends[:, :, :1] - lengths[:, :, :1], ends), 2)
        many = [len(row) for row in rows]
        of_row = np.cumsum(many, dtype=np.int64) - many
        chosen = [most if most < len(row) else 0 for most, row in zip(focus, rows, strict=True)]
        priors = [given or [0.0] * len(row) for given, row in zip(prior, rows, strict=True)]
        return cls(
            np.array(tensors, np.int64),
            np.ascontiguousarray(begins.swapaxes(0, 1)),
            np.stack([of_row.sum(0) for of_row in np.split(lengths, of_row[1:])], 1),
            of_row,
            np.array(many, np.int64),
            np.array(chosen, np.int64),
            np.array([one for given in priors for one in given], np.float32),
            segments[0].keys.shape[1],
            held,
        )

    @cached_property
    def most(self) -> int:
        """Slots of a layer in all rows together, of that which has most."""
        return int(self.slots.sum((1, 2)).max())

    @property
    def heads(self) -> int:
        """KV heads."""
        return int(self.slots.shape[2])

    def tell(self, call: calls.Attend) -> None:
        """Tell a call all but the layer."""
        call.tensors, call.of_row, call.segments = self.tensors.ctypes.data, self.of_row.ctypes.data, len(self.tensors)
        call.many, call.most, call.shared = self.many.ctypes.data, int(self.many.max()), len(self.many) == 1
        call.focused, call.focus = bool(self.focus.any()), self.focus.ctypes.data
        call.prior = self.prior.ctypes.data

    def layer(self, index: int) -> tuple[int, int]:
        """`calls.Attend.begins` and ``slots`` of a layer."""
        return _at(self.begins, index), _at(self.slots, index)


def _at(array: np.ndarray, index: int) -> int:
    return int(array.ctypes.data + index * array.strides[0])


def _given(segment: Segment) -> list[torch.Tensor]:
    """A segment's tensors as the kernel reads them."""
    half = segment.keys.dtype == segment.values.dtype == torch.float16
    dtype = torch.float16 if half else torch.float32
    return [one.contiguous() for one in (segment.keys.to(dtype), segment.values.to(dtype), segment.bias.float())]


class Room:
    """A call of the kernel for queries of one shape, with the room that its threads have for it.

    Args:
        call: has been told of a table.
        q: (rows, H * group, tokens, D) float32.
        heads: KV heads.
        slots: of all rows together in a layer.
        live: live tokens of all rows together that there is room for.
        scale: factor of the logits.
        threads: at most.

    ``live`` and ``slots`` are how many there is room for.
    """

    def __init__(
        self, call: calls.Attend, q: torch.Tensor, heads: int, slots: int, live: int, scale: float, threads: int
    ) -> None:
        call.rows, query_heads, call.tokens, call.dim = q.shape
        call.heads, call.group, call.scale = heads, query_heads // heads, scale
        call.q_row, call.q_head, call.q_token, _ = q.stride()
        call.each, call.filled, call.few, call.step = calls.parts(call.group * call.tokens, call.dim)
        parts = -(-call.group * call.tokens // call.each)
        call.places = parts * call.rows * call.heads
        self.call, self.result = call, (call.rows, call.tokens, query_heads * call.dim)
        self.live, self.slots, self._heads, self._threads = sys.maxsize, slots, heads, threads
        self._held: list[object] = [calls.furnish(call, threads)]
        if call.focused:  # room for logits
            self.live = live + live // 4  # more, since the live tokens become more
            line = parts * (heads * self.live + slots)
            self._held.append(largest := torch.empty(threads, call.places, call.most, call.filled))
            self._held.append(kept := torch.empty(calls.kept(line, call.places, threads, call.step)))
            call.largest, call.kept = largest.data_ptr(), kept.data_ptr()

    def run(self, task: team.Task, q: torch.Tensor, layer: tuple[int, int], lives: int, live: int) -> torch.Tensor:
        """What is read, (rows, tokens, H * group * D), of a layer, by `calls.Attend.lives`: ``live`` tokens in all."""
        call, out = self.call, torch.empty(self.result)
        call.q, call.out, call.lives = q.data_ptr(), out.data_ptr(), lives
        call.begins, call.slots = layer
        much = call.group * call.tokens * (self._heads * live + self.slots) >= _ALONE
        task(call, self._threads if much else 1)
        return out


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
        self.table = Table.of(rows, focus, prior)
        self._threads = team.threads()
        self._run = kernel.prepare()
        # by the shapes of what is asked: steps alternate between few
        self._rooms: dict[tuple[object, ...], tuple[Room, Any]] = {}

    def layer(self, index: int) -> Ragged:
        """The slots of one layer."""
        return Ragged(self, self.table.layer(index))

    def attend(
        self,
        layer: tuple[int, int],
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """`LayerSlots.attend` of the layer that `Table.layer` says."""
        live, shapes = keys.shape[2], (q.shape, q.stride(), _form(keys), _form(values), q.dtype, scale)
        if values.shape[2] != live:
            raise ValueError(f"live values must be of as many tokens as keys, {live}, not of {values.shape[2]}")
        rows = len(q)
        found = self._rooms.get(shapes)
        if found is None or rows * live > found[0].live:
            found = self._rooms[shapes] = self._prepare(q, keys, values, scale)
        room, lives = found
        at, at_values, beside = keys.data_ptr(), values.data_ptr(), 4 * keys.stride(0)
        for row in range(rows):
            lives[4 * row] = at + row * beside
            lives[4 * row + 1] = at_values + row * beside
            lives[4 * row + 3] = live
        call = room.call
        call.mask = 0
        if mask is not None:
            if mask.shape[0] not in (1, rows) or mask.shape[1:] != (1, call.tokens, live) or mask.dtype != q.dtype:
                raise ValueError(
                    f"a mask must be (1 or {rows}, 1, {call.tokens}, {live}) in float32, not "
                    f"{tuple(mask.shape)} in {mask.dtype}"
                )
            mask = mask.contiguous()
            call.mask, call.mask_row = mask.data_ptr(), 0 if len(mask) == 1 else call.tokens * live
        return room.run(self._run, q, layer, ctypes.addressof(lives), rows * live)

    def _prepare(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> tuple[Room, Any]:
        """Room for a call, and for its `calls.Attend.lives`."""
        table, rows = self.table, len(q)
        _check_tokens(q, keys, values, len(table.many), (table.heads, table.dim))
        call, lives = calls.Attend(), (ctypes.c_int64 * (4 * rows))()
        table.tell(call)
        for row in range(rows):
            lives[4 * row + 2] = keys.stride(1)
        slots = table.most * (rows if call.shared else 1)
        return Room(call, q, table.heads, slots, rows * keys.shape[2], scale, self._threads), lives


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
        layer: as `Table.layer` says it.
    """

    def __init__(self, segments: Segments, layer: tuple[int, int]) -> None:
        self._segments, self._layer = segments, layer

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        rules: Rules = PLAIN,
        at: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `LayerSlots.attend`."""
        if not rules.plain:
            raise ValueError("a layer that the kernel reads must have no softcap, sinks or window; read it by `padded`")
        return self._segments.attend(self._layer, q, keys, values, mask, scale)
