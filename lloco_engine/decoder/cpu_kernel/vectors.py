"""Operations on vectors of float32 that numba has no words for, in LLVM's own terms, for the functions of `kernel`.

All take addresses (int64), and what they add up or compare stays in registers meanwhile. Logits lie slot by slot. Where
there are many queries a slot has a vector or several of them, one lane a query; of up to `FEW` queries the slots take
turns in a vector's lanes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lloco_engine import processor
from lloco_engine.decoder.slots import TIE

__all__ = [
    "COLUMNS",
    "FEW",
    "LANES",
    "NO_LOGIT",
    "PARTS",
    "ROWS",
    "SPREAD",
    "add_times",
    "choose",
    "dots_half",
    "dots_of_one_half",
    "dots_of_one_single",
    "dots_single",
    "fetch",
    "fill",
    "highest",
    "highest_few",
    "pack",
    "pointer",
    "rise",
    "sums_half",
    "sums_single",
    "tile_of_one",
    "tile_of_two",
    "times",
    "to_single",
    "weigh",
    "weigh_few",
]

_WIDE = processor.has("avx512f")
LANES = 16 if _WIDE else 8  # numbers that an operation takes
ROWS = 8 if _WIDE else 4  # rows by twice `LANES` columns are summed up in registers at once
FEW = 4  # queries up to which each has `SPREAD` lanes, which add up its products' parts: one would leave most idle
SPREAD = 4
PARTS = FEW * SPREAD
COLUMNS = 4 if _WIDE else 2  # vectors of what few queries read, summed up in registers at once
NO_LOGIT = -1e30  # logit of what is not to be read; finite, so that differences are no NaN

_LEAST = -126.0  # 2**-126 is float32's smallest
# Taylor's series of 2**f: up to f = 1/2 it leaves out about 1e-7, what float32 rounds off
_SERIES = [math.log(2) ** n / math.factorial(n) for n in range(7)]


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
_VECTOR, _LANE_NUMBERS = ir.VectorType(_NUMBER, LANES), ir.VectorType(ir.IntType(32), LANES)


def _call(builder: Any, name: str, *vectors: Any) -> Any:
    """LLVM's function of vectors of this name."""
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * len(vectors))
    return builder.call(_function(builder.module, kind, f"llvm.{name}.v{LANES}f32"), vectors)


def _all(number: float) -> Any:
    """A vector of one number."""
    return _VECTOR([number] * LANES)


def _splat(builder: Any, number: Any) -> Any:
    """A vector of a number that is known only when it runs."""
    kind = ir.VectorType(number.type, LANES)
    first = builder.insert_element(kind(ir.Undefined), number, ir.IntType(32)(0))
    return builder.shuffle_vector(first, first, _LANE_NUMBERS([0] * LANES))


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
    integers = ir.VectorType(ir.IntType(32), LANES)
    bits = builder.add(builder.fptosi(whole, integers), integers([127] * LANES))
    return builder.fmul(made, builder.bitcast(builder.shl(bits, integers([23] * LANES)), _VECTOR))


def _turned(builder: Any, vector: Any, by: int) -> Any:
    """A vector with the lanes changed for those whose number differs in one bit."""
    return builder.shuffle_vector(vector, vector, _LANE_NUMBERS([lane ^ by for lane in range(LANES)]))


def _together(builder: Any, vector: Any, operate: Callable[..., Any]) -> Any:
    """What all lanes of a query have together, in each of them, where few queries take turns in a vector's lanes."""
    by = FEW
    while by < LANES:
        vector, by = operate(builder, vector, _turned(builder, vector, by)), 2 * by
    return vector


def _to_packed(context: Any, sums: Any, count: Any, out: Any) -> Any:
    """Add up the `SPREAD` parts of few queries' products with ``count`` keys, and lay them side by side.

    That is from (count, `PARTS`) to (count, `FEW`), up to a whole vector, by addresses.
    """
    slots, vectors = LANES // FEW, PARTS // LANES

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, count, out = args
        with cgutils.for_range(builder, _vectors(builder, count)) as loop:
            packed = _all(0)
            for part in range(slots * vectors):
                index = builder.add(builder.mul(loop.index, _WORD(slots * vectors)), _WORD(part))
                vector = builder.load(_at(builder, sums, index, _WORD(LANES)), align=4)
                for by in (1, 2):  # after both, all four lanes have their sum
                    vector = builder.fadd(vector, _turned(builder, vector, by))
                slot, first = part // vectors, part % vectors * LANES // SPREAD
                queries = range(first, first + LANES // SPREAD)
                taken = {slot * FEW + query: LANES + (query - first) * SPREAD for query in queries}
                lanes = _LANE_NUMBERS([taken.get(lane, lane) for lane in range(LANES)])
                packed = builder.shuffle_vector(packed, vector, lanes)
            builder.store(packed, _at(builder, out, loop.index, _WORD(LANES)), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


def _vectors(builder: Any, count: Any) -> Any:
    """How many vectors so many slots' logits for few queries take."""
    slots = LANES // FEW
    return builder.sdiv(builder.add(count, _WORD(slots - 1)), _WORD(slots))


def _there(builder: Any, index: Any, count: Any) -> Any:
    """Which lanes of a vector of logits for few queries stand for any of ``count`` slots."""
    left = builder.sub(builder.mul(count, _WORD(FEW)), builder.mul(index, _WORD(LANES)))
    words = ir.VectorType(_WORD, LANES)
    return builder.icmp_signed("<", words(list(range(LANES))), _splat(builder, left))


def _to_highest(few: bool) -> Callable[..., Any]:
    """The highest of ``count`` slots' logits, and of ``before``, in each of `LANES` lanes, to ``high``.

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
                    logit = builder.select(_there(builder, loop.index, count), logit, _all(NO_LOGIT))
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
            high = _variable(builder, _all(NO_LOGIT))
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
            builder.store(_all(8 * NO_LOGIT), last)
            best = _variable(builder, ir.VectorType(_WORD, LANES)([0] * LANES))
            with cgutils.for_range(builder, many) as loop:
                score, before = get(left, loop.index, row), builder.load(last)
                higher = builder.fcmp_ordered(">", score, before)
                builder.store(builder.select(higher, score, before), last)
                builder.store(builder.select(higher, _splat(builder, loop.index), builder.load(best)), best)
            with cgutils.for_range(builder, many) as loop:
                taken = builder.icmp_signed("==", _splat(builder, loop.index), builder.load(best))
                kept = builder.select(taken, _all(4 * NO_LOGIT), get(left, loop.index, row))
                builder.store(kept, place(left, loop.index, row), align=4)
        bound = builder.fsub(builder.load(last), _all(TIE))
        highest = _variable(builder, builder.load(top, align=4))
        with cgutils.for_range(builder, many) as loop:
            chosen = builder.fcmp_ordered(">=", get(scores, loop.index, row), bound)
            high = builder.select(chosen, get(less, loop.index, row), _all(NO_LOGIT))
            builder.store(_higher(builder, high, builder.load(highest)), highest)
        high = builder.load(highest)
        with cgutils.for_range(builder, many) as loop:
            chosen = builder.fcmp_ordered(">=", get(scores, loop.index, row), bound)
            added = builder.select(chosen, builder.fsub(_all(0), high), _all(NO_LOGIT))
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
            at = [_at(builder, begin, loop.index, _WORD(LANES)) for begin in begins]
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
    """``out += a @ b`` of (rows, depth) and (depth, ``vectors * LANES``), the sums in registers meanwhile.

    What is compiled from loops keeps the sums in memory, and takes twice as long. ``a`` and ``out`` are the addresses
    of their rows. With ``spread`` a row of ``b`` is for so many numbers of ``a`` side by side, one for every such lane
    in turn, and a step of the depth takes `LANES` numbers of ``a``. ``of_a`` and ``of_b`` are the kinds of numbers.
    """
    taken = LANES if spread > 1 else 1
    some, column, index = ir.VectorType(of_a, taken), ir.VectorType(of_b, LANES), ir.VectorType(ir.IntType(32), LANES)
    turns = [index([first + lane % spread for lane in range(LANES)]) for first in range(0, taken, spread)]

    def row(begin: Any, kind: Any) -> list[Any]:
        return [_at(builder, begin, _WORD(v), _WORD(LANES), kind) for v in range(vectors)]

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


to_single: Any = intrinsic(_to_single)
pointer: Any = intrinsic(_to_pointer)
fetch: Any = intrinsic(_to_fetch)
weigh: Any = intrinsic(_to_weights(few=False))
weigh_few: Any = intrinsic(_to_weights(few=True))
rise: Any = intrinsic(_to_risen)
pack: Any = intrinsic(_to_packed)
choose: Any = intrinsic(_to_choice)
fill: Any = intrinsic(_each(lambda builder, number, old: number, 1))
times: Any = intrinsic(_each(lambda builder, number, old: builder.fmul(old, number), 1))
add_times: Any = intrinsic(_each(lambda builder, number, old, other: _call(builder, "fma", other, number, old), 2))
highest: Any = intrinsic(_to_highest(few=False))
highest_few: Any = intrinsic(_to_highest(few=True))
tile_of_one: Any = intrinsic(_tile_of_some(ROWS, 1))
tile_of_two: Any = intrinsic(_tile_of_some(ROWS, 2))
dots_single: Any = intrinsic(_tile(ROWS, PARTS // LANES, SPREAD))
dots_half: Any = intrinsic(_tile(ROWS, PARTS // LANES, SPREAD, of_a=_HALF))
dots_of_one_single: Any = intrinsic(_tile(1, PARTS // LANES, SPREAD))
dots_of_one_half: Any = intrinsic(_tile(1, PARTS // LANES, SPREAD, of_a=_HALF))
sums_single: Any = intrinsic(_tile(FEW, COLUMNS))
sums_half: Any = intrinsic(_tile(FEW, COLUMNS, of_b=_HALF))
