"""A call of the compiled kernel: a record of addresses and sizes, and the room that each thread has for it.

Letters used for shapes: ``H`` KV heads, ``D`` head dimension, ``P`` queries of a part, filled up to `LANES`, ``W``
logits of a slot.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from lloco_engine.decoder.cpu_kernel.vectors import COLUMNS, FEW, LANES, PARTS, ROWS

__all__ = ["WIDTH", "Attend", "Desk", "furnish", "kept", "parts"]

WIDTH = 64  # tokens or slots read at once: their keys, or values, and what is made of them stay in the first cache
_MOST = 48  # queries of a part, likewise


class Attend(ctypes.Structure):
    """A call of the kernel: addresses and sizes, of a layer.

    ``q`` (rows, H * group, tokens, D) are the queries and ``out`` (rows, tokens, H * group, D) is the result;
    ``q_row``, ``q_head`` and ``q_token`` say how many numbers lie between two of ``q``. ``lives`` (rows, 4) int64: of
    each row's live tokens the addresses of the keys and of the values (H, live, D), how many numbers lie between two
    heads, and how many tokens there are (live). ``mask`` (rows, tokens, live) is added to their logits where all rows
    have as many, a row ``mask_row`` numbers after another; or it is 0. ``new_keys`` and ``new_values`` (rows, H, D), by
    ``new_keys_row`` and so on, are those of each row's last live token, which are put there first; or they are 0.

    ``tensors`` (segments, 4) int64: addresses of each segment's keys (N, D), values (N, D) and biases (N,), and whether
    keys and values are float16. ``begins`` (segments, H + 1) int64: where the slots of a segment's heads begin in them,
    and where the last's end. ``of_row`` (rows or 1,) int64: the first of a row's segments; ``slots`` (rows or 1, H)
    int64: how many slots its heads have in all of them. ``shared`` is 1 where all rows have the same.

    ``focused`` is 1 where some queries do not read every segment: of ``many`` (rows or 1,) int64, a row's segments, at
    most ``most``, each query reads ``focus`` (rows or 1,) int64 (0: all), and ``prior`` (segments,) float32 (see
    `lloco_engine.decoder.slots`). ``largest``: room for (threads, places, most, P) float32; ``kept``: for `kept`
    numbers.

    ``each`` and ``filled``: queries of a part, and lanes that they fill (P). ``few`` is 1 where they take turns in a
    vector's lanes. ``step``: how many logits a token or slot has (W): P, or `FEW`. ``wide``: D filled up with lanes.
    ``places``: parts * rows * H. ``desks``: a `Desk` for each thread.
    """

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("q", "q_row", "q_head", "q_token", "out")),
        *((name, ctypes.c_int64) for name in ("lives", "mask", "mask_row")),
        *((name, ctypes.c_int64) for name in ("new_keys", "new_keys_row", "new_keys_head")),
        *((name, ctypes.c_int64) for name in ("new_values", "new_values_row", "new_values_head")),
        *((name, ctypes.c_int64) for name in ("tensors", "begins", "of_row", "slots", "segments", "shared")),
        *((name, ctypes.c_int64) for name in ("focused", "many", "most", "focus", "prior", "largest", "kept")),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "group", "tokens", "dim")),
        *((name, ctypes.c_int64) for name in ("each", "filled", "few", "step", "wide", "places", "desks")),
        ("scale", ctypes.c_double),
    )


class Desk(ctypes.Structure):
    """Addresses of a thread's room.

    ``read`` (2, W, wide), ``top`` and ``total`` (2, P): what was read of the two places of which other threads read
    too, the first and the last, what the highest logit was and how much the weights add up to. ``asked`` (D, P): a
    part's queries, 0 where there are none; or (D / `SPREAD`, `PARTS`). ``keys`` (WIDTH, D), ``values`` (WIDTH, wide),
    ``logits`` (WIDTH, W) and ``sums`` (WIDTH, `PARTS`) of what is read at once; ``shrink`` (P,) as in `_rise`.
    ``scores``, ``left`` and ``less`` (most, P), ``wanted`` (most,) and ``readers`` (most, P + 1): see `_choose`.
    ``runs`` (WIDTH, 7): see `_find`. ``starts`` (places + 1,): where each place begins in the line.

    ``chosen`` says whether `_find` leaves out what is not wanted, ``segment``, ``at`` and ``begun`` where it is.
    """

    NUMBERS = ("read", "top", "total", "asked", "keys", "values", "logits", "sums", "shrink", "scores", "left", "less")
    WHOLE = ("wanted", "readers", "runs", "starts")
    _fields_ = tuple((name, ctypes.c_int64) for name in (*NUMBERS, *WHOLE, "chosen", "segment", "at", "begun"))


def parts(queries: int, dim: int) -> tuple[int, int, int, int]:
    """See `Attend`: ``each``, ``filled``, ``few`` and ``step``."""
    if queries <= FEW and dim % (COLUMNS * LANES) == 0:
        return queries, LANES, 1, FEW
    each = -(-queries // -(-queries // _MOST))
    filled = each + -each % LANES
    return each, filled, 0, filled


def kept(line: int, places: int, threads: int, step: int) -> int:
    """Numbers of float32 that the logits of so many tokens and slots take (see `Attend`)."""
    return step * (line + ROWS * (places + threads))


def furnish(call: Attend, threads: int) -> object:
    """Give a call whose sizes are known its desks; what is returned must be held as long as it is made."""
    call.wide = call.dim + -call.dim % LANES
    filled, most = call.filled, call.most
    block = WIDTH * call.dim, WIDTH * call.wide, WIDTH * call.step, WIDTH * PARTS
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
