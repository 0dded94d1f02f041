"""What the tensors of a segment file are, for each kind of memory and each type on disk.

::

    compact KV, float16   keys (N, D), values (N, D)
    compact KV, int8      keys (N, D), values (N, D) with keys.scale (L, H, D), values.scale (L, H, D), float32:
                          one symmetric scale for each channel of each KV head
    compact KV, both      bias (N,) float32, lengths (L, H) int32, positions (N,) int32; files of the first kind have no
                          positions
    summary, float16      vectors (K, E)
    summary, int8         vectors (K, E) with vectors.scale (1, 1, E), float32: one symmetric scale for each channel
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lloco_engine.errors import StoreError
from lloco_engine.types import AnySegment, Segment, SummarySegment

if TYPE_CHECKING:
    import torch

__all__ = ["AnyFormat", "SegmentFormat", "SummaryFormat", "Tensors"]

Tensors = dict[str, "torch.Tensor"]
_Shape = tuple[str, list[int]]  # type as safetensors calls it, and shape


@dataclass(frozen=True)
class SegmentFormat:
    """What every segment of a store of compact KV has in common: the decoder's shape and the type on disk."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: Literal["float16", "int8"]

    kinds = ("lloco.segment.1", "lloco.segment.2")
    called = "compact KV"

    def kind(self, tensors: Collection[str]) -> str:
        """What a file of such tensors is."""
        return self.kinds[1 if "positions" in tensors else 0]

    def pack(self, segment: AnySegment, segment_id: str) -> Tensors:
        """The tensors of a segment's file.

        Raises:
            StoreError: it is no compact KV; shapes disagree with each other or with this; or a number is not finite in
                float16 (a bias may be minus infinity: a slot of no mass).
        """
        import torch

        if not isinstance(segment, Segment):
            raise _another_kind(segment, self.called)
        _check_shapes(segment, self)
        lengths = segment.lengths.detach().to("cpu", torch.int32).contiguous()
        tensors = {"bias": segment.bias.detach().to("cpu", torch.float32).contiguous(), "lengths": lengths}
        if segment.positions is not None:
            tensors["positions"] = segment.positions.detach().to("cpu", torch.int32).contiguous()
        for name, rows in (("keys", segment.keys), ("values", segment.values)):
            tensors |= _packed(name, rows, lengths, self.dtype, segment_id)
        if bool((torch.isnan(tensors["bias"]) | (tensors["bias"] == torch.inf)).any()):
            raise StoreError(f"bias of a segment must be finite or minus infinity; segment {segment_id} has others")
        return tensors

    def shapes(self, header: Mapping[str, Any]) -> dict[str, _Shape]:
        """The tensors that a file with this header must have."""
        rows, heads = int(header["bias"]["shape"][0]), [self.layers, self.kv_heads]
        wanted: dict[str, _Shape] = {"bias": ("F32", [rows]), "lengths": ("I32", heads)}
        if "positions" in header:
            wanted["positions"] = ("I32", [rows])
        for name in ("keys", "values"):
            wanted |= _shapes(name, [rows, self.head_dim], [*heads, self.head_dim], self.dtype)
        return wanted

    def fault(self, tensors: Tensors) -> str | None:
        """What is wrong with tensors of the right shapes."""
        rows = tensors["bias"].shape[0]
        heads: list[list[int]] = tensors["lengths"].tolist()  # adding up so few takes Python less than torch or numpy
        if not rows:
            return "it has no slots"
        if min(map(min, heads)) < 0 or sum(map(sum, heads)) != rows:
            return f"the slots of its heads do not add up to {rows}"
        return None

    def unpack(self, tensors: Tensors, source_tokens: int) -> AnySegment:
        """The segment that a file's tensors say."""
        lengths = tensors["lengths"]
        keys, values = (_unpacked(name, tensors, lengths) for name in ("keys", "values"))
        return Segment(keys, values, tensors["bias"], lengths.long(), source_tokens, tensors.get("positions"))


@dataclass(frozen=True)
class SummaryFormat:
    """What every segment of a store of summary embeddings has in common: numbers per vector and the type on disk."""

    width: int
    dtype: Literal["float16", "int8"]

    kinds = ("lloco.summary.1",)
    called = "summary embeddings"

    def kind(self, tensors: Collection[str]) -> str:
        """What a file of such tensors is."""
        return self.kinds[0]

    def pack(self, segment: AnySegment, segment_id: str) -> Tensors:
        """The tensors of a segment's file.

        Raises:
            StoreError: it is no summary; its vectors are not as wide as the store's; or a number is not finite in
                float16.
        """
        import torch

        if not isinstance(segment, SummarySegment):
            raise _another_kind(segment, self.called)
        if segment.vectors.dim() != 2 or segment.vectors.shape[1] != self.width or not len(segment.vectors):
            raise StoreError(
                f"vectors of a segment must be (K, {self.width}) with K at least 1, not {tuple(segment.vectors.shape)}"
            )
        rows = torch.tensor([[len(segment.vectors)]])
        return _packed("vectors", segment.vectors, rows, self.dtype, segment_id)

    def shapes(self, header: Mapping[str, Any]) -> dict[str, _Shape]:
        """The tensors that a file with this header must have."""
        rows = int(header["vectors"]["shape"][0])
        return _shapes("vectors", [rows, self.width], [1, 1, self.width], self.dtype)

    def fault(self, tensors: Tensors) -> str | None:
        """What is wrong with tensors of the right shapes."""
        return None if len(tensors["vectors"]) else "it has no vectors"

    def unpack(self, tensors: Tensors, source_tokens: int) -> AnySegment:
        """The segment that a file's tensors say."""
        import torch

        rows = torch.tensor([[len(tensors["vectors"])]])
        return SummarySegment(_unpacked("vectors", tensors, rows), source_tokens)


AnyFormat = SegmentFormat | SummaryFormat


def _another_kind(segment: AnySegment, wanted: str) -> StoreError:
    made = "summary embeddings" if isinstance(segment, SummarySegment) else "compact KV"
    return StoreError(f"memory of a segment must be the store's, {wanted}, and this one is {made}")


def _packed(name: str, rows: torch.Tensor, lengths: torch.Tensor, dtype: str, segment_id: str) -> Tensors:
    """(N, D) numbers of heads that lie one after another, ``lengths`` (L, H) rows each, in the type on disk."""
    import torch

    half = rows.detach().to("cpu", torch.float16).contiguous()
    if not bool(torch.isfinite(half).all()):
        raise StoreError(f"{name} of a segment must be finite in float16; segment {segment_id} has others")
    if dtype == "float16":
        return {name: half}
    quantised, scales = _quantise(rows.detach().to("cpu", torch.float32), lengths)
    return {name: quantised, f"{name}.scale": scales}


def _shapes(name: str, shape: list[int], scale: list[int], dtype: str) -> dict[str, _Shape]:
    return {name: ("F16", shape)} if dtype == "float16" else {name: ("I8", shape), f"{name}.scale": ("F32", scale)}


def _unpacked(name: str, tensors: Tensors, lengths: torch.Tensor) -> torch.Tensor:
    rows, scales = tensors[name], tensors.get(f"{name}.scale")
    return rows if scales is None else _dequantise(rows, scales, lengths)


def _quantise(rows: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, D) float32 -> (N, D) int8 and the scales (L, H, D) that turn it back."""
    import torch

    heads = lengths.flatten().tolist()
    owner = torch.arange(len(heads)).repeat_interleave(torch.tensor(heads))
    peak = torch.stack(
        [part.abs().amax(0) if len(part) else rows.new_zeros(rows.shape[1]) for part in rows.split_with_sizes(heads)]
    )
    scales = peak.clamp_min(torch.finfo(torch.float32).tiny) / 127
    quantised = (rows / scales[owner]).round().clamp_(-127, 127).to(torch.int8)
    return quantised, scales.reshape(*lengths.shape, rows.shape[1])


def _dequantise(rows: torch.Tensor, scales: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    import torch

    by_row = scales.flatten(0, 1).repeat_interleave(lengths.flatten().long(), dim=0)
    return by_row.mul_(rows).to(torch.float16)


def _check_shapes(segment: Segment, form: SegmentFormat) -> None:
    lengths = tuple(segment.lengths.shape)
    if lengths != (form.layers, form.kv_heads):
        raise StoreError(f"lengths of a segment must be ({form.layers}, {form.kv_heads}), not {lengths}")
    rows = (int(segment.lengths.sum()), form.head_dim)
    for name, tensor, wanted in (
        ("keys", segment.keys, rows),
        ("values", segment.values, rows),
        ("bias", segment.bias, rows[:1]),
    ):
        if tuple(tensor.shape) != wanted:
            raise StoreError(f"{name} of a segment must be {wanted}, not {tuple(tensor.shape)}")
    if segment.positions is not None and tuple(segment.positions.shape) != rows[:1]:
        raise StoreError(f"positions of a segment must be {rows[:1]}, not {tuple(segment.positions.shape)}")
