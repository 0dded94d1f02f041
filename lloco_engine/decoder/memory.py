"""Prefixes made ready for attention: the ragged heads of many segments, by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from lloco_engine.decoder import blocks, ragged
from lloco_engine.decoder.focus import Focused
from lloco_engine.decoder.slots import LayerSlots
from lloco_engine.types import Prefix

__all__ = ["Memory"]

Rotate = Callable[[torch.Tensor, int], torch.Tensor]


class Memory:
    """The prefixes of a batch of rows.

    Args:
        prefixes: one prefix per row, None where a row has none; a single entry is shared by all rows.
        device, dtype: of the decoder.
        rotate: turns keys (N, D) by a number of positions, for prefixes placed in sequence.
    """

    def __init__(
        self, prefixes: Sequence[Prefix | None], device: torch.device, dtype: torch.dtype, rotate: Rotate
    ) -> None:
        self._device, self._dtype = device, dtype
        self._rows = [
            [
                replace(segment, keys=rotate(segment.keys, offset).to(segment.keys.device)) if offset else segment
                for segment, offset in zip(prefix.compact, prefix.offsets, strict=True)
            ]
            if prefix is not None
            else []
            for prefix in prefixes
        ]
        self._focus = [0 if prefix is None else prefix.focus for prefix in prefixes]
        self._prior = [() if prefix is None else prefix.prior for prefix in prefixes]
        self._focused = any(0 < most < len(row) for most, row in zip(self._focus, self._rows, strict=True))
        self._heads = next(segment.lengths.shape[1] for row in self._rows for segment in row)
        self._served = ragged.serves(device, dtype)  # asked once, and not in every layer of every step
        self._layers: dict[int, LayerSlots] = {}
        self._compiled: dict[int, LayerSlots] = {}
        self._segments: ragged.Segments | None = None

    @classmethod
    def of(
        cls, prefixes: Sequence[Prefix | None], device: torch.device, dtype: torch.dtype, rotate: Rotate
    ) -> Memory | None:
        """The memory of a batch, or None when no row has compact KV. Rows with one prefix object share it."""
        if not any(prefix is not None and prefix.compact for prefix in prefixes):
            return None
        shared = all(prefix is prefixes[0] for prefix in prefixes)
        return cls(prefixes[:1] if shared else prefixes, device, dtype, rotate)

    def layer(self, index: int) -> LayerSlots:
        """The slots of one layer, made ready when first asked for: for the kernel where it serves, or for torch."""
        compiled = self._served and not torch.is_grad_enabled()
        layers = self._compiled if compiled else self._layers
        if index not in layers:
            layers[index] = self._lay_out(index, compiled)
        return layers[index]

    def _lay_out(self, index: int, compiled: bool) -> LayerSlots:
        if not compiled:
            pieces = self._pieces(index)
            if not self._focused:
                return blocks.lay_out(pieces, self._device, self._dtype)
            focus = [most for most in self._focus for _ in range(self._heads)]
            prior = [of_row for of_row in self._prior for _ in range(self._heads)]
            return Focused(pieces, focus, prior, self._device, self._dtype)
        self._segments = self._segments or ragged.Segments(self._rows, self._focus, self._prior)
        return ragged.Ragged(self._segments, index)

    def _pieces(self, layer: int) -> list[list[blocks.Piece]]:
        """A layer's slots by head, rows one after another: of each segment its keys, values and biases there."""
        heads = range(layer * self._heads, (layer + 1) * self._heads)
        pieces: list[list[blocks.Piece]] = []
        for row in self._rows:
            ends = [segment.lengths.flatten().cumsum(0).tolist() for segment in row]
            for head in heads:
                spans = [slice(end[head - 1] if head else 0, end[head]) for end in ends]
                pieces.append([(s.keys[at], s.values[at], s.bias[at]) for s, at in zip(row, spans, strict=True)])
        return pieces
