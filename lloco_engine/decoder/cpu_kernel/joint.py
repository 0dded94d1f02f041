"""Attention of several streams' next tokens by one call of the kernel: each with its own live tokens and segments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lloco_engine.decoder.attention import Cache
from lloco_engine.decoder.cpu_kernel import call as calls
from lloco_engine.decoder.cpu_kernel import kernel, team
from lloco_engine.decoder.cpu_kernel.ragged import Room, Segments, Table
from lloco_engine.decoder.slots import SegmentSlots

__all__ = ["Joint"]


class Joint:
    """Reads for one pass after another. Room is kept from pass to pass; what streams hold is not.

    Args:
        heads, dim: KV heads and their size.
    """

    def __init__(self, heads: int, dim: int) -> None:
        self._heads, self._dim = heads, dim
        self._run, self._threads = kernel.prepare(), team.threads()
        self._room: Room | None = None
        self._shape: tuple[object, ...] = ()
        self._table: Table | None = None
        self._lives = np.empty((0, 0, 4), np.int64)
        self._live = 0

    def begin(self, caches: Sequence[Cache], segments: Sequence[SegmentSlots | None], tokens: Sequence[int]) -> None:
        """A pass of so many tokens of each stream begins: a row a token, which reads all up to itself.

        Args:
            caches: of one row each, whose lengths are those before the pass.
            segments: of each stream, of one row, or None.
            tokens: of each stream.
        """
        many = np.array(tokens)
        number = np.arange(many.sum()) - np.repeat(many.cumsum() - many, many)  # of each row in its stream
        lives = np.repeat(np.stack([cache.addresses for cache in caches], 1), many, axis=1)
        lives[:, :, 3] = np.repeat([cache.length for cache in caches], many) + number + 1
        self._lives, self._live = lives, int(lives[0, :, 3].sum())
        tables = [one.table if isinstance(one, Segments) else None for one in segments]
        self._table = _joined(tables, many, (len(lives), self._heads, self._dim))
        if self._room is not None:
            self._table.tell(self._room.call)

    def end(self) -> None:
        """The pass is over, or has failed."""
        self._table = None
        self._lives = self._lives[:0]

    def attend(
        self, layer: int, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """What each row reads, (rows, 1, H * group * D): its stream's segments, the tokens before it, and itself.

        Args:
            layer: its number.
            q: (rows, H * group, 1, D). keys, values: (rows, H, 1, D), which the caches hold afterwards.
            scale: factor of the logits.
        """
        table = self._table
        assert table is not None
        self._check(q, keys, values)
        shape = (q.shape, q.stride(), scale, int(table.many.max()), bool(table.focus.any()))
        room = self._room
        if room is None or shape != self._shape or self._live > room.live or table.most > room.slots:
            call = calls.Attend()
            table.tell(call)
            room = Room(call, q, self._heads, table.most, self._live, scale, self._threads)
            self._room, self._shape = room, shape
        call = room.call
        call.new_keys, call.new_values = keys.data_ptr(), values.data_ptr()
        call.new_keys_row, call.new_keys_head = keys.stride()[:2]
        call.new_values_row, call.new_values_head = values.stride()[:2]
        lives = self._lives.ctypes.data + layer * self._lives.strides[0]
        return room.run(self._run, q, table.layer(layer), lives, self._live)

    def _check(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Raise unless new tokens lie as the kernel, which is given addresses, takes them."""
        rows, heads = self._lives.shape[1], self._heads
        if keys.shape != (rows, heads, 1, self._dim) or values.shape != keys.shape:
            raise ValueError(
                f"new keys and values must be ({rows}, {heads}, 1, {self._dim}), not {tuple(keys.shape)} and "
                f"{tuple(values.shape)}"
            )
        if q.shape[0] != rows or q.shape[2:] != keys.shape[2:] or q.shape[1] % heads or not q.shape[1]:
            raise ValueError(f"queries must be ({rows}, a multiple of {heads}, 1, {self._dim}), not {tuple(q.shape)}")
        for tensor in (q, keys, values):
            if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or tensor.stride(3) != 1:
                raise ValueError(
                    f"queries and new tokens must be float32 on the CPU, a token's numbers side by side, not "
                    f"{tensor.dtype} on {tensor.device} by strides {tensor.stride()}"
                )


def _joined(tables: Sequence[Table | None], copies: np.ndarray, shape: tuple[int, int, int]) -> Table:
    """The table of streams beside each other, each of one row that is there so many times."""
    layers, heads, dim = shape
    none = Table(
        np.empty((0, 4), np.int64),
        np.empty((layers, 0, heads + 1), np.int64),
        np.zeros((layers, 1, heads), np.int64),
        np.zeros(1, np.int64),
        np.zeros(1, np.int64),
        np.zeros(1, np.int64),
        np.empty(0, np.float32),
        dim,
        None,
    )
    all_ = [none if one is None else one for one in tables]
    many = np.concatenate([one.many for one in all_])
    return Table(
        np.concatenate([one.tensors for one in all_]),
        np.concatenate([one.begins for one in all_], axis=1),
        np.repeat(np.concatenate([one.slots for one in all_], axis=1), copies, axis=1),
        np.repeat(many.cumsum() - many, copies),
        np.repeat(many, copies),
        np.repeat(np.concatenate([one.focus for one in all_]), copies),
        np.concatenate([one.prior for one in all_]),
        dim,
        all_,
    )
