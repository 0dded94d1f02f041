"""A prefix's ragged slots for the compiled kernel: a float32 decoder on the CPU, without gradients.

The slots of one KV head of all segments lie end to end in blocks, and a layer is a run of blocks, each of one head, so
no head is padded to another's length. Keys and values stay in half precision if the segments are: the kernel makes
them float32 where it reads them (docs/decisions/0002).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lloco_engine.decoder import kernel, team
from lloco_engine.decoder.slots import LayerSlots
from lloco_engine.types import Segment

__all__ = ["Layout", "Ragged", "serves"]

_MANY = 16  # queries of a thread that are worth converting a block for
_ALONE = 64  # queries times blocks of a layer below which a second thread costs more than it saves


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel serves a decoder on this machine."""
    return device.type == "cpu" and dtype == torch.float32 and kernel.runs()


class Ragged(LayerSlots):
    """One layer's slots.

    Args:
        keys, values: (blocks, V, WIDTH, WIDTH) float16 or float32, as `kernel` has them.
        bias: (blocks, WIDTH). owner: (blocks,) int64.
        heads: R.
        head_dim: D.
        scratch: calls by how many queries and threads take part, which the layers of a memory share.
    """

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        bias: torch.Tensor,
        owner: torch.Tensor,
        *,
        heads: int,
        head_dim: int,
        scratch: dict[tuple[int, int], _Call],
    ) -> None:
        super().__init__(heads)
        self.keys, self.values, self.bias, self.owner = keys, values, bias, owner
        self._head_dim, self._scratch = head_dim, scratch
        self._half = keys.dtype == torch.float16
        self._places = [part.data_ptr() for part in (keys, values, bias, owner)]

    def _attend(self, q: torch.Tensor, read: torch.Tensor, mass: torch.Tensor, scale: float) -> torch.Tensor:
        q, read, mass = q.contiguous(), read.contiguous(), mass.contiguous()
        out = torch.empty_like(q)
        call = self._call(q, read, mass, out, scale)
        call.tokens = 0
        kernel.attend(call, self._half)
        return out

    def step(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor | None:
        """See `LayerSlots.step`."""
        rows, heads, tokens, _ = keys.shape
        if rows * heads != self.heads:  # rows that share the slots ask side by side
            return None
        q = q.reshape(self.heads, -1, self._head_dim).contiguous()
        read, out, mass = torch.empty_like(q), torch.empty_like(q), q.new_empty(q.shape[:2])
        call = self._call(q, read, mass, out, scale)
        call.tokens, call.live_keys, call.live_values, call.kv_heads = tokens, keys.data_ptr(), values.data_ptr(), heads
        call.row_stride, call.head_stride, *_ = keys.stride()
        kernel.attend(call, self._half)
        return out

    def _call(
        self, q: torch.Tensor, read: torch.Tensor, mass: torch.Tensor, out: torch.Tensor, scale: float
    ) -> kernel.Attend:
        queries = q.shape[1]
        threads = team.threads() if queries * len(self.owner) >= _ALONE else 1
        if (queries, threads) not in self._scratch:
            self._scratch[queries, threads] = _Call(self.heads, queries, self._head_dim, threads)
        call = self._scratch[queries, threads].call
        call.q, call.live, call.mass, call.out = q.data_ptr(), read.data_ptr(), mass.data_ptr(), out.data_ptr()
        call.keys, call.values, call.bias, call.owner = self._places
        call.blocks, call.scale = len(self.owner), scale
        return call


class _Call:
    """A call of the kernel and its scratch.

    Many queries are divided among the threads, so that none waits for another's blocks; for few, the blocks are.
    """

    def __init__(self, heads: int, queries: int, dim: int, threads: int) -> None:
        splits = threads if queries < threads * _MANY else 1
        each, width = -(-queries * splits // threads), kernel.WIDTH
        filled, parts = each + -each % kernel.FOURS, -(-dim // width)
        rows, of_query, block = (threads, heads, parts, filled, width), (threads, heads, filled), (width, width)
        # torch begins them with a line of the cache
        self._room = {
            **{name: torch.zeros(rows) for name in ("asked", "read")},
            **{name: torch.zeros(of_query) for name in ("top", "total")},
            **{name: torch.zeros(threads, parts, *block) for name in ("single_keys", "single_values")},
            "logits": torch.zeros(threads, filled, width),
            "bits": torch.zeros(threads, width, dtype=torch.int32),
        }
        self.call = kernel.Attend(
            **{name: room.data_ptr() for name, room in self._room.items()},
            heads=heads,
            queries=queries,
            dim=dim,
            threads=threads,
            splits=splits,
            filled=filled,
        )


class Layout:
    """The segments of a memory, ready to be laid out layer by layer.

    Args:
        rows: the segments of each row, on the CPU.
    """

    def __init__(self, rows: Sequence[Sequence[Segment]]) -> None:
        half = all(t.dtype == torch.float16 for row in rows for one in row for t in (one.keys, one.values))
        self._dtype = torch.float16 if half else torch.float32
        given = [[(s.keys.to(self._dtype), s.values.to(self._dtype), s.bias.float()) for s in row] for row in rows]
        # held, since what copies them is given addresses
        self._held = [[[tensor.contiguous() for tensor in one] for one in row] for row in given]
        some = next(one for row in rows for one in row)
        self._heads, self._dim = some.lengths.shape[1], some.keys.shape[1]
        self._addresses = [
            np.array([[tensor.data_ptr() for tensor in one] for one in row], np.int64).reshape(-1, 3)
            for row in self._held
        ]
        begins, number = [], []
        for row in rows:
            lengths = np.array([one.lengths.numpy() for one in row], np.int64).reshape(-1, *some.lengths.shape)
            ends = lengths.reshape(len(row), some.lengths.numel()).cumsum(1).reshape(lengths.shape)
            # (layers, segments, heads + 1): where a head's slots begin in a segment's tensors, and where the last ends
            begin = np.concatenate((ends[:, :, :1] - lengths[:, :, :1], ends), 2)
            begins.append(np.ascontiguousarray(begin.swapaxes(0, 1)))
            number.append(-(-lengths.sum(0) // kernel.WIDTH))
        self._begins = begins
        self._number = np.stack(number, 1).reshape(len(some.lengths), -1)  # (layers, R) of blocks
        self._first = self._number.cumsum(1) - self._number
        self._total = self._number.sum(1).tolist()
        self._scratch: dict[tuple[int, int], _Call] = {}

    def layer(self, index: int) -> Ragged:
        """One layer's slots, copied into blocks."""
        total, first, number = self._total[index], self._first[index], self._number[index]
        # by layer, since malloc keeps no more than 32 MB in one piece, and fresh pages cost more than the copy
        shape = (total, -(-self._dim // kernel.WIDTH), kernel.WIDTH, kernel.WIDTH)
        keys, values = (torch.empty(shape, dtype=self._dtype) for _ in range(2))
        bias = torch.empty(total, kernel.WIDTH)
        call = kernel.Place(heads=self._heads, dim=self._dim, blocks=total)
        call.keys, call.values, call.bias = keys.data_ptr(), values.data_ptr(), bias.data_ptr()
        for row, (addresses, begins) in enumerate(zip(self._addresses, self._begins, strict=True)):
            call.tensors, call.segments, call.begins = addresses.ctypes.data, len(addresses), begins[index].ctypes.data
            offset = row * self._heads * number.itemsize
            call.first, call.number = first.ctypes.data + offset, number.ctypes.data + offset
            kernel.place(call, self._dtype == torch.float16, team.threads())
        owner = torch.from_numpy(np.arange(len(number)).repeat(number))
        return Ragged(keys, values, bias, owner, heads=len(number), head_dim=self._dim, scratch=self._scratch)
