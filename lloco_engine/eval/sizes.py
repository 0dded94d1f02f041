"""How much memory segments take that a server holds for all who ask, by the shape of its decoder: computed, not timed.

A segment lies once in the server's pool, in pages of slots of one KV head. A head's last page is seldom full, so what a
page costs is counted for heads as uneven as compressed ones (`lloco_engine.eval.shapes`). Beside it: the keys and
values of as much text in context, which each who asks has for himself.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from lloco_engine.eval.shapes import CHUNK, SHAPES, lengths
from lloco_engine.shape import DecoderShape

__all__ = ["Sizes", "main", "sizes"]

PAGE = 16  # slots
_BIAS = 4  # bytes
_RATIOS = (16.0, 30.0)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a million source tokens, for a decoder's shape at a ratio.

    ``slots`` is keys and values of the slots alone; ``pool`` the pages that they fill, with their biases; ``context``
    the keys and values of all the tokens. Keys and values are numbers of two bytes.
    """

    shape: str
    layers: int
    kv_heads: int
    head_dim: int
    ratio: float
    slots: int
    pool: int
    context: int


def sizes(shape: str, ratio: float, page: int = PAGE) -> Sizes:
    """What a million source tokens take, cut into chunks of `CHUNK`.

    Args:
        shape: of `lloco_engine.eval.shapes.SHAPES`.
        ratio: source tokens for each slot.
        page: slots of a page.
    """
    decoder = DecoderShape.of(SHAPES[shape]())
    kept = lengths(decoder, CHUNK, ratio)
    pages = -(-kept // page)
    many, dim = 1_000_000 / CHUNK, decoder.head_dim
    heads = decoder.layers * decoder.kv_heads
    return Sizes(
        shape,
        decoder.layers,
        decoder.kv_heads,
        dim,
        ratio,
        round(many * int(kept.sum()) * 2 * dim * 2),
        round(many * int(pages.sum()) * page * (2 * dim * 2 + _BIAS)),
        1_000_000 * heads * 2 * dim * 2,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table in Markdown, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m lloco_engine.eval.sizes", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    chosen = parser.parse_args(arguments)
    rows = [sizes(shape, ratio) for shape in SHAPES if shape != "tiny" for ratio in _RATIOS]
    if chosen.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return 0
    print("| decoder | layers x KV heads x head | ratio | slots alone | in the pool | in context | context over pool |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        gigabytes = " | ".join(f"{value / 1e9:.2f} GB" for value in (row.slots, row.pool, row.context))
        layout = f"{row.layers} x {row.kv_heads} x {row.head_dim}"
        print(f"| {row.shape} | {layout} | {row.ratio:g}x | {gigabytes} | {row.context / row.pool:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
