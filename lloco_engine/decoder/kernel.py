"""Attention over live tokens and ragged slots at once, compiled for the CPU by numba and kept beside this file.

A call is a record of addresses and sizes (`Attend`): it costs some microseconds, and the threads that take part in it
are those that torch keeps (`team`). Nothing is laid out beforehand: segments are read where they are, `WIDTH` tokens
or slots of a head at a time, which are made float32 in the processor's cache. Letters used for shapes: ``H`` KV heads,
``D`` head dimension, ``P`` queries of a part, filled up to `_LANES`.

All that is to be read lies, as it were, in one line: part after part of the queries, in it head after head, of each
the live tokens and then the slots, segment after segment. Every thread reads a stretch of it, as long as the others'.
"""

from __future__ import annotations

import ctypes
import math
import platform
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from lloco_engine.decoder import team
from lloco_engine.decoder.focus import TIE

__all__ = ["Attend", "attend", "parts", "prepare", "room", "runs"]

Array = npt.NDArray[Any]

WIDTH = 64  # tokens or slots read at once: their keys, or values, and what is made of them stay in the first cache
_MOST = 48  # queries of a part, likewise

_CAN = torch.cpu.get_capabilities()
_WIDE = bool(_CAN.get("avx512_f", False))
_LANES = 16 if _WIDE else 8  # numbers that an operation takes
_ROWS = 8 if _WIDE else 4  # rows by twice `_LANES` columns are summed up in registers at once
_FEW = 4  # queries up to which each has `_SPREAD` lanes, which add up its products' parts: one would leave most idle
_SPREAD = 4
_COLUMNS = 4 if _WIDE else 2  # vectors of what few queries read, summed up in registers at once

# what is read is finite (`_find` makes it so), which lets sums and maxima be taken in any order
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "nogil": True, "cache": team.can_keep(), "fastmath": True}
_NONE = np.float32(-1e30)  # logit of what is not to be read; finite, so that differences are no NaN
_ZERO, _ONE = np.float32(0), np.float32(1)
_TIE = np.float32(TIE)
_LEAST = -126.0  # 2**-126 is float32's smallest
# Taylor's series of 2**f: up to f = 1/2 it leaves out about 1e-7, what float32 rounds off
_SERIES = [math.log(2) ** n / math.factorial(n) for n in range(7)]


@cache
def runs() -> bool:
    """Whether the processor converts half precision by itself, which the kernel relies on."""
    return platform.machine().lower() in ("arm64", "aarch64") or bool(_CAN.get("f16c", False))


# -- what numba does not know -----------------------------------------------------------------------------------


_function: Any = cgutils.get_or_insert_function
_variable: Any = cgutils.alloca_once_value


def _to_single(context: Any, number: Any) -> Any:
    """float32 of a float32, or of the bits of a half-precision number (uint16)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if isinstance(signature.args[0], types.Float):
            return args[0]
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(number), generate


def _to_fetch(context: Any, address: Any) -> Any:
    """Have the line of the cache that an address lies in brought nearer; where nothing is there, nothing happens."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place, number, number, number])
        what = number(0), number(2), number(1)  # to be read, into the second cache, data
        builder.call(_function(builder.module, kind, "llvm.prefetch.p0"), [builder.inttoptr(args[0], place), *what])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _to_pointer(context: Any, address: Any) -> Any:
    """A pointer to an address that Python was given by `torch.Tensor.data_ptr`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.voidptr(address), generate


_NUMBER, _HALF, _WORD = ir.FloatType(), ir.HalfType(), ir.IntType(64)
_VECTOR = ir.VectorType(_NUMBER, _LANES)


def _call(builder: Any, name: str, *vectors: Any) -> Any:
    """LLVM's function of vectors of this name."""
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * len(vectors))
    return builder.call(_function(builder.module, kind, f"llvm.{name}.v{_LANES}f32"), vectors)


def _all(number: float) -> Any:
    """A vector of one number."""
    return _VECTOR([number] * _LANES)


def _higher(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _at(builder: Any, begin: Any, steps: Any, step: Any, kind: Any = _VECTOR) -> Any:
    """Where ``steps`` times ``step`` numbers, which vectors of a ``kind`` consist of, lie behind an address."""
    size = _WORD(2 if kind.element == _HALF else 4)
    return builder.inttoptr(builder.add(begin, builder.mul(builder.mul(steps, step), size)), kind.as_pointer())


def _load(builder: Any, place: Any) -> Any:
    """A vector of float32 from a place where there is one, or one of half precision."""
    vector = builder.load(place, align=2)
    if vector.type.element == _HALF:
        return builder.fpext(vector, ir.VectorType(_NUMBER, vector.type.count))
    return vector


def _exponential(builder: Any, x: Any) -> Any:
    """e**x of vectors up to 0: 2 to the nearest whole number, written as the exponent of floats, times a polynomial."""
    t = _higher(builder, builder.fmul(x, _all(math.log2(math.e))), _all(_LEAST))
    whole = _call(builder, "rint", t)
    rest, made = builder.fsub(t, whole), _all(_SERIES[-1])
    for factor in reversed(_SERIES[:-1]):
        made = _call(builder, "fma", made, rest, _all(factor))
    integers = ir.VectorType(ir.IntType(32), _LANES)
    bits = builder.add(builder.fptosi(whole, integers), integers([127] * _LANES))
    return builder.fmul(made, builder.bitcast(builder.shl(bits, integers([23] * _LANES)), _VECTOR))


def _to_weights(spread: int) -> Callable[..., Any]:
    """Make ``count`` logits, in each of `_LANES` lanes, the exponentials of what they are above the highest.

    Beforehand lanes of a query, ``spread`` side by side, are added up. The arguments are addresses, and how many
    numbers lie between rows of logits. ``top`` becomes the highest so far; ``total``, the sum of all exponentials, and
    whatever else is relative to ``top`` becomes ``shrink`` times as much.
    """

    def weigh(context: Any, logits: Any, row: Any, count: Any, top: Any, total: Any, shrink: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            logits, row, count, *others = args
            top, total, shrink = (builder.inttoptr(address, _VECTOR.as_pointer()) for address in others)
            before = builder.load(top, align=4)
            high, added = (_variable(builder, value) for value in (before, _all(0)))
            with cgutils.for_range(builder, count) as loop:
                place = _at(builder, logits, loop.index, row)
                logit = builder.load(place, align=4)
                for other in (1, 2)[: spread // 2]:  # after both, all four lanes have their sum
                    turned = ir.VectorType(ir.IntType(32), _LANES)([lane ^ other for lane in range(_LANES)])
                    logit = builder.fadd(logit, builder.shuffle_vector(logit, logit, turned))
                builder.store(logit, place, align=4)
                builder.store(_higher(builder, logit, builder.load(high)), high)
            high = builder.load(high)
            with cgutils.for_range(builder, count) as loop:
                place = _at(builder, logits, loop.index, row)
                weight = _exponential(builder, builder.fsub(builder.load(place, align=4), high))
                builder.store(weight, place, align=4)
                builder.store(builder.fadd(builder.load(added), weight), added)
            less = _exponential(builder, builder.fsub(before, high))
            builder.store(high, top, align=4)
            builder.store(less, shrink, align=4)
            summed = _call(builder, "fma", builder.load(total, align=4), less, builder.load(added))
            builder.store(summed, total, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return weigh


def _tile(rows: int, vectors: int, spread: int = 1, of_a: Any = _NUMBER, of_b: Any = _NUMBER) -> Callable[..., Any]:
    """``out += a @ b`` of (rows, depth) and (depth, ``vectors * _LANES``), the sums in registers meanwhile.

    What is compiled from loops keeps the sums in memory, and takes twice as long. The arguments are addresses, and how
    many numbers lie between rows and, of ``a``, between columns. With ``spread`` a row of ``b`` is for so many numbers
    of ``a`` side by side, one for every such lane in turn, and a step of the depth takes `_LANES` numbers of ``a``.
    ``of_a`` and ``of_b`` are the kinds of numbers.
    """
    taken = _LANES if spread > 1 else 1
    some, column, index = ir.VectorType(of_a, taken), ir.VectorType(of_b, _LANES), ir.VectorType(ir.IntType(32), _LANES)
    turns = [index([first + lane % spread for lane in range(_LANES)]) for first in range(0, taken, spread)]

    def product(
        context: Any, a: Any, a_row: Any, a_column: Any, b: Any, b_row: Any, out: Any, out_row: Any, depth: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            a, a_row, a_column, b, b_row, out, out_row, depth = args

            def row(begin: Any, steps: Any, step: Any, kind: Any) -> list[Any]:
                begin = builder.ptrtoint(_at(builder, begin, steps, step, kind), _WORD)
                return [_at(builder, begin, _WORD(v), _WORD(_LANES), kind) for v in range(vectors)]

            places = [place for r in range(rows) for place in row(out, _WORD(r), out_row, _VECTOR)]
            sums = [_variable(builder, builder.load(place, align=4)) for place in places]
            with cgutils.for_range(builder, depth) as loop:
                begin = builder.ptrtoint(_at(builder, a, loop.index, a_column, some), _WORD)
                factors = [_load(builder, _at(builder, begin, _WORD(r), a_row, some)) for r in range(rows)]
                for turn, lanes in enumerate(turns):
                    at = builder.add(builder.mul(loop.index, _WORD(len(turns))), _WORD(turn))
                    columns = [_load(builder, place) for place in row(b, at, b_row, column)]
                    for r, numbers in enumerate(factors):
                        factor = builder.shuffle_vector(numbers, numbers, lanes)
                        for part, one in zip(sums[r * vectors : (r + 1) * vectors], columns, strict=True):
                            builder.store(_call(builder, "fma", factor, one, builder.load(part)), part)
            for place, part in zip(places, sums, strict=True):
                builder.store(builder.load(part), place, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return product


_single: Any = intrinsic(_to_single)
_pointer: Any = intrinsic(_to_pointer)
_fetch: Any = intrinsic(_to_fetch)
_weigh: Any = intrinsic(_to_weights(1))
_weigh_few: Any = intrinsic(_to_weights(_SPREAD))
_tile_of_one: Any = intrinsic(_tile(_ROWS, 1))
_tile_of_two: Any = intrinsic(_tile(_ROWS, 2))
_dots_single: Any = intrinsic(_tile(_ROWS, _FEW * _SPREAD // _LANES, _SPREAD))
_dots_half: Any = intrinsic(_tile(_ROWS, _FEW * _SPREAD // _LANES, _SPREAD, of_a=_HALF))
_dots_of_one_single: Any = intrinsic(_tile(1, _FEW * _SPREAD // _LANES, _SPREAD))
_dots_of_one_half: Any = intrinsic(_tile(1, _FEW * _SPREAD // _LANES, _SPREAD, of_a=_HALF))
_sums_single: Any = intrinsic(_tile(_FEW, _COLUMNS))
_sums_half: Any = intrinsic(_tile(_FEW, _COLUMNS, of_b=_HALF))
_array: Any = numba.carray  # type: ignore[attr-defined]


# -- one block --------------------------------------------------------------------------------------------------


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _add_product(a: int, a_row: int, a_column: int, b: Array, out: Array, rows: int, depth: int) -> None:
    """``out[:rows] += a @ b[:depth]``, ``a`` by its address and strides; rows are taken up to a multiple of `_ROWS`."""
    columns = out.shape[1]
    to, of = out.ctypes.data, b.ctypes.data
    for row in range(0, rows, _ROWS):
        left, at = a + 4 * row * a_row, to + 4 * row * columns
        for column in range(0, columns - _LANES, 2 * _LANES):
            right = of + 4 * column
            _tile_of_two(left, a_row, a_column, right, columns, at + 4 * column, columns, depth)
        if columns % (2 * _LANES):
            last = 4 * (columns - _LANES)
            _tile_of_one(left, a_row, a_column, of + last, columns, at + last, columns, depth)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _ask_few(runs: Array, asked: Array, logits: Array, ahead: bool) -> None:
    """Add to ``logits`` (WIDTH, P) the products of runs' keys, where they are, with few queries ``asked``.

    With ``ahead`` their values are brought nearer meanwhile.
    """
    columns, at = asked.shape[1], logits.ctypes.data
    of, dim = asked.ctypes.data, len(asked) * _SPREAD
    depth = dim // _LANES
    for keys, values, count, half, _, _, _ in runs:
        size = (2 if half else 4) * dim
        for slot in range(0, count - _ROWS + 1, _ROWS):
            for line in range((slot + WIDTH) * size, (slot + WIDTH + _ROWS) * size, 64):
                _fetch(keys + line)
                if ahead:
                    _fetch(values + line)
            if half:
                _dots_half(keys + 2 * slot * dim, dim, _LANES, of, columns, at, columns, depth)
            else:
                _dots_single(keys + 4 * slot * dim, dim, _LANES, of, columns, at, columns, depth)
            at += 4 * _ROWS * columns
        for slot in range(count - count % _ROWS, count):
            if half:
                _dots_of_one_half(keys + 2 * slot * dim, dim, _LANES, of, columns, at, columns, depth)
            else:
                _dots_of_one_single(keys + 4 * slot * dim, dim, _LANES, of, columns, at, columns, depth)
            at += 4 * columns


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _take_few(runs: Array, logits: Array, read: Array) -> None:
    """Add runs' values, where they are, times the weights of few queries, ``logits`` (WIDTH, P), to ``read``."""
    lanes, dim = logits.shape[1], read.shape[1]
    for column in range(0, dim, _COLUMNS * _LANES):
        at, to = logits.ctypes.data, read.ctypes.data + 4 * column
        for _, values, count, half, _, _, _ in runs:
            if half:
                _sums_half(at, _SPREAD, lanes, values + 2 * column, dim, to, dim, count)
            else:
                _sums_single(at, _SPREAD, lanes, values + 4 * column, dim, to, dim, count)
            at += 4 * count * lanes


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _gather(runs: Array, which: int, dim: int, out: Array) -> None:
    """Copy runs' keys (``which`` 0) or values (1) to ``out`` (WIDTH, D or more), as float32."""
    to = 0
    for run in runs:
        count = run[2]
        if run[3]:
            half = _array(_pointer(run[which]), (count, dim), np.uint16)
            for slot in range(count):
                for line in range(2 * dim * (slot + WIDTH), 2 * dim * (slot + WIDTH + 1), 64):
                    _fetch(run[which] + line)
                for d in range(dim):
                    out[to + slot, d] = _single(half[slot, d])
        else:
            out[to : to + count, :dim] = _array(_pointer(run[which]), (count, dim), np.float32)
        to += count


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _weigh_all(count: int, spread: int, logits: Array, shrink: Array, top: Array, total: Array, read: Array) -> None:
    """Make ``count`` rows of ``logits`` (WIDTH, P) weights, relative to the highest logit so far, ``top`` (P,).

    ``read`` and ``total`` (P,) are too: the softmax runs along (Milakov and Gimelshein 2018).
    """
    lanes = len(top)
    for lane in range(0, 4 * lanes, 4 * _LANES):
        at, tops = logits.ctypes.data + lane, top.ctypes.data + lane
        totals, shrinks = total.ctypes.data + lane, shrink.ctypes.data + lane
        if spread == 1:
            _weigh(at, lanes, count, tops, totals, shrinks)
        else:
            _weigh_few(at, lanes, count, tops, totals, shrinks)
    for p in range(len(read)):
        if shrink[p * spread] != _ONE:
            for d in range(read.shape[1]):
                read[p, d] *= shrink[p * spread]


# -- calls ------------------------------------------------------------------------------------------------------


class Attend(ctypes.Structure):
    """A call of `attend`: addresses and sizes, of a layer.

    ``q`` (rows, H * group, tokens, D) are the queries and ``out`` (rows, tokens, H * group, D) is the result;
    ``q_row``, ``q_head`` and ``q_token`` say how many numbers lie between two of ``q``. ``live_keys`` and
    ``live_values`` (rows, H, live, D) likewise, by ``live_row`` and ``live_head``. ``mask`` (rows, tokens, live) is
    added to the logits of the live tokens, a row ``mask_row`` numbers after another; or it is 0.

    ``tensors`` (segments, 3) int64: addresses of each segment's keys (N, D), values (N, D) and biases (N,). ``begins``
    (segments, H + 1) int64: where the slots of a segment's heads begin in them, and where the last's end. ``of_row``
    (rows or 1,) int64: the first of a row's segments; ``slots`` (rows or 1, H) int64: how many slots its heads have in
    all of them. ``shared`` is 1 where all rows have the same, ``half`` where keys and values are float16.

    ``focused`` is 1 where some queries do not read every segment: of ``many`` (rows or 1,) int64, a row's segments, at
    most ``most``, each query reads ``focus`` (rows or 1,) int64 (0: all), and ``prior`` (segments,) float32 (see
    `lloco_engine.decoder.focus`). ``largest``: room for (threads, parts * rows * H, most, P) float32; ``kept``: for P
    logits of everything in the line, and of 8 more for each thread.

    ``each``, ``filled`` and ``spread``: queries of a part, lanes that they fill (P), and lanes of a query.
    ``scratch``: ``room`` numbers of float32 for each thread.
    """

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("q", "q_row", "q_head", "q_token", "out")),
        *((name, ctypes.c_int64) for name in ("live_keys", "live_values", "live_row", "live_head", "mask", "mask_row")),
        *((name, ctypes.c_int64) for name in ("tensors", "begins", "of_row", "slots", "segments", "shared", "half")),
        *((name, ctypes.c_int64) for name in ("focused", "many", "most", "focus", "prior", "largest", "kept")),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "group", "tokens", "live", "dim")),
        *((name, ctypes.c_int64) for name in ("each", "filled", "spread", "room", "scratch")),
        ("scale", ctypes.c_double),
    )


_ATTEND = np.dtype(Attend)


def parts(queries: int, dim: int) -> tuple[int, int, int]:
    """See `Attend`: ``each``, ``filled`` and ``spread``."""
    if queries <= _FEW and dim % (_COLUMNS * _LANES) == 0:
        return queries, _FEW * _SPREAD, _SPREAD
    each = -(-queries // -(-queries // _MOST))
    return each, each + -each % _LANES, 1


def room(dim: int, filled: int) -> int:
    """Numbers of scratch that a thread needs."""
    wide = dim + -dim % _LANES
    return WIDTH * (dim + wide + filled) + (dim + 1) * filled + 2 * (wide + 2) * filled


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _ask(call: Any, part: int, row: int, head: int, asked: Array) -> Any:
    """A part's queries to ``asked`` (D / spread, P), 0 where there are none; returns how many there are."""
    first = part * call.each
    count = min(call.each, call.group * call.tokens - first)
    spread = call.spread
    asked[:, count * spread :] = _ZERO
    for p in range(count):
        query, token = head * call.group + (first + p) // call.tokens, (first + p) % call.tokens
        at = row * call.q_row + query * call.q_head + token * call.q_token
        q = _array(_pointer(call.q + 4 * at), (call.dim,), np.float32)
        for d in range(call.dim):
            asked[d // spread, p * spread + d % spread] = q[d] * np.float32(call.scale)
    return count


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _find(
    call: Any, begins: Array, cursor: Array, row: int, head: int, first: int, count: int, wanted: Array, runs: Array
) -> Any:
    """Where ``count`` of a head's live tokens and slots from ``first`` on lie: ``runs`` (WIDTH, 7).

    ``cursor`` (3,) is the segment to look at first, which of the head's tokens and slots its first is, and the row's
    first segment; it goes on from call to call. Segments that are not ``wanted`` (most,) are left out. A run is the
    addresses of its keys and values, how many they are, whether they are in half precision, the number of the segment
    in its row (-1: live tokens), the address of its biases (0: none), and how far behind ``first`` it begins.

    Returns:
        how many runs there are, and how many tokens and slots in them.
    """
    dim, live, number, total = call.dim, call.live, 0, 0
    if first < live:
        at = 4 * (row * call.live_row + head * call.live_head + first * dim)
        total = min(count, live - first)
        runs[0, 0], runs[0, 1], runs[0, 2] = call.live_keys + at, call.live_values + at, total
        runs[0, 3], runs[0, 4], runs[0, 5], runs[0, 6] = 0, -1, 0, 0
        number = 1
    tensors = _array(_pointer(call.tensors), (call.segments, 3), np.int64)
    size = 2 if call.half else 4
    segment, at, begun = cursor
    while at < first + count and segment < call.segments:
        begin = begins[segment, head]
        after = at + begins[segment, head + 1] - begin
        low, high = max(first, at), min(first + count, after)
        if low < high and wanted[segment - begun]:
            slot, run = begin + low - at, runs[number]
            run[0], run[1] = tensors[segment, 0] + slot * dim * size, tensors[segment, 1] + slot * dim * size
            run[2], run[3], run[4] = high - low, call.half, segment - begun
            run[5], run[6] = tensors[segment, 2] + 4 * slot, low - first
            number, total = number + 1, total + high - low
        if after > first + count:
            break
        segment, at = segment + 1, after
    cursor[0], cursor[1] = segment, at
    return number, total


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _begin(runs: Array, spread: int, logits: Array) -> None:
    """Begin ``logits`` (WIDTH, P) with the runs' biases, divided among the lanes of a query."""
    at, part = 0, _ONE / np.float32(spread)
    for _, _, count, _, _, biases, _ in runs:
        if biases:
            bias = _array(_pointer(biases), (count,), np.float32)
            for place in range(count):
                logits[at + place] = max(bias[place], _NONE) * part
        else:
            logits[at : at + count] = _ZERO
        at += count


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _hide(call: Any, part: int, row: int, first: int, count: int, logits: Array) -> None:
    """Add the mask of the live tokens from ``first`` on to the logits of a part's ``count`` queries."""
    mask = _array(_pointer(call.mask + 4 * row * call.mask_row), (call.tokens, call.live), np.float32)
    for s in range(min(call.live - first, WIDTH)):
        for p in range(count):
            logits[s, p * call.spread] += max(mask[(part * call.each + p) % call.tokens, first + s], _NONE)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _note(runs: Array, spread: int, logits: Array, largest: Array) -> None:
    """Note the largest of the runs' ``logits`` (WIDTH, P) by segment and query, ``largest`` (most, P).

    That of a query with several lanes is noted in the first of them.
    """
    at = 0
    for _, _, count, _, segment, _, _ in runs:
        high = largest[segment]
        for slot in range(at, at + count):
            of = logits[slot]
            if spread == 1:
                for lane in range(len(of)):
                    high[lane] = max(high[lane], of[lane])
            else:
                for lane in range(0, len(of), _SPREAD):
                    high[lane] = max(high[lane], (of[lane] + of[lane + 1]) + (of[lane + 2] + of[lane + 3]))
        at += count


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _choose(largest: Array, prior: Array, focus: int, count: int, spread: int, barred: Array, wanted: Array) -> None:
    """Which segments each query reads: ``barred`` (most, P) is added to logits of those that it does not.

    ``largest`` (threads, most, P) is what each thread noted; ``prior`` is the row's, one number a segment. ``wanted``
    (most,) are the segments that any of ``count`` queries reads.
    """
    many, lanes = len(prior), largest.shape[2]
    scores = np.empty((many, lanes), np.float32)
    last, where = np.empty(lanes, np.float32), np.empty(lanes, np.int32)
    for segment in range(many):
        for lane in range(lanes):
            high = largest[0, segment, lane]
            for thread in range(1, len(largest)):
                high = max(high, largest[thread, segment, lane])
            scores[segment, lane] = high + prior[segment]
    left = scores.copy()
    for _ in range(focus):  # the highest is taken away
        last[:] = left[0]
        where[:] = 0
        for segment in range(1, many):
            for lane in range(lanes):
                higher = left[segment, lane] > last[lane]
                last[lane] = left[segment, lane] if higher else last[lane]
                where[lane] = segment if higher else where[lane]
        for lane in range(lanes):
            left[where[lane], lane] = 4 * _NONE
    for segment in range(many):
        for lane in range(lanes):
            barred[segment, lane] = _ZERO if scores[segment, lane] >= last[lane] - _TIE else _NONE
        wanted[segment] = (barred[segment, : count * spread : spread] == _ZERO).any()


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _bar(runs: Array, barred: Array, logits: Array) -> None:
    """Take segments that a query does not read out of the runs' ``logits`` (WIDTH, P)."""
    at = 0
    for _, _, count, _, segment, _, _ in runs:
        bar = barred[segment]
        for slot in range(at, at + count):
            of = logits[slot]
            for lane in range(len(of)):
                of[lane] += bar[lane]
        at += count


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _joined(runs: Array, first: int) -> Any:
    """The run behind those that follow each other from the ``first`` on, and how many slots these have."""
    last, some = first + 1, runs[first, 2]
    while last < len(runs) and runs[last, 6] == runs[first, 6] + some:
        some += runs[last, 2]
        last += 1
    return last, some


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _look(runs: Array, some: int, spread: int, dim: int, asked: Array, keys: Array, logits: Array, ahead: bool) -> None:
    """``logits`` (WIDTH, P) of the runs' ``some`` keys; ``keys`` (WIDTH, D) is room, ``ahead`` as in `_ask_few`."""
    _begin(runs, spread, logits)
    if spread > 1:  # read once, so there is nothing to keep
        _ask_few(runs, asked, logits, ahead)
    else:
        _gather(runs, 0, dim, keys)
        _add_product(keys.ctypes.data, dim, 1, asked, logits, some, dim)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _take(
    runs: Array,
    some: int,
    spread: int,
    dim: int,
    logits: Array,
    values: Array,
    shrink: Array,
    top: Array,
    total: Array,
    read: Array,
) -> None:
    """Add to ``read`` the runs' ``some`` values by their ``logits`` (`_weigh_all`); ``values`` (WIDTH, D) is room."""
    _weigh_all(some, spread, logits, shrink, top, total, read)
    if spread > 1:
        _take_few(runs, logits, read)
    else:
        _gather(runs, 1, dim, values)
        filled = logits.shape[1]
        _add_product(logits.ctypes.data, 1, filled, values, read, filled, some)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _answer(call: Any, part: int, row: int, head: int, count: int, read: Array, total: Array) -> None:
    """Write what a part's ``count`` queries read to the result."""
    shape = (call.rows, call.tokens, call.heads * call.group, call.dim)
    out = _array(_pointer(call.out), shape, np.float32)
    for p in range(count):
        query, token = divmod(part * call.each + p, call.tokens)
        share = _ONE / total[p * call.spread]
        for d in range(call.dim):
            out[row, token, head * call.group + query, d] = read[p, d] * share


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _merge(
    spread: int, read: Array, top: Array, total: Array, other: Array, other_top: Array, other_total: Array
) -> None:
    """Add what another thread read to ``read`` (P / spread, D), ``top`` (P,) and ``total`` (P,)."""
    for p in range(len(read)):
        lane = p * spread
        high = max(top[lane], other_top[lane])
        mine, theirs = np.float32(np.exp(top[lane] - high)), np.float32(np.exp(other_top[lane] - high))
        top[lane], total[lane] = high, mine * total[lane] + theirs * other_total[lane]
        for d in range(read.shape[1]):
            read[p, d] = mine * read[p, d] + theirs * other[p, d]


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _held(call: Any, thread: int) -> Any:
    """What a thread read of the two parts of which others read too, its first and its last.

    ``read`` (2, P / spread, filled up D), ``top`` (2, P) and ``total`` (2, P).
    """
    filled, wide = call.filled, call.dim + -call.dim % _LANES
    numbers = _array(_pointer(call.scratch + 4 * thread * call.room), (2 * filled * (wide + 2),), np.float32)
    rest, read = numbers[: 4 * filled].reshape(2, 2, filled), numbers[4 * filled :]
    rows = filled // call.spread
    return read[: 2 * rows * wide].reshape(2, rows, wide), rest[0], rest[1]


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _attend(call: Any) -> None:
    """A thread's part of a call (see `Attend`)."""
    rows, heads, dim, filled, live, spread = call.rows, call.heads, call.dim, call.filled, call.live, call.spread
    begins = _array(_pointer(call.begins), (call.segments, heads + 1), np.int64)
    of_row = _array(_pointer(call.of_row), (1 if call.shared else rows,), np.int64)
    slots = _array(_pointer(call.slots), (len(of_row), heads), np.int64)
    many = _array(_pointer(call.many), (len(of_row),), np.int64)
    focus = _array(_pointer(call.focus), (len(of_row),), np.int64)
    prior = _array(_pointer(call.prior), (call.segments,), np.float32)
    size, thread, wide = team.size(), team.number(), dim + -dim % _LANES
    read, top, total = _held(call, thread)
    begin = 4 * (thread * call.room + 2 * filled * (wide + 2))
    scratch = _array(_pointer(call.scratch + begin), (WIDTH * (dim + wide + filled) + filled * (dim + 1),), np.float32)
    keys, scratch = scratch[: WIDTH * dim].reshape(WIDTH, dim), scratch[WIDTH * dim :]
    values, scratch = scratch[: WIDTH * wide].reshape(WIDTH, wide), scratch[WIDTH * wide :]
    logits, scratch = scratch[: WIDTH * filled].reshape(WIDTH, filled), scratch[WIDTH * filled :]
    asked, shrink = scratch[: dim // spread * filled].reshape(dim // spread, filled), scratch[dim * filled :]

    runs, cursor = np.empty((WIDTH, 7), np.int64), np.empty(3, np.int64)
    number = (call.group * call.tokens + call.each - 1) // call.each
    line = number * (rows * heads * live + slots.sum() * (rows // len(of_row)))
    begin, end = line * thread // size, line * (thread + 1) // size
    wanted = np.ones(call.most, np.uint8)
    if call.focused:
        largest = _array(_pointer(call.largest), (size, number * rows * heads, call.most, filled), np.float32)
        # products are taken up to a multiple of rows: each thread's begin so many further on, out of the others' way
        kept = _array(_pointer(call.kept), (line + _ROWS * size, filled), np.float32)
        barred = np.empty((call.most, filled), np.float32)
        largest[thread] = _NONE
        at = 0
        for place in range(number * rows * heads):
            part, row, head = place // (rows * heads), place // heads % rows, place % heads
            own = 0 if call.shared else row
            length = live + slots[own, head]
            if focus[own] and at < end and begin < at + length:
                _ask(call, part, row, head, asked)
                cursor[0], cursor[1], cursor[2] = of_row[own], live, of_row[own]
                for first in range(max(begin - at, live), min(end - at, length), WIDTH):
                    some = min(min(end - at, length) - first, WIDTH)
                    several, some = _find(call, begins, cursor, row, head, first, some, wanted, runs)
                    found, here = runs[:several], kept[at + first + _ROWS * thread :]
                    _look(found, some, spread, dim, asked, keys, here, False)
                    _note(found, spread, here, largest[thread, place])
            at += length
        team.wait()
    at = 0
    for place in range(number * rows * heads):
        part, row, head = place // (rows * heads), place // heads % rows, place % heads
        own = 0 if call.shared else row
        length = live + slots[own, head]
        if at < end and begin < at + length:
            held = 0 if at <= begin else 1
            count = _ask(call, part, row, head, asked)
            read[held] = _ZERO
            top[held] = _NONE
            total[held] = _ZERO
            cursor[0], cursor[1], cursor[2] = of_row[own], live, of_row[own]
            stop = live if focus[own] else length
            wanted[:] = 1
            for first in range(max(begin - at, 0), min(end - at, stop), WIDTH):
                some = min(min(end - at, stop) - first, WIDTH)
                several, some = _find(call, begins, cursor, row, head, first, some, wanted, runs)
                found = runs[:several]
                _look(found, some, spread, dim, asked, keys, logits, True)
                if call.mask and first < live:
                    _hide(call, part, row, first, count, logits)
                _take(found, some, spread, dim, logits, values, shrink, top[held], total[held], read[held])
            if focus[own]:
                of = slice(of_row[own], of_row[own] + many[own])
                _choose(largest[:, place], prior[of], focus[own], count, spread, barred, wanted)
                cursor[0], cursor[1], cursor[2] = of_row[own], live, of_row[own]
                for first in range(max(begin - at, live), min(end - at, length), WIDTH):
                    some = min(min(end - at, length) - first, WIDTH)
                    several, some = _find(call, begins, cursor, row, head, first, some, wanted, runs)
                    run = 0
                    while run < several:  # those that lie side by side together
                        after, some = _joined(runs[:several], run)
                        found, here = runs[run:after], kept[at + first + runs[run, 6] + _ROWS * thread :]
                        _bar(found, barred, here)
                        _take(found, some, spread, dim, here, values, shrink, top[held], total[held], read[held])
                        run = after
            if at >= begin and at + length <= end:
                _answer(call, part, row, head, count, read[held], total[held])
        at += length
    team.wait()
    at = 0
    for place in range(number * rows * heads):
        part, row, head = place // (rows * heads), place // heads % rows, place % heads
        length = live + slots[0 if call.shared else row, head]
        if begin <= at < end < at + length:  # begun here, and gone on with by others
            held = 0 if at == begin else 1
            for other in range(thread + 1, size):
                if line * other // size < min(at + length, line * (other + 1) // size):
                    others, other_top, other_total = _held(call, other)
                    _merge(call.spread, read[held], top[held], total[held], others[0], other_top[0], other_total[0])
            count = min(call.each, call.group * call.tokens - part * call.each)
            _answer(call, part, row, head, count, read[held], total[held])
        at += length


def _attend_at(address: Any) -> None:
    _attend(_array(address, (1,), _ATTEND)[0])


@cache
def prepare() -> team.Task:
    """The compiled function; some seconds the first time on a machine, and a fraction of one afterwards."""
    return team.Task(_attend_at)


def attend(call: Attend, threads: int) -> None:
    """Attention of queries over the live tokens and a layer's slots, by so many threads."""
    prepare()(call, threads)
