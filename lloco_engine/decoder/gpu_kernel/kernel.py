"""The kernel: each query's softmax over the slots of one segment in one KV head, with what merging them needs.

As split attention over a long cache (Dao et al. 2023, "Flash-Decoding"), the pieces being segments: they differ in
length from head to head, so every program is told where its own slots begin and how many there are.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

__all__ = ["read_segment"]


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def read_segment(
    q: Any,
    keys: Any,
    values: Any,
    bias: Any,
    begins: Any,
    counts: Any,
    of_row: Any,
    many: Any,
    out: Any,
    mass: Any,
    largest: Any,
    scale: Any,
    heads: Any,
    queries: Any,
    dim: Any,
    most: Any,
    shared: Any,
    EACH: tl.constexpr,
    AT_ONCE: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """One program reads ``EACH`` queries of one KV head and row, and one segment, ``AT_ONCE`` slots after another.

    Args (pointers to contiguous tensors, in elements):
        q: (rows, heads, queries, dim). keys, values: (slots, dim). bias: (slots,) float32.
        begins: (segments, heads) int64, counts: (segments, heads) int32, of this layer.
        of_row, many: (memory's rows,) int32, where a row's segments begin and how many they are.
        out: (rows, heads, most, queries, dim) float32. mass: (rows, heads, most, queries) float32, the logarithm of the
            sum of weights. largest: likewise, the largest logit. Both are -inf where there is no slot.
        most: the most segments of a row. shared: 1 where all rows read the memory's only row.
    """
    block, place, number = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, head = place // heads, place % heads
    mine = row * (1 - shared)
    asked = block * EACH + tl.arange(0, EACH)
    inside = asked < queries
    across = tl.arange(0, WIDE)
    there = inside[:, None] & (across < dim)[None, :]
    at = (place * queries + asked).to(tl.int64)[:, None] * dim + across[None, :]
    queried = tl.load(q + at, mask=there, other=0.0)

    exists = number < tl.load(many + mine)
    segment = tl.load(of_row + mine) + number
    count = tl.load(counts + segment * heads + head, mask=exists, other=0)
    begin = tl.load(begins + segment * heads + head, mask=exists, other=0)

    top = tl.full((EACH,), float("-inf"), tl.float32)
    total = tl.zeros((EACH,), tl.float32)
    read = tl.zeros((EACH, WIDE), tl.float32)
    for first in range(0, count, AT_ONCE):
        slot = first + tl.arange(0, AT_ONCE)
        held = slot < count
        where = (begin + slot)[:, None] * dim + across[None, :]
        wanted = held[:, None] & (across < dim)[None, :]
        key = tl.load(keys + where, mask=wanted, other=0.0)
        logits = tl.dot(queried, tl.trans(key), input_precision="ieee") * scale
        logits += tl.load(bias + begin + slot, mask=held, other=float("-inf"))[None, :]
        higher = tl.maximum(top, tl.max(logits, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # biases may be -inf throughout
        weights = tl.exp(logits - safe[:, None])
        shrunk = tl.exp(top - safe)
        value = tl.load(values + where, mask=wanted, other=0.0)
        read = read * shrunk[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        total = total * shrunk + tl.sum(weights, 1)
        top = higher
    none = total == 0.0
    line = (place * most + number) * queries + asked
    tl.store(largest + line, top, mask=inside)
    tl.store(mass + line, tl.where(none, float("-inf"), top + tl.log(tl.where(none, 1.0, total))), mask=inside)
    divided = read / tl.where(none, 1.0, total)[:, None]
    tl.store(out + line.to(tl.int64)[:, None] * dim + across[None, :], divided, mask=there)
