"""Attention over live tokens and ragged slots at once, compiled for the CPU by numba and kept beside this file.

A call (`Attend`) costs some microseconds, and the threads that take part in it are those that torch keeps (`team`).
Nothing is laid out beforehand: segments are read where they are, `WIDTH` tokens or slots of a head at a time, which are
made float32 in the processor's cache. Between two calls a layer's weights push everything out of the caches, so in a
step it counts how much code and memory a call touches: functions take addresses, which is little code, and not arrays.

All that is to be read lies, as it were, in one line: part after part of the queries, in it head after head (a place),
of each the live tokens and then the slots, segment after segment. Every thread reads a stretch of it, as long as the
others'. Where queries choose among segments, a place's slots are looked at, then their values are taken.
"""

from __future__ import annotations

import logging
import threading
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import njit

from lloco_engine.decoder import slots
from lloco_engine.decoder.cpu_kernel import call as calls
from lloco_engine.decoder.cpu_kernel import team, vectors
from lloco_engine.decoder.cpu_kernel.call import WIDTH, Attend, Desk
from lloco_engine.decoder.cpu_kernel.vectors import (
    COLUMNS,
    FEW,
    LANES,
    NO_LOGIT,
    PARTS,
    ROWS,
    SPREAD,
    add_times,
    choose,
    dots_half,
    dots_of_one_half,
    dots_of_one_single,
    dots_single,
    fetch,
    fill,
    highest,
    highest_few,
    pack,
    pointer,
    rise,
    sums_half,
    sums_single,
    tile_of_one,
    tile_of_two,
    times,
    to_single,
    weigh,
    weigh_few,
)

__all__ = ["prepare"]

_log = logging.getLogger(__name__)
_PATIENCE_S = 2.0
_WAIT = "compiling attention for this machine's processor: up to half a minute, " + (
    "once, since what is compiled is kept" if team.can_keep() else "each time, since no folder can be written"
)

team.renew(__file__, slots.__file__, calls.__file__, vectors.__file__)

# what is read is finite (`_find` makes it so), which lets sums and maxima be taken in any order
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "nogil": True, "cache": team.can_keep(), "fastmath": True}
_NONE = np.float32(NO_LOGIT)
_ZERO, _ONE = np.float32(0), np.float32(1)
_FIRST = np.arange(WIDTH)
_ATTEND, _DESK = np.dtype(Attend), np.dtype(Desk)
_DESK_BYTES = _DESK.itemsize
_array: Any = numba.carray  # type: ignore[attr-defined]


# -- one block --------------------------------------------------------------------------------------------------


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _add_product(
    which: int, some: int, a: int, a_row: int, a_column: int, b: int, out: int, columns: int, depth: int
) -> None:
    """``out[which] += a[which] @ b``: ``out`` and ``b`` have so many ``columns``, ``a`` and ``b`` so much ``depth``.

    All are given by their addresses. ``which`` are ``some`` numbers of rows, up to a multiple of `ROWS`.
    """
    for rows in range(which, which + 8 * some, 8 * ROWS):
        for column in range(0, columns - LANES, 2 * LANES):
            tile_of_two(rows, a, a_row, a_column, b + 4 * column, columns, out + 4 * column, columns, depth)
        if columns % (2 * LANES):
            last = 4 * (columns - LANES)
            tile_of_one(rows, a, a_row, a_column, b + last, columns, out + last, columns, depth)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _runs(desk: Any) -> Any:
    return _array(pointer(desk.runs), (WIDTH, 7), np.int64)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _ask_few(call: Any, desk: Any, several: int) -> None:
    """Add to the desk's ``sums`` the products of runs' keys, where they are, with few queries.

    The values of what is not chosen from are brought nearer meanwhile.
    """
    runs, sums, asked, dim = _runs(desk), desk.sums, desk.asked, call.dim
    for run in range(several):
        keys, beside, count, half = runs[run, 0], runs[run, 1] - runs[run, 0], runs[run, 2], runs[run, 3]
        size = (2 if half else 4) * dim
        for slot in range(0, count, ROWS):
            at = keys + slot * size
            for line in range(at + WIDTH * size, at + (WIDTH + ROWS) * size, 64):
                fetch(line)
                if runs[run, 4] < 0 or not call.focused:
                    fetch(line + beside)
            if count - slot < ROWS:
                for _ in range(slot, count):
                    if half:
                        dots_of_one_half(at, dim, LANES, asked, PARTS, sums, PARTS, dim // LANES)
                    else:
                        dots_of_one_single(at, dim, LANES, asked, PARTS, sums, PARTS, dim // LANES)
                    at, sums = at + size, sums + 4 * PARTS
            else:
                if half:
                    dots_half(at, dim, LANES, asked, PARTS, sums, PARTS, dim // LANES)
                else:
                    dots_single(at, dim, LANES, asked, PARTS, sums, PARTS, dim // LANES)
                sums += 4 * ROWS * PARTS


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _take_few(call: Any, desk: Any, first: int, last: int, logits: int, read: int) -> None:
    """Add the values of runs, where they are, times the weights of few queries, ``logits``, to ``read``."""
    runs, dim = _runs(desk), call.dim
    for run in range(first, last):
        values, count, half = runs[run, 1], runs[run, 2], runs[run, 3]
        for column in range(0, dim, COLUMNS * LANES):
            if half:
                sums_half(logits, 1, FEW, values + 2 * column, dim, read + 4 * column, dim, count)
            else:
                sums_single(logits, 1, FEW, values + 4 * column, dim, read + 4 * column, dim, count)
        logits += 4 * count * FEW


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _gather(desk: Any, several: int, which: int, dim: int, out: int, wide: int) -> None:
    """Copy runs' keys (``which`` 0) or values (1) to ``out`` (WIDTH, ``wide``), as float32."""
    runs, to, at = _runs(desk), _array(pointer(out), (WIDTH, wide), np.float32), 0
    for run in range(several):
        begin, count = runs[run, which], runs[run, 2]
        if runs[run, 3]:
            half = _array(pointer(begin), (count, dim), np.uint16)
            for slot in range(count):
                for line in range(2 * dim * (slot + WIDTH), 2 * dim * (slot + WIDTH + 1), 64):
                    fetch(begin + line)
                for d in range(dim):
                    to[at + slot, d] = to_single(half[slot, d])
        else:
            to[at : at + count, :dim] = _array(pointer(begin), (count, dim), np.float32)
        at += count


# -- a place of the line ---------------------------------------------------------------------------------------


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _desk(call: Any, thread: int) -> Any:
    return _array(pointer(call.desks + thread * _DESK_BYTES), (1,), _DESK)[0]


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _whole(address: int, place: int) -> Any:
    """The whole number of an array at an address."""
    return _array(pointer(address + 8 * place), (1,), np.int64)[0]


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _where(call: Any, place: int) -> Any:
    """A place's part, row and head, and where the numbers of its row are."""
    rest, head = divmod(place, call.heads)
    part, row = divmod(rest, call.rows)
    return part, row, head, 0 if call.shared else row


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _live(call: Any, row: int) -> Any:
    """How many live tokens a row has."""
    return _whole(call.lives, 4 * row + 3)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _count(call: Any, part: int) -> Any:
    """How many queries a part has."""
    return min(call.each, call.group * call.tokens - part * call.each)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _ask(call: Any, desk: Any, place: int) -> None:
    """Lay out the queries of a place's part."""
    part, row, head, _ = _where(call, place)
    first, scale, filled, dim = part * call.each, np.float32(call.scale), call.filled, call.dim
    asked = _array(pointer(desk.asked), (dim, filled), np.float32)
    spread = _array(pointer(desk.asked), (dim // SPREAD, PARTS), np.float32)
    fill(desk.asked, dim * (FEW if call.few else filled) // LANES, _ZERO)
    for p in range(_count(call, part)):
        query, token = divmod(first + p, call.tokens)
        at = row * call.q_row + (head * call.group + query) * call.q_head + token * call.q_token
        q = _array(pointer(call.q + 4 * at), (dim,), np.float32)
        if call.few:
            for d in range(dim // SPREAD):
                for lane in range(SPREAD):
                    spread[d, p * SPREAD + lane] = q[d * SPREAD + lane] * scale
        else:
            for d in range(dim):
                asked[d, p] = q[d] * scale


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _restart(call: Any, desk: Any, row: int, own: int, chosen: int) -> None:
    """Have `_find` begin with a row's first segment."""
    desk.chosen = chosen
    desk.begun = _whole(call.of_row, own)
    desk.segment = desk.begun
    desk.at = _live(call, row)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _find(call: Any, desk: Any, row: int, head: int, first: int, count: int) -> Any:
    """Where ``count`` of a head's live tokens and slots from ``first`` on lie, as the desk's runs.

    Calls go on from the one before. Where only ``chosen`` segments count, those that are not wanted are left out. A run
    is the addresses of its keys and values, how many they are, whether they are in half precision, the number of the
    segment in its row (-1: live tokens), the address of its biases (0: none), and how far behind ``first`` it begins.

    Returns:
        how many runs there are, and how many tokens and slots in them.
    """
    dim, live, number, total, runs = call.dim, _live(call, row), 0, 0, _runs(desk)
    if first < live:
        at = 4 * (head * _whole(call.lives, 4 * row + 2) + first * dim)
        total = min(count, live - first)
        runs[0, 0], runs[0, 1] = _whole(call.lives, 4 * row) + at, _whole(call.lives, 4 * row + 1) + at
        runs[0, 2] = total
        runs[0, 3], runs[0, 4], runs[0, 5], runs[0, 6] = 0, -1, 0, 0
        number = 1
    segment, at = desk.segment, desk.at
    while at < first + count and segment < call.segments:
        begins = call.begins + 8 * (segment * (call.heads + 1) + head)
        begin = _whole(begins, 0)
        after = at + _whole(begins, 1) - begin
        low, high = max(first, at), min(first + count, after)
        if low < high and not (desk.chosen and _whole(desk.wanted, segment - desk.begun) == 0):
            slot, run, tensors = begin + low - at, runs[number], call.tensors + 32 * segment
            half = _whole(tensors, 3)
            size = dim * (2 if half else 4)
            run[0], run[1] = _whole(tensors, 0) + slot * size, _whole(tensors, 1) + slot * size
            run[2], run[3], run[4] = high - low, half, segment - desk.begun
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
            bias = _array(pointer(biases), (count,), np.float32)
            for place in range(count):
                fill(logits + 4 * place * columns, columns // LANES, max(bias[place], _NONE) * share)
        else:
            fill(logits, count * columns // LANES, _ZERO)
        logits += 4 * count * columns


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _hide(call: Any, desk: Any, part: int, row: int, first: int) -> None:
    """Add the mask of the live tokens from ``first`` on to the logits of a part's queries."""
    live = _live(call, row)
    mask = _array(pointer(call.mask + 4 * row * call.mask_row), (call.tokens, live), np.float32)
    logits, count = _array(pointer(desk.logits), (WIDTH, call.step), np.float32), _count(call, part)
    for s in range(min(live - first, WIDTH)):
        for p in range(count):
            logits[s, p] += max(mask[(part * call.each + p) % call.tokens, first + s], _NONE)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _look(call: Any, desk: Any, several: int, some: int, logits: int) -> None:
    """``logits`` (WIDTH, W) of the runs' ``some`` keys."""
    if call.few:  # read once, so there is nothing to keep
        _begin(call, desk, several, desk.sums, np.int64(PARTS), _ONE / np.float32(SPREAD))
        _ask_few(call, desk, several)
        pack(desk.sums, some, logits)
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
    for lane in range(0, 4 * filled, 4 * LANES):
        high, less = desk.scores + lane, desk.less + lane
        _highest_of(call, logits + lane, some, top + lane, high)
        rise(high, top + lane, total + lane, desk.shrink + lane, less)
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
        highest_few(logits, LANES, count, before, high)
    else:
        highest(logits, call.filled, count, before, high)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _weigh_by(call: Any, logits: int, count: int, added: int, total: int) -> None:
    """See `_to_weights`."""
    if call.few:
        weigh_few(logits, LANES, count, added, total)
    else:
        weigh(logits, call.filled, count, added, total)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _held(call: Any, desk: Any, held: int) -> Any:
    """Where what was read of a place that others read too is, the highest logit and the sum of the weights."""
    lanes = 4 * held * call.filled
    return desk.read + 4 * held * call.step * call.wide, desk.top + lanes, desk.total + lanes


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _shrink(call: Any, desk: Any, read: int) -> None:
    """Make what was read so far relative to a higher logit, by the desk's ``shrink``."""
    shrink = _array(pointer(desk.shrink), (call.filled,), np.float32)
    for p in range(call.step):
        if shrink[p] != _ONE:
            times(read + 4 * p * call.wide, call.wide // LANES, shrink[p])


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _note(call: Any, desk: Any, several: int, logits: int, largest: int) -> None:
    """Note the largest of the runs' ``logits`` (WIDTH, W) by segment and query, ``largest`` (most, P)."""
    runs, row = _runs(desk), 4 * call.filled
    for run in range(several):
        count, high = runs[run, 2], largest + row * runs[run, 4]
        for lane in range(0, row, 4 * LANES):
            _highest_of(call, logits + lane, count, high + lane, high + lane)
        logits += 4 * count * call.step


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _choose(call: Any, desk: Any, place: int, held: int, largest: int, threads: int) -> None:
    """Have a place's queries choose segments by what so many threads noted, ``largest`` (threads, places, most, P).

    Of the desk, ``wanted`` are the segments that any query reads; ``less`` is to be added to their logits, which makes
    them relative to the highest of all that a query reads, and bars those that it does not; ``readers`` are a segment's
    queries, filled up with others to a multiple of `ROWS`, and behind them, in the last place, how many that makes.
    """
    part, _, _, own = _where(call, place)
    filled, many = call.filled, _whole(call.many, own)
    read, top, total = _held(call, desk, held)
    prior = call.prior + 4 * _whole(call.of_row, own)
    step = 4 * call.places * call.most * filled
    for lane in range(0, 4 * filled, 4 * LANES):
        choose(
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
    wanted, count = _array(pointer(desk.wanted), (many,), np.int64), _count(call, part)
    less = _array(pointer(desk.less), (many, filled), np.float32)
    readers = _array(pointer(desk.readers), (many, filled + 1), np.int64)
    for segment in range(many):
        number = 0
        for p in range(count):
            if less[segment, p] != _NONE:
                readers[segment, number] = p
                number += 1
        wanted[segment] = number
        if not call.few:
            for p in range(filled):
                if number % ROWS and (p >= count or less[segment, p] == _NONE):
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
                fetch(runs[run, 1] + line)
    else:
        _gather(desk, several, np.int64(1), call.dim, desk.values, call.wide)
    for run in range(several):
        count, segment, here = runs[run, 2], runs[run, 4], logits + 4 * call.step * runs[run, 6]
        for lane in range(0, 4 * filled, 4 * LANES):
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
    total = _array(pointer(at_total), (call.filled,), np.float32)
    for p in range(_count(call, part)):
        query, token = divmod(part * call.each + p, call.tokens)
        share, query = _ONE / total[p], head * call.group + query
        read = _array(pointer(at_read + 4 * p * call.wide), (call.dim,), np.float32)
        at = ((row * call.tokens + token) * call.heads * call.group + query) * call.dim
        out = _array(pointer(call.out + 4 * at), (call.dim,), np.float32)
        for d in range(call.dim):
            out[d] = read[d] * share


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _merge(call: Any, desk: Any, held: int, other: Any) -> None:
    """Add what another thread read of a place that it came to first."""
    filled, wide = call.filled, call.wide
    at_read, at_top, at_total = _held(call, desk, held)
    top, total = _array(pointer(at_top), (filled,), np.float32), _array(pointer(at_total), (filled,), np.float32)
    other_top = _array(pointer(other.top), (filled,), np.float32)
    other_total = _array(pointer(other.total), (filled,), np.float32)
    for p in range(call.step):
        high = max(top[p], other_top[p])
        mine, theirs = np.float32(np.exp(top[p] - high)), np.float32(np.exp(other_top[p] - high))
        top[p], total[p] = high, mine * total[p] + theirs * other_total[p]
        at = 4 * p * wide
        times(at_read + at, wide // LANES, mine)
        add_times(at_read + at, other.read + at, wide // LANES, theirs)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _look_at_all(call: Any, desk: Any, place: int, begin: int, end: int, largest: int, logits: int) -> None:
    """Keep the ``logits`` of a place's slots that lie from ``begin`` to ``end`` in the line, and note the largest."""
    _, row, head, own = _where(call, place)
    at = _whole(desk.starts, place)
    stop = min(end, _whole(desk.starts, place + 1)) - at
    _restart(call, desk, row, own, np.int64(0))
    for first in range(max(begin - at, _live(call, row)), stop, WIDTH):
        several, some = _find(call, desk, row, head, first, min(stop - first, WIDTH))
        here = logits + 4 * first * call.step
        _look(call, desk, several, some, here)
        _note(call, desk, several, here, largest)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _take_all(call: Any, desk: Any, place: int, begin: int, end: int, held: int) -> None:
    """Read what of a place lies from ``begin`` to ``end`` in the line: where queries choose, only the live tokens."""
    part, row, head, own = _where(call, place)
    at, live = _whole(desk.starts, place), _live(call, row)
    stop = min(end - at, live if _whole(call.focus, own) else _whole(desk.starts, place + 1) - at)
    read, top, total = _held(call, desk, held)
    fill(read, call.step * call.wide // LANES, _ZERO)
    fill(top, call.filled // LANES, _NONE)
    fill(total, call.filled // LANES, _ZERO)
    _restart(call, desk, row, own, np.int64(0))
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
    _restart(call, desk, row, own, np.int64(1))
    for first in range(max(begin - at, _live(call, row)), stop, WIDTH):
        several, _ = _find(call, desk, row, head, first, min(stop - first, WIDTH))
        _take_chosen(call, desk, several, logits + 4 * first * call.step, held)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _line(call: Any, desk: Any) -> Any:
    """Note where each place begins in the line, and return how long it is."""
    starts, at = _array(pointer(desk.starts), (call.places + 1,), np.int64), 0
    for place in range(call.places):
        _, row, head, own = _where(call, place)
        starts[place] = at
        at += _live(call, row) + _whole(call.slots, own * call.heads + head)
    starts[call.places] = at
    return at


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _append(call: Any) -> None:
    """Put each row's new key and value where its last live token's are."""
    for row in range(call.rows):
        keys, values = _whole(call.lives, 4 * row), _whole(call.lives, 4 * row + 1)
        for head in range(call.heads):
            at = 4 * (head * _whole(call.lives, 4 * row + 2) + (_live(call, row) - 1) * call.dim)
            key = call.new_keys + 4 * (row * call.new_keys_row + head * call.new_keys_head)
            value = call.new_values + 4 * (row * call.new_values_row + head * call.new_values_head)
            _array(pointer(keys + at), (call.dim,), np.float32)[:] = _array(pointer(key), (call.dim,), np.float32)
            _array(pointer(values + at), (call.dim,), np.float32)[:] = _array(pointer(value), (call.dim,), np.float32)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _attend(call: Any) -> None:
    """A thread's part of a call (see `Attend`)."""
    size, thread = team.size(), team.number()
    if call.new_keys:
        _append(call)  # every thread all of them, to the same effect: none need wait for another
    desk = _desk(call, thread)
    line = _line(call, desk)
    begin, end = line * thread // size, line * (thread + 1) // size
    noted = 4 * call.most * call.filled  # of a place
    own = call.largest + thread * call.places * noted
    if call.focused:
        fill(own, call.places * noted // (4 * LANES), _NONE)
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
            logits = call.kept + 4 * (at + ROWS * (place + thread)) * call.step
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

    It is compiled here: some seconds the first time on a machine, which are then said to be no standstill, and a
    fraction of one afterwards.
    """
    wait = threading.Timer(_PATIENCE_S, _log.warning, [_WAIT])
    wait.daemon = True
    wait.start()
    try:
        return team.Task(_attend_at)
    finally:
        wait.cancel()
