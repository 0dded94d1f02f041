"""Compact KV: for each KV head of each layer the slots it keeps, which attention reads beside live tokens.

A segment's file has keys (N, D), values (N, D), bias (N,) float32, lengths (L, H) int32 and positions (N,) int32; files
of the first marker have no positions. In int8 there are keys.scale and values.scale (L, H, D) float32 too. In int4 keys
and values are (N, D / 2) bytes, with keys.least, keys.step, values.least and values.step (L, H, D) float16; the bias is
float16, and positions are int16 where they can be. The header says the ``divergence`` of a segment that was refined:
before, after and steps.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lloco_engine.config import DType, PrefixConfig
from lloco_engine.errors import ConfigError, StoreError
from lloco_engine.kinds import numbers
from lloco_engine.kinds.base import Format, MemoryKind, Room, Sizes, Tensors
from lloco_engine.types import Divergence, Prefix, Segment

if TYPE_CHECKING:
    import torch

__all__ = ["CompactKV", "CompactKVFormat"]


class CompactKV(MemoryKind):
    """See `MemoryKind`. In parallel segments keep the positions they were made at, right after the template prefix, and
    the text starts after the longest; in sequence each starts where the one before ends."""

    name = "compact_kv"
    called = "compact KV"
    segment = Segment

    def format(self, sizes: Sizes, dtype: DType) -> CompactKVFormat:
        """See `MemoryKind.format`."""
        return CompactKVFormat(sizes.layers, sizes.kv_heads, sizes.head_dim, dtype)

    def check(self, config: PrefixConfig, room: Room) -> None:
        """See `MemoryKind.check`: in sequence keys are moved, which not every decoder's can be."""
        if config.placement == "sequence" and room.immovable:
            raise ConfigError(room.immovable)

    def place(
        self, segments: Sequence[Segment], config: PrefixConfig, room: Room, scores: Sequence[float] | None = None
    ) -> Prefix:
        """See `MemoryKind.place`."""
        self.check(config, room)
        lengths = [segment.source_tokens for segment in segments]
        if config.placement == "sequence":
            offsets = tuple(sum(lengths[:number]) for number in range(len(segments)))
            return Prefix(tuple(segments), offsets, room.template + sum(lengths), "sequence")
        best = max(scores, default=0.0) if scores is not None else 0.0
        prior = () if scores is None else tuple(config.relevance * (score - best) for score in scores)
        start = room.template + max(lengths, default=0)
        return Prefix(tuple(segments), (0,) * len(segments), start, focus=config.focus, prior=prior)

    def is_ordered(self, config: PrefixConfig) -> bool:
        """See `MemoryKind.is_ordered`."""
        return config.placement == "sequence"

    def advice(self, config: PrefixConfig, segments: int) -> str:
        """See `MemoryKind.advice`."""
        if config.placement == "sequence" and segments > 1:
            return "retrieve fewer segments, place them in parallel, or shorten the question or the answer"
        return super().advice(config, segments)


@dataclass(frozen=True)
class CompactKVFormat(Format):
    """See `Format`.

    Args:
        layers, kv_heads, head_dim: of the decoder.
        dtype: of keys and values on disk.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: DType

    called = CompactKV.called
    segment = Segment

    def marker(self, tensors: Collection[str]) -> str:
        """See `Format.marker`."""
        return f"lloco.segment.{3 if self.dtype == 'int4' else 2 if 'positions' in tensors else 1}"

    def _pack(self, segment: Segment, segment_id: str) -> Tensors:
        """See `Format.pack`; a bias may be minus infinity: a slot of no mass."""
        import torch

        self._check(segment)
        lengths = segment.lengths.detach().to("cpu", torch.int32).contiguous()
        small = self.dtype == "int4"
        bias = segment.bias.detach().to("cpu", torch.float16 if small else torch.float32).contiguous()
        tensors = {"bias": bias, "lengths": lengths}
        if segment.positions is not None:
            places = torch.int16 if small and segment.source_tokens <= 2**15 else torch.int32
            tensors["positions"] = segment.positions.detach().to("cpu", places).contiguous()
        for name, rows in (("keys", segment.keys), ("values", segment.values)):
            tensors |= numbers.packed(name, rows, lengths, self.dtype, segment_id)
        if not _is_bias(bias):
            raise StoreError(f"bias of a segment must be finite or minus infinity; segment {segment_id} has others")
        return tensors

    def _check(self, segment: Segment) -> None:
        lengths = tuple(segment.lengths.shape)
        if lengths != (self.layers, self.kv_heads):
            raise StoreError(f"lengths of a segment must be ({self.layers}, {self.kv_heads}), not {lengths}")
        rows = (int(segment.lengths.sum()), self.head_dim)
        parts = [("keys", segment.keys, rows), ("values", segment.values, rows), ("bias", segment.bias, rows[:1])]
        if segment.positions is not None:
            parts.append(("positions", segment.positions, rows[:1]))
        for name, tensor, wanted in parts:
            if tuple(tensor.shape) != wanted:
                raise StoreError(f"{name} of a segment must be {wanted}, not {tuple(tensor.shape)}")

    def rounded(self, segment: Segment) -> Segment:
        """See `Format.rounded`: int8 and int4 are told of; float16, and the bias, are near enough."""
        if self.dtype == "float16":
            return segment
        keys, values = (
            numbers.fake_quantize(rows, segment.lengths, self.dtype) for rows in (segment.keys, segment.values)
        )
        return replace(segment, keys=keys, values=values)

    def strings(self, segment: Segment) -> dict[str, str]:
        """See `Format.strings`."""
        told = segment.divergence
        return {} if told is None else {"divergence": f"{told.before!r} {told.after!r} {told.steps}"}

    def shapes(self, header: Mapping[str, Any]) -> dict[str, tuple[str, list[int]]]:
        """See `Format.shapes`."""
        rows, heads = int(header["bias"]["shape"][0]), [self.layers, self.kv_heads]
        small = self.dtype == "int4"
        wanted: dict[str, tuple[str, list[int]]] = {
            "bias": ("F16" if small else "F32", [rows]),
            "lengths": ("I32", heads),
        }
        if "positions" in header:
            short = small and header["positions"]["dtype"] == "I16"
            wanted["positions"] = ("I16" if short else "I32", [rows])
        for name in ("keys", "values"):
            wanted |= numbers.shapes(name, [rows, self.head_dim], [*heads, self.head_dim], self.dtype)
        return wanted

    def fault(self, tensors: Tensors) -> str | None:
        """See `Format.fault`."""
        rows = tensors["bias"].shape[0]
        heads: list[list[int]] = tensors["lengths"].tolist()  # adding up so few takes Python less than torch or numpy
        if not rows:
            return "it has no slots"
        if min(map(min, heads)) < 0 or sum(map(sum, heads)) != rows:
            return f"the slots of its heads do not add up to {rows}"
        if not _is_bias(tensors["bias"]):
            return "its bias is neither finite nor minus infinity"
        return numbers.fault("keys", tensors) or numbers.fault("values", tensors)

    def unpack(self, tensors: Tensors, source_tokens: int, strings: Mapping[str, str]) -> Segment:
        """See `Format.unpack`."""
        lengths, positions = tensors["lengths"], tensors.get("positions")
        keys, values = (numbers.unpacked(name, tensors, lengths) for name in ("keys", "values"))
        positions = None if positions is None else positions.int()
        made = Segment(keys, values, tensors["bias"].float(), lengths.long(), source_tokens, positions)
        if "divergence" not in strings:
            return made
        before, after, steps = strings["divergence"].split(" ")
        return replace(made, divergence=Divergence(float(before), float(after), int(steps)))


def _is_bias(bias: torch.Tensor) -> bool:
    """Whether each is finite or minus infinity."""
    return bool((bias < float("inf")).all())  # nothing is less than a NaN, and a NaN is less than nothing
