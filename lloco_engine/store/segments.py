"""Segment files: one safetensors file a segment, ragged heads flat, read through a memory map.

::

    float16   keys (N, D), values (N, D)
    int8      keys (N, D), values (N, D) with keys.scale (L, H, D), values.scale (L, H, D), float32:
              one symmetric scale for each channel of each KV head
    both      bias (N,) float32, lengths (L, H) int32
    header    format, segment_id, source_tokens, checksum
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lloco_engine.errors import SegmentUnavailable, StoreError
from lloco_engine.types import Segment

if TYPE_CHECKING:
    import torch

__all__ = ["SegmentFormat", "checksum", "encode", "read", "verify"]

_FORMAT = "lloco.segment.1"


@dataclass(frozen=True)
class SegmentFormat:
    """What every segment of a store has in common: the decoder's shape and the type on disk."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: Literal["float16", "int8"]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors in a file, in the order in which they are read."""
        scales = ("keys.scale", "values.scale") if self.dtype == "int8" else ()
        return ("keys", "values", "bias", "lengths", *scales)


def encode(segment: Segment, segment_id: str, form: SegmentFormat) -> tuple[bytes, str]:
    """A segment as the bytes of its file, and the checksum of its content.

    Raises:
        StoreError: shapes disagree with each other or with ``form``, or a number is not finite in float16
            (a bias may be minus infinity: a slot of no mass).
    """
    import torch
    from safetensors.torch import save

    _check_shapes(segment, form)
    lengths = segment.lengths.detach().to("cpu", torch.int32).contiguous()
    tensors = {"bias": segment.bias.detach().to("cpu", torch.float32).contiguous(), "lengths": lengths}
    for name, rows in (("keys", segment.keys), ("values", segment.values)):
        half = rows.detach().to("cpu", torch.float16).contiguous()
        if not bool(torch.isfinite(half).all()):
            raise StoreError(f"{name} of a segment must be finite in float16; segment {segment_id} has others")
        if form.dtype == "int8":
            tensors[name], tensors[f"{name}.scale"] = _quantise(rows.detach().to("cpu", torch.float32), lengths)
        else:
            tensors[name] = half
    if bool((torch.isnan(tensors["bias"]) | (tensors["bias"] == torch.inf)).any()):
        raise StoreError(f"bias of a segment must be finite or minus infinity; segment {segment_id} has others")
    header = {"format": _FORMAT, "segment_id": segment_id, "source_tokens": str(segment.source_tokens)}
    digest = checksum(tensors, header)
    return save(tensors, metadata=header | {"checksum": digest}), digest


def checksum(tensors: Mapping[str, torch.Tensor], header: Mapping[str, str]) -> str:
    """SHA-256 of everything that a segment file says, 64 hex digits: independent of how the file is laid out."""
    import torch

    digest = hashlib.sha256()
    for name in ("format", "segment_id", "source_tokens"):
        digest.update(f"{name}={header.get(name)}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read(path: Path, segment_id: str, form: SegmentFormat) -> Segment:
    """A segment on the CPU, its tensors backed by the file until they are touched (int8 is made float16 here).

    Keys and values are float16, bias float32, lengths int64. The checksum is not looked at, the rest is.

    Raises:
        SegmentUnavailable: missing, cut short, or not this segment.
    """
    tensors, header = _open(path, segment_id, form)
    return _segment(tensors, header, form)


def verify(path: Path, segment_id: str, form: SegmentFormat) -> tuple[Segment, str]:
    """Like `read`, after every byte was compared with the checksum in the header, which is returned too."""
    tensors, header = _open(path, segment_id, form)
    if checksum(tensors, header) != header.get("checksum"):
        raise _unavailable(segment_id, path, "its content does not match its checksum")
    return _segment(tensors, header, form), header["checksum"]


def _open(path: Path, segment_id: str, form: SegmentFormat) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in form.tensors}
    except FileNotFoundError as error:
        raise _unavailable(segment_id, path, "the file is missing") from error
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise _unavailable(segment_id, path, str(error)) from error
    if header.get("format") != _FORMAT or header.get("segment_id") != segment_id:
        raise _unavailable(
            segment_id, path, f"its header says {header.get('format')!r}, segment {header.get('segment_id')!r}"
        )
    lengths, bias = tensors["lengths"], tensors["bias"]
    rows, heads = bias.numel(), (form.layers, form.kv_heads)
    kind = torch.int8 if form.dtype == "int8" else torch.float16
    wanted = {
        "keys": (kind, (rows, form.head_dim)),
        "values": (kind, (rows, form.head_dim)),
        "bias": (torch.float32, (rows,)),
        "lengths": (torch.int32, heads),
        "keys.scale": (torch.float32, (*heads, form.head_dim)),
        "values.scale": (torch.float32, (*heads, form.head_dim)),
    }
    for name, tensor in tensors.items():
        if (tensor.dtype, tuple(tensor.shape)) != wanted[name]:
            raise _unavailable(
                segment_id,
                path,
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {wanted[name][0]} {wanted[name][1]}",
            )
    if int(lengths.min()) < 0 or int(lengths.sum()) != rows or not header.get("source_tokens", "").isdecimal():
        raise _unavailable(segment_id, path, f"the slots of its heads do not add up to {rows}")
    return tensors, header


def _segment(tensors: dict[str, torch.Tensor], header: dict[str, str], form: SegmentFormat) -> Segment:
    lengths = tensors["lengths"]
    keys, values = tensors["keys"], tensors["values"]
    if form.dtype == "int8":
        keys = _dequantise(keys, tensors["keys.scale"], lengths)
        values = _dequantise(values, tensors["values.scale"], lengths)
    return Segment(keys, values, tensors["bias"], lengths.long(), int(header["source_tokens"]))


def _quantise(rows: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, D) float32 -> (N, D) int8 and the scales (L, H, D) that turn it back."""
    import torch

    heads = lengths.flatten().long()
    owner = torch.arange(heads.numel()).repeat_interleave(heads)
    peak = torch.zeros(heads.numel(), rows.shape[1]).index_reduce_(0, owner, rows.abs(), "amax")
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


def _unavailable(segment_id: str, path: Path, why: str) -> SegmentUnavailable:
    return SegmentUnavailable(f"segment {segment_id} ({path}) cannot be used: {why}; ingest its document again")
