"""Attention over blocks of slots, compiled for the CPU by numba when first called and kept beside this file.

A call is a record of addresses and sizes (`Attend`, `Place`): it costs a microsecond, and the threads that take part in
it are those that torch keeps (`team`). Letters used for shapes: ``R`` heads that have slots of their own, ``M`` queries
of a head, ``P`` as many of them as one thread has, filled up to `FOURS`, ``D`` head dimension, ``V`` parts of `WIDTH`
numbers that hold it, ``T`` threads. A layer's blocks are

::

    keys   : (blocks, V, WIDTH, WIDTH) float32 or float16: a column a slot, a row one of D numbers
    values : (blocks, V, WIDTH, WIDTH) likewise: a row a slot, a column one of D numbers; what lies beyond D is 0
    bias   : (blocks, WIDTH) float32, `NONE` where a block is filled up
    owner  : (blocks,) int64 index in R of each block
"""

from __future__ import annotations

import ctypes
import math
import platform
from functools import cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from lloco_engine.decoder import team

__all__ = ["FOURS", "NONE", "WIDTH", "Attend", "Place", "attend", "place", "prepare", "runs"]

Array = npt.NDArray[Any]

WIDTH = 64  # slots of a block, and numbers that a product makes at once: 16 kB, half of the first cache
FOURS = 4  # queries and inner numbers that a product takes at once
_SHARES = 16  # into which a layer is divided to be laid out by several threads

# what is read is finite (`place` makes it so), which lets sums and maxima be taken in any order
_EXACT: dict[str, Any] = {"error_model": "numpy", "nogil": True, "cache": team.can_keep()}
_OPTIONS: dict[str, Any] = _EXACT | {"fastmath": True}
NONE = np.float32(-1e30)  # logit of what is not there; finite, so that differences are no NaN
_ZERO, _ONE, _LEAST = np.float32(0), np.float32(1), np.float32(-126)  # the least: 2**-126 is float32's smallest
_LOG2E = np.float32(math.log2(math.e))
_HALF = np.float32(0.5)
# Taylor's series of 2**f: up to f = 1/2 it leaves out about 1e-7, what float32 rounds off
_C1, _C2, _C3, _C4, _C5, _C6 = (np.float32(math.log(2) ** n / math.factorial(n)) for n in range(1, 7))


@cache
def runs() -> bool:
    """Whether the processor converts half precision by itself, which the kernels rely on."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return True
    return bool(torch.cpu.get_capabilities().get("f16c", False))


def _to_single(context: Any, number: Any) -> Any:
    """float32 of a float32, or of the bits of a half-precision number (uint16)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if isinstance(signature.args[0], types.Float):
            return args[0]
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(number), generate


def _to_pointer(context: Any, address: Any) -> Any:
    """A pointer to an address that Python was given by `torch.Tensor.data_ptr`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.voidptr(address), generate


_single: Any = intrinsic(_to_single)
_pointer: Any = intrinsic(_to_pointer)
_array: Any = numba.carray  # type: ignore[attr-defined]


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _add_product(a: Array, b: Array, out: Array) -> None:
    """``out += a @ b`` of (P, WIDTH), (WIDTH, WIDTH) and (P, WIDTH), P a multiple of `FOURS`.

    Four by four are taken at once: of what is loaded then, every number is used four times. Bounds that are known
    when this is compiled make it a fifth faster.
    """
    for m in range(0, a.shape[0], 4):
        for k in range(0, WIDTH, 4):
            a0, a1, a2, a3 = a[m, k], a[m, k + 1], a[m, k + 2], a[m, k + 3]
            b0, b1, b2, b3 = a[m + 1, k], a[m + 1, k + 1], a[m + 1, k + 2], a[m + 1, k + 3]
            c0, c1, c2, c3 = a[m + 2, k], a[m + 2, k + 1], a[m + 2, k + 2], a[m + 2, k + 3]
            d0, d1, d2, d3 = a[m + 3, k], a[m + 3, k + 1], a[m + 3, k + 2], a[m + 3, k + 3]
            for s in range(WIDTH):
                x0, x1 = _single(b[k, s]), _single(b[k + 1, s])
                x2, x3 = _single(b[k + 2, s]), _single(b[k + 3, s])
                out[m, s] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
                out[m + 1, s] += b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3
                out[m + 2, s] += c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3
                out[m + 3, s] += d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _exponentials(logits: Array, top: np.float32, bits: Array, power: Array) -> np.float32:
    """Make (WIDTH,) ``logits`` their ``exp(logit - top)``, none above 1, and return the sum.

    2**t is 2 to the nearest whole number, written as the exponent of a float, times a polynomial of the rest.
    """
    for s in range(WIDTH):
        t = max((logits[s] - top) * _LOG2E, _LEAST)
        whole = np.floor(t + _HALF)
        f = t - whole
        bits[s] = (np.int32(whole) + np.int32(127)) << np.int32(23)
        logits[s] = _ONE + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
    total = _ZERO
    for s in range(WIDTH):
        logits[s] *= power[s]
        total += logits[s]
    return total


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _read_block(
    asked: Array,
    keys: Array,
    values: Array,
    bias: Array,
    read: Array,
    top: Array,
    mass: Array,
    logits: Array,
    bits: Array,
    power: Array,
) -> None:
    """Add what one head's queries (V, P, WIDTH) read of one block to ``read`` (V, P, WIDTH) and ``mass`` (P,).

    Both are relative to the highest logit so far, ``top`` (P,): the softmax runs along (Milakov and Gimelshein 2018).
    """
    for m in range(asked.shape[1]):
        for s in range(WIDTH):
            logits[m, s] = bias[s]
    for part in range(asked.shape[0]):
        _add_product(asked[part], keys[part], logits)
    for m in range(asked.shape[1]):
        high = logits[m, 0]
        for s in range(WIDTH):
            high = max(high, logits[m, s])
        if high > top[m]:
            shrink = np.float32(np.exp(top[m] - high))
            top[m] = high
            mass[m] *= shrink
            for part in range(read.shape[0]):
                for d in range(WIDTH):
                    read[part, m, d] *= shrink
        mass[m] += _exponentials(logits[m], top[m], bits, power)
    for part in range(read.shape[0]):
        _add_product(logits, values[part], read[part])


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _read_blocks(
    begin: int,
    end: int,
    keys: Array,
    values: Array,
    bias: Array,
    owner: Array,
    asked: Array,
    read: Array,
    top: Array,
    mass: Array,
    single_keys: Array,
    single_values: Array,
    logits: Array,
    bits: Array,
) -> None:
    """What the queries (R, V, P, WIDTH) read of the blocks from ``begin`` to ``end``."""
    power = bits.view(np.float32)
    read[:] = _ZERO
    top[:] = NONE
    mass[:] = _ZERO
    for block in range(begin, end):
        head = owner[block]
        if asked.shape[2] == FOURS:  # read once, so there is nothing to keep
            _read_block(
                asked[head],
                keys[block],
                values[block],
                bias[block],
                read[head],
                top[head],
                mass[head],
                logits,
                bits,
                power,
            )
            continue
        for part in range(keys.shape[1]):
            for row in range(WIDTH):
                for column in range(WIDTH):
                    single_keys[part, row, column] = _single(keys[block, part, row, column])
                    single_values[part, row, column] = _single(values[block, part, row, column])
        _read_block(
            asked[head],
            single_keys,
            single_values,
            bias[block],
            read[head],
            top[head],
            mass[head],
            logits,
            bits,
            power,
        )


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _ask(q: Array, first: int, scale: np.float32, asked: Array) -> None:
    """The queries ``q`` (R, M, D) from ``first`` on, as many as go into ``asked`` (R, V, P, WIDTH)."""
    heads, queries, dim = q.shape
    for head in range(heads):
        for m in range(min(asked.shape[2], queries - first)):
            for part in range(asked.shape[1]):
                for d in range(min(WIDTH, dim - part * WIDTH)):
                    asked[head, part, m, d] = q[head, first + m, part * WIDTH + d] * scale


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _merge(first: int, live: Array, live_mass: Array, read: Array, top: Array, mass: Array, out: Array) -> None:
    """Put together what was read of the live tokens and in ``read`` (S, R, V, P, WIDTH), from query ``first`` on."""
    heads, queries, dim = out.shape
    for head in range(heads):
        for m in range(min(read.shape[3], queries - first)):
            high = live_mass[head, first + m]
            for split in range(len(read)):
                if mass[split, head, m] > _ZERO:  # else it read nothing of this head
                    high = max(high, top[split, head, m])
            share = np.float32(np.exp(live_mass[head, first + m] - high))
            total = share
            for d in range(dim):
                out[head, first + m, d] = share * live[head, first + m, d]
            for split in range(len(read)):
                if mass[split, head, m] == _ZERO:
                    continue
                share = np.float32(np.exp(top[split, head, m] - high))
                total += share * mass[split, head, m]
                for part in range(read.shape[2]):
                    for d in range(min(WIDTH, dim - part * WIDTH)):
                        out[head, first + m, part * WIDTH + d] += share * read[split, head, part, m, d]
            for d in range(dim):
                out[head, first + m, d] /= total


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _read_live(q: Array, keys: Array, values: Array, scale: np.float32, live: Array) -> Any:
    """Attention of one query (D,) over live keys and values (S, D), to ``live`` (D,); returns its mass."""
    count, dim = keys.shape
    weights = np.empty(count, np.float32)
    high = NONE
    for s in range(count):
        logit = _ZERO
        for d in range(dim):
            logit += q[d] * keys[s, d]
        weights[s] = logit * scale
        high = max(high, weights[s])
    total = _ZERO
    live[:] = _ZERO
    for s in range(count):
        weight = np.float32(np.exp(weights[s] - high))
        total += weight
        for d in range(dim):
            live[d] += weight * values[s, d]
    for d in range(dim):
        live[d] /= total
    return high + np.float32(np.log(total))


# -- calls ------------------------------------------------------------------------------------------------------


class Attend(ctypes.Structure):
    """A call of `attend`: addresses and sizes.

    ``q`` (R, M, D) queries, ``out`` (R, M, D) the result. ``live`` (R, M, D) what was read of the live tokens and
    ``mass`` (R, M) the logarithm of the sum of their exponentials; or, where ``tokens`` is not 0, room for these: then
    M is of one token, which may read so many live ones. Their keys and values lie at ``live_keys`` and ``live_values``,
    a row ``row_stride`` numbers after another and a head ``head_stride``.

    ``keys``, ``values``, ``bias`` and ``owner`` are ``blocks`` blocks. ``splits``: parts into which they are divided
    among the threads; the queries are divided into T / splits parts of at most ``filled``, P. The others are scratch:
    ``asked`` and ``read`` (T, R, V, P, WIDTH), asked 0 beyond M and D; ``top`` and ``total`` (T, R, P); ``single_keys``
    and ``single_values`` (T, V, WIDTH, WIDTH); ``logits`` (T, P, WIDTH); ``bits`` (T, WIDTH) int32.
    """

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("q", "live", "mass", "out", "keys", "values", "bias", "owner", "blocks")),
        *((name, ctypes.c_int64) for name in ("live_keys", "live_values", "row_stride", "head_stride", "tokens")),
        *((name, ctypes.c_int64) for name in ("asked", "read", "top", "total", "single_keys", "single_values")),
        *((name, ctypes.c_int64) for name in ("logits", "bits", "threads", "splits", "filled")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "queries", "dim")),
        ("scale", ctypes.c_double),
    )


class Place(ctypes.Structure):
    """A call of `place`: addresses and sizes.

    ``tensors`` (segments, 3) int64 are the addresses of each segment's keys (N, D), values (N, D) and biases (N,).
    ``begins`` (segments, heads + 1) int64: of segment i, head h has the slots from ``begins[i, h]`` on. ``first`` and
    ``number`` (heads,) int64: head h has so many blocks, from ``first[h]`` on. ``keys``, ``values`` and ``bias`` are
    ``blocks`` blocks, which are written.
    """

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tensors", "begins", "first", "number", "keys", "values", "bias")),
        *((name, ctypes.c_int64) for name in ("segments", "heads", "dim", "blocks")),
    )


_ATTEND, _PLACE = np.dtype(Attend), np.dtype(Place)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _attend(call: Any, keys: Array, values: Array) -> None:
    """A thread's part of a call (see `Attend`)."""
    heads, dim, threads, filled = call.heads, call.dim, call.threads, call.filled
    parts = keys.shape[1]
    q = _array(_pointer(call.q), (heads, call.queries, dim), np.float32)
    live = _array(_pointer(call.live), (heads, call.queries, dim), np.float32)
    mass = _array(_pointer(call.mass), (heads, call.queries), np.float32)
    out = _array(_pointer(call.out), (heads, call.queries, dim), np.float32)
    bias = _array(_pointer(call.bias), (call.blocks, WIDTH), np.float32)
    owner = _array(_pointer(call.owner), (call.blocks,), np.int64)
    asked = _array(_pointer(call.asked), (threads, heads, parts, filled, WIDTH), np.float32)
    read = _array(_pointer(call.read), (threads, heads, parts, filled, WIDTH), np.float32)
    top = _array(_pointer(call.top), (threads, heads, filled), np.float32)
    total = _array(_pointer(call.total), (threads, heads, filled), np.float32)
    single_keys = _array(_pointer(call.single_keys), (threads, parts, WIDTH, WIDTH), np.float32)
    single_values = _array(_pointer(call.single_values), (threads, parts, WIDTH, WIDTH), np.float32)
    logits = _array(_pointer(call.logits), (threads, filled, WIDTH), np.float32)
    bits = _array(_pointer(call.bits), (threads, WIDTH), np.int32)
    splits = call.splits
    for thread in range(team.number(), threads, team.size()):
        first, split = thread // splits * filled, thread % splits
        _ask(q, first, np.float32(call.scale), asked[thread])
        for pair in range(thread, heads * call.queries if call.tokens else 0, threads):
            head, m = pair // call.queries, pair % call.queries
            at = 4 * (head // call.kv_heads * call.row_stride + head % call.kv_heads * call.head_stride)
            live_keys = _array(_pointer(call.live_keys + at), (call.tokens, dim), np.float32)
            live_values = _array(_pointer(call.live_values + at), (call.tokens, dim), np.float32)
            mass[head, m] = _read_live(q[head, m], live_keys, live_values, np.float32(call.scale), live[head, m])
        _read_blocks(
            call.blocks * split // splits,
            call.blocks * (split + 1) // splits,
            keys,
            values,
            bias,
            owner,
            asked[thread],
            read[thread],
            top[thread],
            total[thread],
            single_keys[thread],
            single_values[thread],
            logits[thread],
            bits[thread],
        )
        if splits == 1 and not call.tokens:
            of = slice(thread, thread + 1)
            _merge(first, live, mass, read[of], top[of], total[of], out)


def _attend_half(address: Any) -> None:
    call = _array(address, (1,), _ATTEND)[0]
    shape = (call.blocks, (call.dim + WIDTH - 1) // WIDTH, WIDTH, WIDTH)
    _attend(call, _array(_pointer(call.keys), shape, np.uint16), _array(_pointer(call.values), shape, np.uint16))


def _attend_single(address: Any) -> None:
    call = _array(address, (1,), _ATTEND)[0]
    shape = (call.blocks, (call.dim + WIDTH - 1) // WIDTH, WIDTH, WIDTH)
    _attend(call, _array(_pointer(call.keys), shape, np.float32), _array(_pointer(call.values), shape, np.float32))


def _merge_splits(address: Any) -> None:
    """What is left to do of a call when all threads have done their parts."""
    call = _array(address, (1,), _ATTEND)[0]
    heads, dim, threads, filled = call.heads, call.dim, call.threads, call.filled
    live = _array(_pointer(call.live), (heads, call.queries, dim), np.float32)
    mass = _array(_pointer(call.mass), (heads, call.queries), np.float32)
    out = _array(_pointer(call.out), (heads, call.queries, dim), np.float32)
    read = _array(_pointer(call.read), (threads, heads, (dim + WIDTH - 1) // WIDTH, filled, WIDTH), np.float32)
    top = _array(_pointer(call.top), (threads, heads, filled), np.float32)
    total = _array(_pointer(call.total), (threads, heads, filled), np.float32)
    for first in range(0, threads, call.splits):
        of = slice(first, first + call.splits)
        _merge(first // call.splits * filled, live, mass, read[of], top[of], total[of], out)


@njit(**_EXACT)  # type: ignore[untyped-decorator]
def _place(call: Any, keys: Array, values: Array, of_type: Any) -> None:
    """A thread's part of a call (see `Place`)."""
    dim = call.dim
    addresses = _array(_pointer(call.tensors), (call.segments, 3), np.int64)
    begins = _array(_pointer(call.begins), (call.segments, call.heads + 1), np.int64)
    first = _array(_pointer(call.first), (call.heads,), np.int64)
    number = _array(_pointer(call.number), (call.heads,), np.int64)
    bias = _array(_pointer(call.bias), (len(keys), WIDTH), np.float32)
    total = number.sum()
    for share in range(team.number(), _SHARES, team.size()):  # of the blocks, since heads differ in length
        begin, end = first[0] + total * share // _SHARES, first[0] + total * (share + 1) // _SHARES
        for head in range(call.heads):
            low = (max(begin, first[head]) - first[head]) * WIDTH
            high = (min(end, first[head] + number[head]) - first[head]) * WIDTH
            at = 0  # of the head's slots
            for segment in range(call.segments):
                slots = begins[segment, head + 1] - begins[segment, head]
                from_keys = _array(_pointer(addresses[segment, 0]), (begins[segment, head + 1], dim), of_type)
                from_values = _array(_pointer(addresses[segment, 1]), (begins[segment, head + 1], dim), of_type)
                from_bias = _array(_pointer(addresses[segment, 2]), (begins[segment, head + 1],), np.float32)
                for place in range(max(low, at), min(high, at + slots)):
                    slot = begins[segment, head] + place - at
                    block, lane = first[head] + place // WIDTH, place % WIDTH
                    for part in range(keys.shape[1]):
                        for d in range(min(WIDTH, dim - part * WIDTH)):
                            keys[block, part, d, lane] = from_keys[slot, part * WIDTH + d]
                            values[block, part, lane, d] = from_values[slot, part * WIDTH + d]
                        for d in range(dim - part * WIDTH, WIDTH):
                            keys[block, part, d, lane] = 0
                            values[block, part, lane, d] = 0
                    bias[block, lane] = max(from_bias[slot], NONE)
                at += slots
            for empty in range(max(low, at), high):
                block, lane = first[head] + empty // WIDTH, empty % WIDTH
                keys[block, :, :, lane] = 0
                values[block, :, lane] = 0
                bias[block, lane] = NONE


def _place_half(address: Any) -> None:
    call = _array(address, (1,), _PLACE)[0]
    shape = (call.blocks, (call.dim + WIDTH - 1) // WIDTH, WIDTH, WIDTH)
    keys, values = _array(_pointer(call.keys), shape, np.uint16), _array(_pointer(call.values), shape, np.uint16)
    _place(call, keys, values, np.uint16)


def _place_single(address: Any) -> None:
    call = _array(address, (1,), _PLACE)[0]
    shape = (call.blocks, (call.dim + WIDTH - 1) // WIDTH, WIDTH, WIDTH)
    keys, values = _array(_pointer(call.keys), shape, np.float32), _array(_pointer(call.values), shape, np.float32)
    _place(call, keys, values, np.float32)


@cache
def prepare() -> dict[str, team.Task]:
    """What is compiled, by name; some seconds the first time on a machine, and a fraction of one afterwards."""
    made = (_attend_half, _attend_single, _merge_splits, _place_half, _place_single)
    return {function.__name__: team.Task(function) for function in made}


def attend(call: Attend, half: bool) -> None:
    """Attention of queries over a layer's blocks, put together with what is read of the live tokens.

    Args:
        call: where everything is. half: whether keys and values are float16.
    """
    compiled = prepare()
    compiled["_attend_half" if half else "_attend_single"](call, call.threads)
    if call.splits > 1 or call.tokens:
        compiled["_merge_splits"](call, 1)


def place(call: Place, half: bool, threads: int) -> None:
    """Copy the slots of segments into a layer's blocks.

    Args:
        call: where everything is. half: whether keys and values are float16. threads: that take part.
    """
    prepare()["_place_half" if half else "_place_single"](call, threads)
