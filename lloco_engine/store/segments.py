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
import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lloco_engine.errors import SegmentUnavailable, StoreError
from lloco_engine.types import Segment

if TYPE_CHECKING:
    import torch

__all__ = ["SegmentFormat", "checksum", "encode", "probe", "read", "verify"]

_FORMAT = "lloco.segment.1"


@dataclass(frozen=True)
class SegmentFormat:
    """What every segment of a store has in common: the decoder's shape and the type on disk."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: Literal["float16", "int8"]


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


def probe(path: Path, segment_id: str, form: SegmentFormat) -> None:
    """What `read` would notice, without making a segment; raises `SegmentUnavailable`."""
    _open(path, segment_id, form)


def _open(path: Path, segment_id: str, form: SegmentFormat) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors over a private memory map of the file, and the strings of its header."""
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        tensors, header = _parse(mapped, form)
    except FileNotFoundError as error:
        raise _unavailable(segment_id, path, "the file is missing") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise _unavailable(segment_id, path, f"the file is damaged ({error})") from error
    if header.get("format") != _FORMAT or header.get("segment_id") != segment_id:
        what = f"its header says {header.get('format')!r}, segment {header.get('segment_id')!r}"
        raise _unavailable(segment_id, path, what)
    lengths = tensors["lengths"].numpy()  # for so few numbers numpy takes a tenth of torch's time
    rows = len(tensors["bias"])
    if lengths.min() < 0 or lengths.sum() != rows or not header.get("source_tokens", "").isdecimal():
        raise _unavailable(segment_id, path, f"the slots of its heads do not add up to {rows}")
    return tensors, header


def _parse(mapped: mmap.mmap, form: SegmentFormat) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a safetensors file of known tensors: a third of `safe_open`'s time, and a prompt may need 85 files."""
    import torch

    start = 8 + int.from_bytes(mapped[:8], "little")
    if start > len(mapped):
        raise ValueError(f"a header of {start} bytes in a file of {len(mapped)}")
    header = json.loads(mapped[8:start])
    rows = int(header["bias"]["shape"][0])
    heads = [form.layers, form.kv_heads]
    kind = ("I8", torch.int8, 1) if form.dtype == "int8" else ("F16", torch.float16, 2)
    scale = ("F32", torch.float32, 4, [*heads, form.head_dim])
    wanted = {
        "keys": (*kind, [rows, form.head_dim]),
        "values": (*kind, [rows, form.head_dim]),
        "bias": ("F32", torch.float32, 4, [rows]),
        "lengths": ("I32", torch.int32, 4, heads),
    }
    if form.dtype == "int8":
        wanted |= {"keys.scale": scale, "values.scale": scale}
    tensors, total = {}, 0
    for name, (code, dtype, size, shape) in wanted.items():
        entry, count = header[name], math.prod(shape)
        begin, end = entry["data_offsets"]
        if entry["dtype"] != code or entry["shape"] != shape or end - begin != count * size or begin < 0:
            raise ValueError(f"{name} is {entry['dtype']} {entry['shape']}, not {code} {shape}")
        tensors[name] = torch.frombuffer(mapped, dtype=dtype, count=count, offset=start + begin).view(shape)
        total += end - begin
    if start + total != len(mapped):
        raise ValueError(f"{len(mapped)} bytes, not the {start + total} that its header describes")
    return tensors, {name: str(value) for name, value in header["__metadata__"].items()}


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


def _unavailable(segment_id: str, path: Path, why: str) -> SegmentUnavailable:
    return SegmentUnavailable(f"segment {segment_id} ({path}) cannot be used: {why}; ingest its document again")
