"""Attention over live tokens and ragged slots at once, compiled for the CPU by numba and kept beside this file.

A call is a record of addresses and sizes (`Attend`): it costs some microseconds, and the threads that take part in it
are those that torch keeps (`team`). Nothing is laid out beforehand: segments are read where they are, `WIDTH` tokens
or slots of a head at a time, which are made float32 in the processor's cache. Letters used for shapes: ``H`` KV heads,
``D`` head dimension, ``P`` queries of a part, filled up to `_LANES`.

All that is to be read lies, as it were, in one line: part after part of the queries, in it head after head (a place),
of each the live tokens and then the slots, segment after segment. Every thread reads a stretch of it, as long as the
others'. Where queries choose among segments, a place's slots are looked at, then their values are taken.

It is one file because numba compiles a function anew when its own file changes, and not when one that it calls does.
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
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from lloco_engine.decoder import team
from lloco_engine.decoder.focus import TIE

__all__ = ["Attend", "Desk", "furnish", "kept", "parts", "prepare", "runs"]

WIDTH = 64  # tokens or slots read at once: their keys, or values, and what is made of them stay in the first cache
_MOST = 48  # queries of a part, likewise

_CAN = torch.cpu.get_capabilities()
_WIDE = bool(_CAN.get("avx512_f", False))
_LANES = 16 if _WIDE else 8  # numbers that an operation takes
_ROWS = 8 if _WIDE else 4  # rows by twice `_LANES` columns are summed up in registers at once
_FEW = 4  # queries up to which each has `_SPREAD` lanes, which add up its products' parts: one would leave most idle
_SPREAD = 4
_PARTS = _FEW * _SPREAD
_COLUMNS = 4 if _WIDE else 2  # vectors of what few queries read, summed up in registers at once

_FIRST = np.arange(WIDTH)
# what is read is finite (`_find` makes it so), which lets sums and maxima be taken in any order
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "nogil": True, "cache": team.can_keep(), "fastmath": True}
_NONE_LOGIT = -1e30  # of what is not to be read; finite, so that differences are no NaN
_NONE = np.float32(_NONE_LOGIT)
_ZERO, _ONE = np.float32(0), np.float32(1)
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
_room: Any = cgutils.alloca_once


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
_VECTOR, _LANE_NUMBERS = ir.VectorType(_NUMBER, _LANES), ir.VectorType(ir.IntType(32), _LANES)


def _call(builder: Any, name: str, *vectors: Any) -> Any:
    """LLVM's function of vectors of this name."""
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * len(vectors))
    return builder.call(_function(builder.module, kind, f"llvm.{name}.v{_LANES}f32"), vectors)


def _all(number: float) -> Any:
    """A vector of one number."""
    return _VECTOR([number] * _LANES)


def _splat(builder: Any, number: Any) -> Any:
    """A vector of a number that is known only when it runs."""
    kind = ir.VectorType(number.type, _LANES)
    first = builder.insert_element(kind(ir.Undefined), number, ir.IntType(32)(0))
    return builder.shuffle_vector(first, first, _LANE_NUMBERS([0] * _LANES))


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


def _turned(builder: Any, vector: Any, by: int) -> Any:
    """A vector with the lanes changed for those whose number differs in one bit."""
    return builder.shuffle_vector(vector, vector, _LANE_NUMBERS([lane ^ by for lane in range(_LANES)]))


def _together(builder: Any, vector: Any, operate: Callable[..., Any]) -> Any:
    """What all lanes of a query have together, in each of them, where few queries take turns in a vector's lanes."""
    by = _FEW
    while by < _LANES:
        vector, by = operate(builder, vector, _turned(builder, vector, by)), 2 * by
    return vector


def _to_packed(context: Any, sums: Any, count: Any, out: Any) -> Any:
    """Add up the `_SPREAD` parts of few queries' products with ``count`` keys, and lay them side by side.

    That is from (count, `_PARTS`) to (count, `_FEW`), up to a whole vector, by addresses.
    """
    slots, vectors = _LANES // _FEW, _PARTS // _LANES

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, count, out = args
        with cgutils.for_range(builder, _vectors(builder, count)) as loop:
            packed = _all(0)
            for part in range(slots * vectors):
                index = builder.add(builder.mul(loop.index, _WORD(slots * vectors)), _WORD(part))
                vector = builder.load(_at(builder, sums, index, _WORD(_LANES)), align=4)
                for by in (1, 2):  # after both, all four lanes have their sum
                    vector = builder.fadd(vector, _turned(builder, vector, by))
                slot, first = part // vectors, part % vectors * _LANES // _SPREAD
                queries = range(first, first + _LANES // _SPREAD)
                taken = {slot * _FEW + query: _LANES + (query - first) * _SPREAD for query in queries}
                lanes = _LANE_NUMBERS([taken.get(lane, lane) for lane in range(_LANES)])
                packed = builder.shuffle_vector(packed, vector, lanes)
            builder.store(packed, _at(builder, out, loop.index, _WORD(_LANES)), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


def _vectors(builder: Any, count: Any) -> Any:
    """How many vectors so many slots' logits for few queries take."""
    slots = _LANES // _FEW
    return builder.sdiv(builder.add(count, _WORD(slots - 1)), _WORD(slots))


def _there(builder: Any, index: Any, count: Any) -> Any:
    """Which lanes of a vector of logits for few queries stand for any of ``count`` slots."""
    left = builder.sub(builder.mul(count, _WORD(_FEW)), builder.mul(index, _WORD(_LANES)))
    words = ir.VectorType(_WORD, _LANES)
    return builder.icmp_signed("<", words(list(range(_LANES))), _splat(builder, left))


def _to_highest(few: bool) -> Callable[..., Any]:
    """The highest of ``count`` slots' logits, and of ``before``, in each of `_LANES` lanes, to ``high``.

    A lane is a query; of ``few`` queries they take turns in a vector's lanes, slot by slot, and all lanes of one are
    given the same. The arguments are addresses, and how many numbers lie between vectors of logits.
    """

    def find(context: Any, logits: Any, row: Any, count: Any, before: Any, high: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            logits, row, count, *others = args
            before, high = (builder.inttoptr(address, _VECTOR.as_pointer()) for address in others)
            highest = _variable(builder, builder.load(before, align=4))
            with cgutils.for_range(builder, _vectors(builder, count) if few else count) as loop:
                logit = builder.load(_at(builder, logits, loop.index, row), align=4)
                if few:
                    logit = builder.select(_there(builder, loop.index, count), logit, _all(_NONE_LOGIT))
                builder.store(_higher(builder, logit, builder.load(highest)), highest)
            found = builder.load(highest)
            builder.store(_together(builder, found, _higher) if few else found, high, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return find


def _to_weights(few: bool) -> Callable[..., Any]:
    """Make ``count`` slots' logits the exponentials of them with ``added``, in each lane; no sum is above 0.

    Lanes and arguments are as for `_to_highest`. ``total`` becomes so much more.
    """

    def weigh(context: Any, logits: Any, row: Any, count: Any, added: Any, total: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            logits, row, count, *others = args
            added, total = (builder.inttoptr(address, _VECTOR.as_pointer()) for address in others)
            more, summed = builder.load(added, align=4), _variable(builder, _all(0))
            with cgutils.for_range(builder, _vectors(builder, count) if few else count) as loop:
                place = _at(builder, logits, loop.index, row)
                logit = builder.load(place, align=4)
                weight = _exponential(builder, builder.fadd(logit, more))
                kept = weight
                if few:  # behind the last slot others' logits may lie
                    there = _there(builder, loop.index, count)
                    weight, kept = builder.select(there, weight, _all(0)), builder.select(there, weight, logit)
                builder.store(kept, place, align=4)
                builder.store(builder.fadd(builder.load(summed), weight), summed)
            found = builder.load(summed)
            if few:
                found = _together(builder, found, lambda builder, a, b: builder.fadd(a, b))
            builder.store(builder.fadd(builder.load(total, align=4), found), total, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return weigh


def _rise(builder: Any, high: Any, top: Any, total: Any, shrink: Any) -> None:
    """Have ``high`` take the place of the highest logit so far, ``top``, and make ``total`` relative to it."""
    less = _exponential(builder, builder.fsub(builder.load(top, align=4), high))
    builder.store(high, top, align=4)
    builder.store(less, shrink, align=4)
    builder.store(builder.fmul(builder.load(total, align=4), less), total, align=4)


def _to_risen(context: Any, high: Any, top: Any, total: Any, shrink: Any, added: Any) -> Any:
    """`_rise`, by addresses; ``added``, which makes logits relative to ``high``, is found too."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        high, top, total, shrink, added = (builder.inttoptr(address, _VECTOR.as_pointer()) for address in args)
        highest = builder.load(high, align=4)
        _rise(builder, highest, top, total, shrink)
        builder.store(builder.fsub(_all(0), highest), added, align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


def _to_choice(
    context: Any,
    largest: Any,
    step: Any,
    threads: Any,
    many: Any,
    row: Any,
    prior: Any,
    focus: Any,
    scores: Any,
    left: Any,
    less: Any,
    top: Any,
    total: Any,
    shrink: Any,
) -> Any:
    """Each lane chooses ``focus`` of ``many`` segments: see `_choose`. All are addresses but these two, ``threads``,
    and the bytes between what two threads noted (``step``) and between two segments (``row``).

    ``top`` becomes the highest logit of all that is read, ``total`` relative to it, by ``shrink``.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        largest, step, threads, many, row, prior, focus, scores, left, less, *others = args
        top, total, shrink = (builder.inttoptr(address, _VECTOR.as_pointer()) for address in others)

        def place(begin: Any, index: Any, of: Any) -> Any:
            return builder.inttoptr(builder.add(begin, builder.mul(index, of)), _VECTOR.as_pointer())

        def get(begin: Any, index: Any, of: Any) -> Any:
            return builder.load(place(begin, index, of), align=4)

        with cgutils.for_range(builder, many) as loop:
            high = _variable(builder, _all(_NONE_LOGIT))
            with cgutils.for_range(builder, threads) as each:
                noted = get(builder.add(largest, builder.mul(each.index, step)), loop.index, row)
                builder.store(_higher(builder, noted, builder.load(high)), high)
            high = builder.load(high)
            more = builder.load(
                builder.inttoptr(builder.add(prior, builder.mul(loop.index, _WORD(4))), _NUMBER.as_pointer())
            )
            score = builder.fadd(high, _splat(builder, more))
            for begin, what in ((less, high), (scores, score), (left, score)):
                builder.store(what, place(begin, loop.index, row), align=4)
        last = _room(builder, _VECTOR)
        with cgutils.for_range(builder, focus):  # the highest is taken away
            builder.store(_all(8 * _NONE_LOGIT), last)
            best = _variable(builder, ir.VectorType(_WORD, _LANES)([0] * _LANES))
            with cgutils.for_range(builder, many) as loop:
                score, before = get(left, loop.index, row), builder.load(last)
                higher = builder.fcmp_ordered(">", score, before)
                builder.store(builder.select(higher, score, before), last)
                builder.store(builder.select(higher, _splat(builder, loop.index), builder.load(best)), best)
            with cgutils.for_range(builder, many) as loop:
                taken = builder.icmp_signed("==", _splat(builder, loop.index), builder.load(best))
                kept = builder.select(taken, _all(4 * _NONE_LOGIT), get(left, loop.index, row))
                builder.store(kept, place(left, loop.index, row), align=4)
        bound = builder.fsub(builder.load(last), _all(TIE))
        highest = _variable(builder, builder.load(top, align=4))
        with cgutils.for_range(builder, many) as loop:
            chosen = builder.fcmp_ordered(">=", get(scores, loop.index, row), bound)
            high = builder.select(chosen, get(less, loop.index, row), _all(_NONE_LOGIT))
            builder.store(_higher(builder, high, builder.load(highest)), highest)
        high = builder.load(highest)
        with cgutils.for_range(builder, many) as loop:
            chosen = builder.fcmp_ordered(">=", get(scores, loop.index, row), bound)
            added = builder.select(chosen, builder.fsub(_all(0), high), _all(_NONE_LOGIT))
            builder.store(added, place(less, loop.index, row), align=4)
        _rise(builder, high, top, total, shrink)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 13), generate


def _each(operate: Callable[..., Any], places: int) -> Callable[..., Any]:
    """Replace vectors by what ``operate`` makes of them, of those at a second address if any, and of a number."""

    def one(context: Any, out: Any, count: Any, number: Any) -> Any:
        return types.void(types.int64, types.int64, types.float32), generate

    def two(context: Any, out: Any, other: Any, count: Any, number: Any) -> Any:
        return types.void(types.int64, types.int64, types.int64, types.float32), generate

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        *begins, count, number = args
        number = _splat(builder, number)
        with cgutils.for_range(builder, count) as loop:
            at = [_at(builder, begin, loop.index, _WORD(_LANES)) for begin in begins]
            made = operate(builder, number, *(builder.load(place, align=4) for place in at))
            builder.store(made, at[0], align=4)
        return context.get_dummy_value()

    return one if places == 1 else two


def _sum_up(
    builder: Any,
    a: list[Any],
    a_column: Any,
    b: Any,
    b_row: Any,
    out: list[Any],
    depth: Any,
    vectors: int,
    spread: int = 1,
    of_a: Any = _NUMBER,
    of_b: Any = _NUMBER,
) -> None:
    """``out += a @ b`` of (rows, depth) and (depth, ``vectors * _LANES``), the sums in registers meanwhile.

    What is compiled from loops keeps the sums in memory, and takes twice as long. ``a`` and ``out`` are the addresses
    of their rows. With ``spread`` a row of ``b`` is for so many numbers of ``a`` side by side, one for every such lane
    in turn, and a step of the depth takes `_LANES` numbers of ``a``. ``of_a`` and ``of_b`` are the kinds of numbers.
    """
    taken = _LANES if spread > 1 else 1
    some, column, index = ir.VectorType(of_a, taken), ir.VectorType(of_b, _LANES), ir.VectorType(ir.IntType(32), _LANES)
    turns = [index([first + lane % spread for lane in range(_LANES)]) for first in range(0, taken, spread)]

    def row(begin: Any, kind: Any) -> list[Any]:
        return [_at(builder, begin, _WORD(v), _WORD(_LANES), kind) for v in range(vectors)]

    places = [place for begin in out for place in row(begin, _VECTOR)]
    sums = [_variable(builder, builder.load(place, align=4)) for place in places]
    with cgutils.for_range(builder, depth) as loop:
        factors = [_load(builder, _at(builder, begin, loop.index, a_column, some)) for begin in a]
        for turn, lanes in enumerate(turns):
            at = builder.add(builder.mul(loop.index, _WORD(len(turns))), _WORD(turn))
            begin = builder.ptrtoint(_at(builder, b, at, b_row, column), _WORD)
            columns = [_load(builder, place) for place in row(begin, column)]
            for r, numbers in enumerate(factors):
                factor = builder.shuffle_vector(numbers, numbers, lanes)
                for part, one in zip(sums[r * vectors : (r + 1) * vectors], columns, strict=True):
                    builder.store(_call(builder, "fma", factor, one, builder.load(part)), part)
    for place, part in zip(places, sums, strict=True):
        builder.store(builder.load(part), place, align=4)


def _tile(rows: int, vectors: int, spread: int = 1, of_a: Any = _NUMBER, of_b: Any = _NUMBER) -> Callable[..., Any]:
    """`_sum_up` of rows that follow each other, by addresses and how many numbers lie between rows, and columns."""

    def product(
        context: Any, a: Any, a_row: Any, a_column: Any, b: Any, b_row: Any, out: Any, out_row: Any, depth: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            a, a_row, a_column, b, b_row, out, out_row, depth = args
            of = [_row(builder, a, _WORD(r), a_row, of_a) for r in range(rows)]
            to = [_row(builder, out, _WORD(r), out_row, _NUMBER) for r in range(rows)]
            _sum_up(builder, of, a_column, b, b_row, to, depth, vectors, spread, of_a, of_b)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return product


def _tile_of_some(rows: int, vectors: int) -> Callable[..., Any]:
    """`_sum_up` of rows of ``a`` and ``out`` whose numbers (int64) lie at ``which``."""

    def product(
        context: Any,
        which: Any,
        a: Any,
        a_row: Any,
        a_column: Any,
        b: Any,
        b_row: Any,
        out: Any,
        out_row: Any,
        depth: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            which, a, a_row, a_column, b, b_row, out, out_row, depth = args
            first = builder.inttoptr(which, _WORD.as_pointer())
            numbers = [builder.load(builder.gep(first, [_WORD(r)])) for r in range(rows)]
            of = [_row(builder, a, number, a_row, _NUMBER) for number in numbers]
            to = [_row(builder, out, number, out_row, _NUMBER) for number in numbers]
            _sum_up(builder, of, a_column, b, b_row, to, depth, vectors)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), generate

    return product


def _row(builder: Any, begin: Any, number: Any, step: Any, kind: Any) -> Any:
    """Address of a row of numbers of a ``kind``, ``step`` of them behind the one before."""
    return builder.add(begin, builder.mul(builder.mul(number, step), _WORD(2 if kind == _HALF else 4)))


_single: Any = intrinsic(_to_single)
_pointer: Any = intrinsic(_to_pointer)
_fetch: Any = intrinsic(_to_fetch)
_weigh: Any = intrinsic(_to_weights(few=False))
_weigh_few: Any = intrinsic(_to_weights(few=True))
_rise_to: Any = intrinsic(_to_risen)
_pack: Any = intrinsic(_to_packed)
_choose_in_lanes: Any = intrinsic(_to_choice)
_fill: Any = intrinsic(_each(lambda builder, number, old: number, 1))
_times: Any = intrinsic(_each(lambda builder, number, old: builder.fmul(old, number), 1))
_add_times: Any = intrinsic(_each(lambda builder, number, old, other: _call(builder, "fma", other, number, old), 2))
_highest: Any = intrinsic(_to_highest(few=False))
_highest_few: Any = intrinsic(_to_highest(few=True))
_tile_of_one: Any = intrinsic(_tile_of_some(_ROWS, 1))
_tile_of_two: Any = intrinsic(_tile_of_some(_ROWS, 2))
_dots_single: Any = intrinsic(_tile(_ROWS, _PARTS // _LANES, _SPREAD))
_dots_half: Any = intrinsic(_tile(_ROWS, _PARTS // _LANES, _SPREAD, of_a=_HALF))
_dots_of_one_single: Any = intrinsic(_tile(1, _PARTS // _LANES, _SPREAD))
_dots_of_one_half: Any = intrinsic(_tile(1, _PARTS // _LANES, _SPREAD, of_a=_HALF))
_sums_single: Any = intrinsic(_tile(_FEW, _COLUMNS))
_sums_half: Any = intrinsic(_tile(_FEW, _COLUMNS, of_b=_HALF))
_array: Any = numba.carray  # type: ignore[attr-defined]


# -- one block --------------------------------------------------------------------------------------------------


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _add_product(
    which: int, some: int, a: int, a_row: int, a_column: int, b: int, out: int, columns: int, depth: int
) -> None:
    """``out[which] += a[which] @ b``: ``out`` and ``b`` have so many ``columns``, ``a`` and ``b`` so much ``depth``.

    All are given by their addresses. ``which`` are ``some`` numbers of rows, up to a multiple of `_ROWS`.
    """
    for rows in range(which, which + 8 * some, 8 * _ROWS):
        for column in range(0, columns - _LANES, 2 * _LANES):
            _tile_of_two(rows, a, a_row, a_column, b + 4 * column, columns, out + 4 * column, columns, depth)
        if columns % (2 * _LANES):
            last = 4 * (columns - _LANES)
            _tile_of_one(rows, a, a_row, a_column, b + last, columns, out + last, columns, depth)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _runs(desk: Any) -> Any:
    return _array(_pointer(desk.runs), (WIDTH, 7), np.int64)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _ask_few(call: Any, desk: Any, several: int) -> None:
    """Add to the desk's ``sums`` the products of runs' keys, where they are, with few queries.

    The values of what is not chosen from are brought nearer meanwhile.
    """
    runs, sums, asked, dim = _runs(desk), desk.sums, desk.asked, call.dim
    for run in range(several):
        keys, beside, count, half = runs[run, 0], runs[run, 1] - runs[run, 0], runs[run, 2], runs[run, 3]
        size = (2 if half else 4) * dim
        for slot in range(0, count, _ROWS):
            at = keys + slot * size
            for line in range(at + WIDTH * size, at + (WIDTH + _ROWS) * size, 64):
                _fetch(line)
                if runs[run, 4] < 0 or not call.focused:
                    _fetch(line + beside)
            if count - slot < _ROWS:
                for _ in range(slot, count):
                    if half:
                        _dots_of_one_half(at, dim, _LANES, asked, _PARTS, sums, _PARTS, dim // _LANES)
                    else:
                        _dots_of_one_single(at, dim, _LANES, asked, _PARTS, sums, _PARTS, dim // _LANES)
                    at, sums = at + size, sums + 4 * _PARTS
            else:
                if half:
                    _dots_half(at, dim, _LANES, asked, _PARTS, sums, _PARTS, dim // _LANES)
                else:
                    _dots_single(at, dim, _LANES, asked, _PARTS, sums, _PARTS, dim // _LANES)
                sums += 4 * _ROWS * _PARTS


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _take_few(call: Any, desk: Any, first: int, last: int, logits: int, read: int) -> None:
    """Add the values of runs, where they are, times the weights of few queries, ``logits``, to ``read``."""
    runs, dim = _runs(desk), call.dim
    for run in range(first, last):
        values, count, half = runs[run, 1], runs[run, 2], runs[run, 3]
        for column in range(0, dim, _COLUMNS * _LANES):
            if half:
                _sums_half(logits, 1, _FEW, values + 2 * column, dim, read + 4 * column, dim, count)
            else:
                _sums_single(logits, 1, _FEW, values + 4 * column, dim, read + 4 * column, dim, count)
        logits += 4 * count * _FEW


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _gather(desk: Any, several: int, which: int, dim: int, out: int, wide: int) -> None:
    """Copy runs' keys (``which`` 0) or values (1) to ``out`` (WIDTH, ``wide``), as float32."""
    runs, to, at = _runs(desk), _array(_pointer(out), (WIDTH, wide), np.float32), 0
    for run in range(several):
        begin, count = runs[run, which], runs[run, 2]
        if runs[run, 3]:
            half = _array(_pointer(begin), (count, dim), np.uint16)
            for slot in range(count):
                for line in range(2 * dim * (slot + WIDTH), 2 * dim * (slot + WIDTH + 1), 64):
                    _fetch(begin + line)
                for d in range(dim):
                    to[at + slot, d] = _single(half[slot, d])
        else:
            to[at : at + count, :dim] = _array(_pointer(begin), (count, dim), np.float32)
        at += count


# -- calls ------------------------------------------------------------------------------------------------------


class Attend(ctypes.Structure):
    """A call of the kernel: addresses and sizes, of a layer.

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
    `lloco_engine.decoder.focus`). ``largest``: room for (threads, places, most, P) float32; ``kept``: for `kept`
    numbers.

    ``each`` and ``filled``: queries of a part, and lanes that they fill (P). ``few`` is 1 where they take turns in a
    vector's lanes. ``step``: how many logits a token or slot has (W): P, or `_FEW`. ``wide``: D filled up with lanes.
    ``places``: parts * rows * H. ``desks``: a `Desk` for each thread.
    """

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("q", "q_row", "q_head", "q_token", "out")),
        *((name, ctypes.c_int64) for name in ("live_keys", "live_values", "live_row", "live_head", "mask", "mask_row")),
        *((name, ctypes.c_int64) for name in ("tensors", "begins", "of_row", "slots", "segments", "shared", "half")),
        *((name, ctypes.c_int64) for name in ("focused", "many", "most", "focus", "prior", "largest", "kept")),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "group", "tokens", "live", "dim")),
        *((name, ctypes.c_int64) for name in ("each", "filled", "few", "step", "wide", "places", "desks")),
        ("scale", ctypes.c_double),
    )


class Desk(ctypes.Structure):
    """Addresses of a thread's room.

    ``read`` (2, W, wide), ``top`` and ``total`` (2, P): what was read of the two places of which other threads read
    too, the first and the last, what the highest logit was and how much the weights add up to. ``asked`` (D, P): a
    part's queries, 0 where there are none; or (D / `_SPREAD`, `_PARTS`). ``keys`` (WIDTH, D), ``values`` (WIDTH, wide),
    ``logits`` (WIDTH, W) and ``sums`` (WIDTH, `_PARTS`) of what is read at once; ``shrink`` (P,) as in `_rise`.
    ``scores``, ``left`` and ``less`` (most, P), ``wanted`` (most,) and ``readers`` (most, P + 1): see `_choose`.
    ``runs`` (WIDTH, 7): see `_find`. ``starts`` (places + 1,): where each place begins in the line.

    ``chosen`` says whether `_find` leaves out what is not wanted, ``segment``, ``at`` and ``begun`` where it is.
    """

    NUMBERS = ("read", "top", "total", "asked", "keys", "values", "logits", "sums", "shrink", "scores", "left", "less")
    WHOLE = ("wanted", "readers", "runs", "starts")
    _fields_ = tuple((name, ctypes.c_int64) for name in (*NUMBERS, *WHOLE, "chosen", "segment", "at", "begun"))


_ATTEND, _DESK = np.dtype(Attend), np.dtype(Desk)
_DESK_BYTES = _DESK.itemsize


def parts(queries: int, dim: int) -> tuple[int, int, int, int]:
    """See `Attend`: ``each``, ``filled``, ``few`` and ``step``."""
    if queries <= _FEW and dim % (_COLUMNS * _LANES) == 0:
        return queries, _LANES, 1, _FEW
    each = -(-queries // -(-queries // _MOST))
    filled = each + -each % _LANES
    return each, filled, 0, filled


def kept(line: int, places: int, threads: int, step: int) -> int:
    """Numbers of float32 that the logits of so many tokens and slots take (see `Attend`)."""
    return step * (line + _ROWS * (places + threads))


def furnish(call: Attend, threads: int) -> object:
    """Give a call whose sizes are known its desks; what is returned must be held as long as it is made."""
    call.wide = call.dim + -call.dim % _LANES
    filled, most = call.filled, call.most
    block = WIDTH * call.dim, WIDTH * call.wide, WIDTH * call.step, WIDTH * _PARTS
    numbers = 2 * call.step * call.wide, 2 * filled, 2 * filled, call.dim * filled, *block, filled, *3 * [most * filled]
    whole = most, most * (filled + 1), 7 * WIDTH, call.places + 1
    desks, held = (Desk * threads)(), []
    for desk in desks:
        for names, sizes, dtype in ((Desk.NUMBERS, numbers, torch.float32), (Desk.WHOLE, whole, torch.int64)):
            line = 64 // dtype.itemsize  # of the cache: torch begins a tensor with one, and each array has its own
            begins = np.cumsum([0, *(size + -size % line for size in sizes)])
            held.append(torch.zeros(int(begins[-1]), dtype=dtype))
            for name, begin in zip(names, begins[:-1], strict=True):
                setattr(desk, name, held[-1].data_ptr() + int(begin) * dtype.itemsize)
    call.desks = ctypes.addressof(desks)
    return desks, held


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _desk(call: Any, thread: int) -> Any:
    return _array(_pointer(call.desks + thread * _DESK_BYTES), (1,), _DESK)[0]


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _whole(address: int, place: int) -> Any:
    """The whole number of an array at an address."""
    return _array(_pointer(address + 8 * place), (1,), np.int64)[0]


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _where(call: Any, place: int) -> Any:
    """A place's part, row and head, and where the numbers of its row are."""
    rest, head = divmod(place, call.heads)
    part, row = divmod(rest, call.rows)
    return part, row, head, 0 if call.shared else row


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _count(call: Any, part: int) -> Any:
    """How many queries a part has."""
    return min(call.each, call.group * call.tokens - part * call.each)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _ask(call: Any, desk: Any, place: int) -> None:
    """Lay out the queries of a place's part."""
    part, row, head, _ = _where(call, place)
    first, scale, filled, dim = part * call.each, np.float32(call.scale), call.filled, call.dim
    asked = _array(_pointer(desk.asked), (dim, filled), np.float32)
    spread = _array(_pointer(desk.asked), (dim // _SPREAD, _PARTS), np.float32)
    _fill(desk.asked, dim * (_FEW if call.few else filled) // _LANES, _ZERO)
    for p in range(_count(call, part)):
        query, token = divmod(first + p, call.tokens)
        at = row * call.q_row + (head * call.group + query) * call.q_head + token * call.q_token
        q = _array(_pointer(call.q + 4 * at), (dim,), np.float32)
        if call.few:
            for d in range(dim // _SPREAD):
                for lane in range(_SPREAD):
                    spread[d, p * _SPREAD + lane] = q[d * _SPREAD + lane] * scale
        else:
            for d in range(dim):
                asked[d, p] = q[d] * scale


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _restart(call: Any, desk: Any, own: int, chosen: int) -> None:
    """Have `_find` begin with a row's first segment."""
    desk.chosen = chosen
    desk.begun = _whole(call.of_row, own)
    desk.segment = desk.begun
    desk.at = call.live


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _find(call: Any, desk: Any, row: int, head: int, first: int, count: int) -> Any:
    """Where ``count`` of a head's live tokens and slots from ``first`` on lie, as the desk's runs.

    Calls go on from the one before. Where only ``chosen`` segments count, those that are not wanted are left out. A run
    is the addresses of its keys and values, how many they are, whether they are in half precision, the number of the
    segment in its row (-1: live tokens), the address of its biases (0: none), and how far behind ``first`` it begins.

    Returns:
        how many runs there are, and how many tokens and slots in them.
    """
    dim, live, number, total, runs = call.dim, call.live, 0, 0, _runs(desk)
    if first < live:
        at = 4 * (row * call.live_row + head * call.live_head + first * dim)
        total = min(count, live - first)
        runs[0, 0], runs[0, 1], runs[0, 2] = call.live_keys + at, call.live_values + at, total
        runs[0, 3], runs[0, 4], runs[0, 5], runs[0, 6] = 0, -1, 0, 0
        number = 1
    size, segment, at = dim * (2 if call.half else 4), desk.segment, desk.at
    while at < first + count and segment < call.segments:
        begins = call.begins + 8 * (segment * (call.heads + 1) + head)
        begin = _whole(begins, 0)
        after = at + _whole(begins, 1) - begin
        low, high = max(first, at), min(first + count, after)
        if low < high and not (desk.chosen and _whole(desk.wanted, segment - desk.begun) == 0):
            slot, run, tensors = begin + low - at, runs[number], call.tensors + 24 * segment
            run[0], run[1] = _whole(tensors, 0) + slot * size, _whole(tensors, 1) + slot * size
            run[2], run[3], run[4] = high - low, call.half, segment - desk.begun
            run[5], run[6] = _whole(tensors, 2) + 4 * slot, low - first
            number, total = number + 1, total + high - low
        if after > first + count:
            break
        segment, at = segment + 1, after
    desk.segment, desk.at = segment, at
    return number, total


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _begin(call: Any, desk: Any, several: int, logits: int, columns: int, share: float) -> None:
    """Begin ``logits`` (WIDTH, ``columns``) with a ``share`` of the runs' biases."""
    runs = _runs(desk)
    for run in range(several):
        count, biases = runs[run, 2], runs[run, 5]
        if biases:
            bias = _array(_pointer(biases), (count,), np.float32)
            for place in range(count):
                _fill(logits + 4 * place * columns, columns // _LANES, max(bias[place], _NONE) * share)
        else:
            _fill(logits, count * columns // _LANES, _ZERO)
        logits += 4 * count * columns


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _hide(call: Any, desk: Any, part: int, row: int, first: int) -> None:
    """Add the mask of the live tokens from ``first`` on to the logits of a part's queries."""
    mask = _array(_pointer(call.mask + 4 * row * call.mask_row), (call.tokens, call.live), np.float32)
    logits, count = _array(_pointer(desk.logits), (WIDTH, call.step), np.float32), _count(call, part)
    for s in range(min(call.live - first, WIDTH)):
        for p in range(count):
            logits[s, p] += max(mask[(part * call.each + p) % call.tokens, first + s], _NONE)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _look(call: Any, desk: Any, several: int, some: int, logits: int) -> None:
    """``logits`` (WIDTH, W) of the runs' ``some`` keys."""
    if call.few:  # read once, so there is nothing to keep
        _begin(call, desk, several, desk.sums, np.int64(_PARTS), _ONE / np.float32(_SPREAD))
        _ask_few(call, desk, several)
        _pack(desk.sums, some, logits)
    else:
        dim = call.dim
        _begin(call, desk, several, logits, call.filled, _ONE)
        _gather(desk, several, np.int64(0), dim, desk.keys, dim)
        _add_product(
            np.int64(_FIRST.ctypes.data), some, desk.keys, dim, np.int64(1), desk.asked, logits, call.filled, dim
        )


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _take(call: Any, desk: Any, several: int, some: int, held: int) -> None:
    """Read the runs' ``some`` values by the desk's logits, of which the highest becomes known along the way.

    What was read before becomes relative to it (Milakov and Gimelshein 2018).
    """
    filled, logits = call.filled, desk.logits
    read, top, total = _held(call, desk, held)
    for lane in range(0, 4 * filled, 4 * _LANES):
        high, less = desk.scores + lane, desk.less + lane
        _highest_of(call, logits + lane, some, top + lane, high)
        _rise_to(high, top + lane, total + lane, desk.shrink + lane, less)
        _weigh_by(call, logits + lane, some, less, total + lane)
    _shrink(call, desk, read)
    if call.few:
        _take_few(call, desk, np.int64(0), several, logits, read)
    else:
        _gather(desk, several, np.int64(1), call.dim, desk.values, call.wide)
        _add_product(
            np.int64(_FIRST.ctypes.data), filled, logits, np.int64(1), filled, desk.values, read, call.wide, some
        )


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _highest_of(call: Any, logits: int, count: int, before: int, high: int) -> None:
    """See `_to_highest`."""
    if call.few:
        _highest_few(logits, _LANES, count, before, high)
    else:
        _highest(logits, call.filled, count, before, high)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _weigh_by(call: Any, logits: int, count: int, added: int, total: int) -> None:
    """See `_to_weights`."""
    if call.few:
        _weigh_few(logits, _LANES, count, added, total)
    else:
        _weigh(logits, call.filled, count, added, total)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _held(call: Any, desk: Any, held: int) -> Any:
    """Where what was read of a place that others read too is, the highest logit and the sum of the weights."""
    lanes = 4 * held * call.filled
    return desk.read + 4 * held * call.step * call.wide, desk.top + lanes, desk.total + lanes


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _shrink(call: Any, desk: Any, read: int) -> None:
    """Make what was read so far relative to a higher logit, by the desk's ``shrink``."""
    shrink = _array(_pointer(desk.shrink), (call.filled,), np.float32)
    for p in range(call.step):
        if shrink[p] != _ONE:
            _times(read + 4 * p * call.wide, call.wide // _LANES, shrink[p])


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _note(call: Any, desk: Any, several: int, logits: int, largest: int) -> None:
    """Note the largest of the runs' ``logits`` (WIDTH, W) by segment and query, ``largest`` (most, P)."""
    runs, row = _runs(desk), 4 * call.filled
    for run in range(several):
        count, high = runs[run, 2], largest + row * runs[run, 4]
        for lane in range(0, row, 4 * _LANES):
            _highest_of(call, logits + lane, count, high + lane, high + lane)
        logits += 4 * count * call.step


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _choose(call: Any, desk: Any, place: int, held: int, largest: int, threads: int) -> None:
    """Have a place's queries choose segments by what so many threads noted, ``largest`` (threads, places, most, P).

    Of the desk, ``wanted`` are the segments that any query reads; ``less`` is to be added to their logits, which makes
    them relative to the highest of all that a query reads, and bars those that it does not; ``readers`` are a segment's
    queries, filled up with others to a multiple of `_ROWS`, and behind them, in the last place, how many that makes.
    """
    part, _, _, own = _where(call, place)
    filled, many = call.filled, _whole(call.many, own)
    read, top, total = _held(call, desk, held)
    prior = call.prior + 4 * _whole(call.of_row, own)
    step = 4 * call.places * call.most * filled
    for lane in range(0, 4 * filled, 4 * _LANES):
        _choose_in_lanes(
            largest + lane,
            step,
            threads,
            many,
            4 * filled,
            prior,
            _whole(call.focus, own),
            desk.scores + lane,
            desk.left + lane,
            desk.less + lane,
            top + lane,
            total + lane,
            desk.shrink + lane,
        )
    _shrink(call, desk, read)
    wanted, count = _array(_pointer(desk.wanted), (many,), np.int64), _count(call, part)
    less = _array(_pointer(desk.less), (many, filled), np.float32)
    readers = _array(_pointer(desk.readers), (many, filled + 1), np.int64)
    for segment in range(many):
        number = 0
        for p in range(count):
            if less[segment, p] != _NONE:
                readers[segment, number] = p
                number += 1
        wanted[segment] = number
        if not call.few:
            for p in range(filled):
                if number % _ROWS and (p >= count or less[segment, p] == _NONE):
                    readers[segment, number] = p
                    number += 1
        readers[segment, filled] = number


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _take_chosen(call: Any, desk: Any, several: int, logits: int, held: int) -> None:
    """Read the values of the runs by their ``logits`` (.., W), for the queries that chose their segments."""
    runs, filled, row = _runs(desk), call.filled, 0
    read, _, total = _held(call, desk, held)
    if call.few:  # brought nearer while their weights are made
        for run in range(several):
            for line in range(0, (2 if runs[run, 3] else 4) * runs[run, 2] * call.dim, 64):
                _fetch(runs[run, 1] + line)
    else:
        _gather(desk, several, np.int64(1), call.dim, desk.values, call.wide)
    for run in range(several):
        count, segment, here = runs[run, 2], runs[run, 4], logits + 4 * call.step * runs[run, 6]
        for lane in range(0, 4 * filled, 4 * _LANES):
            _weigh_by(call, here + lane, count, desk.less + 4 * segment * filled + lane, total + lane)
        if call.few:
            _take_few(call, desk, run, run + 1, here, read)
        else:
            which = desk.readers + 8 * segment * (filled + 1)
            values = desk.values + 4 * row * call.wide
            _add_product(which, _whole(which, filled), here, np.int64(1), filled, values, read, call.wide, count)
        row += count


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _answer(call: Any, desk: Any, place: int, held: int) -> None:
    """Write what a place's queries read to the result."""
    part, row, head, _ = _where(call, place)
    at_read, _, at_total = _held(call, desk, held)
    total = _array(_pointer(at_total), (call.filled,), np.float32)
    for p in range(_count(call, part)):
        query, token = divmod(part * call.each + p, call.tokens)
        share, query = _ONE / total[p], head * call.group + query
        read = _array(_pointer(at_read + 4 * p * call.wide), (call.dim,), np.float32)
        at = ((row * call.tokens + token) * call.heads * call.group + query) * call.dim
        out = _array(_pointer(call.out + 4 * at), (call.dim,), np.float32)
        for d in range(call.dim):
            out[d] = read[d] * share


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _merge(call: Any, desk: Any, held: int, other: Any) -> None:
    """Add what another thread read of a place that it came to first."""
    filled, wide = call.filled, call.wide
    at_read, at_top, at_total = _held(call, desk, held)
    top, total = _array(_pointer(at_top), (filled,), np.float32), _array(_pointer(at_total), (filled,), np.float32)
    other_top = _array(_pointer(other.top), (filled,), np.float32)
    other_total = _array(_pointer(other.total), (filled,), np.float32)
    for p in range(call.step):
        high = max(top[p], other_top[p])
        mine, theirs = np.float32(np.exp(top[p] - high)), np.float32(np.exp(other_top[p] - high))
        top[p], total[p] = high, mine * total[p] + theirs * other_total[p]
        at = 4 * p * wide
        _times(at_read + at, wide // _LANES, mine)
        _add_times(at_read + at, other.read + at, wide // _LANES, theirs)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _look_at_all(call: Any, desk: Any, place: int, begin: int, end: int, largest: int, logits: int) -> None:
    """Keep the ``logits`` of a place's slots that lie from ``begin`` to ``end`` in the line, and note the largest."""
    _, row, head, own = _where(call, place)
    at = _whole(desk.starts, place)
    stop = min(end, _whole(desk.starts, place + 1)) - at
    _restart(call, desk, own, np.int64(0))
    for first in range(max(begin - at, call.live), stop, WIDTH):
        several, some = _find(call, desk, row, head, first, min(stop - first, WIDTH))
        here = logits + 4 * first * call.step
        _look(call, desk, several, some, here)
        _note(call, desk, several, here, largest)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _take_all(call: Any, desk: Any, place: int, begin: int, end: int, held: int) -> None:
    """Read what of a place lies from ``begin`` to ``end`` in the line: where queries choose, only the live tokens."""
    part, row, head, own = _where(call, place)
    at, live = _whole(desk.starts, place), call.live
    stop = min(end - at, live if _whole(call.focus, own) else _whole(desk.starts, place + 1) - at)
    read, top, total = _held(call, desk, held)
    _fill(read, call.step * call.wide // _LANES, _ZERO)
    _fill(top, call.filled // _LANES, _NONE)
    _fill(total, call.filled // _LANES, _ZERO)
    _restart(call, desk, own, np.int64(0))
    for first in range(max(begin - at, 0), stop, WIDTH):
        several, some = _find(call, desk, row, head, first, min(stop - first, WIDTH))
        _look(call, desk, several, some, desk.logits)
        if call.mask and first < live:
            _hide(call, desk, part, row, first)
        _take(call, desk, several, some, held)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _take_all_chosen(
    call: Any, desk: Any, place: int, begin: int, end: int, held: int, largest: int, threads: int, logits: int
) -> None:
    """Have a place's queries choose, and read what they chose of the slots that lie from ``begin`` to ``end``."""
    _, row, head, own = _where(call, place)
    at = _whole(desk.starts, place)
    stop = min(end, _whole(desk.starts, place + 1)) - at
    _choose(call, desk, place, held, largest, threads)
    _restart(call, desk, own, np.int64(1))
    for first in range(max(begin - at, call.live), stop, WIDTH):
        several, _ = _find(call, desk, row, head, first, min(stop - first, WIDTH))
        _take_chosen(call, desk, several, logits + 4 * first * call.step, held)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _line(call: Any, desk: Any) -> Any:
    """Note where each place begins in the line, and return how long it is."""
    starts, at = _array(_pointer(desk.starts), (call.places + 1,), np.int64), 0
    for place in range(call.places):
        _, _, head, own = _where(call, place)
        starts[place] = at
        at += call.live + _whole(call.slots, own * call.heads + head)
    starts[call.places] = at
    return at


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _attend(call: Any) -> None:
    """A thread's part of a call (see `Attend`)."""
    size, thread = team.size(), team.number()
    desk = _desk(call, thread)
    line = _line(call, desk)
    begin, end = line * thread // size, line * (thread + 1) // size
    noted = 4 * call.most * call.filled  # of a place
    own = call.largest + thread * call.places * noted
    if call.focused:
        _fill(own, call.places * noted // (4 * _LANES), _NONE)
    # First what others wait for: of a place that several share, all must have looked before anyone may take. What is
    # a thread's own is done meanwhile.
    for turn in range(3):
        if turn == 2 and call.focused:
            team.wait()
        for place in range(call.places):
            at, after = _whole(desk.starts, place), _whole(desk.starts, place + 1)
            alone, chooses = at >= begin and after <= end, _whole(call.focus, _where(call, place)[3]) > 0
            if at >= end or after <= begin or (turn == 1) != alone or (turn == 0 and not chooses):
                continue
            held = 0 if alone or at <= begin else 1
            # products are taken up to a multiple of rows: each begins so many further on, out of the others' way
            logits = call.kept + 4 * (at + _ROWS * (place + thread)) * call.step
            _ask(call, desk, place)
            if chooses and turn < 2:
                _look_at_all(call, desk, place, begin, end, own + place * noted, logits)
            if turn > 0:
                _take_all(call, desk, place, begin, end, held)
                if chooses:
                    largest = (own if alone else call.largest) + place * noted
                    _take_all_chosen(call, desk, place, begin, end, held, largest, 1 if alone else size, logits)
            if alone:
                _answer(call, desk, place, held)
    team.wait()
    for place in range(call.places):
        at, after = _whole(desk.starts, place), _whole(desk.starts, place + 1)
        if begin <= at < end < after:  # begun here, and gone on with by others
            held = 0 if at == begin else 1
            for other in range(thread + 1, size):
                if line * other // size < min(after, line * (other + 1) // size):
                    _merge(call, desk, held, _desk(call, other))
            _answer(call, desk, place, held)


def _attend_at(address: Any) -> None:
    _attend(_array(address, (1,), _ATTEND)[0])


@cache
def prepare() -> team.Task:
    """Attention of queries over the live tokens and a layer's slots: the task of an `Attend`.

    It is compiled here: some seconds the first time on a machine, and a fraction of one afterwards.
    """
    return team.Task(_attend_at)
