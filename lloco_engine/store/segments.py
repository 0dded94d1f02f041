"""Segment files: one safetensors file a segment, read through a memory map.

`formats` says what the tensors are. The header's strings are ``format``, ``segment_id``, ``source_tokens`` and
``checksum``.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lloco_engine.errors import SegmentUnavailable
from lloco_engine.store.formats import AnyFormat, SegmentFormat, SummaryFormat, Tensors
from lloco_engine.types import AnySegment

if TYPE_CHECKING:
    import torch

__all__ = ["AnyFormat", "SegmentFormat", "SummaryFormat", "checksum", "encode", "probe", "read", "verify"]

# Types of tensors as safetensors calls them: as numpy does, and the bytes of a number.
_TYPES = {"F16": ("<f2", 2), "F32": ("<f4", 4), "I8": ("i1", 1), "I32": ("<i4", 4)}


def encode(segment: AnySegment, segment_id: str, form: AnyFormat) -> tuple[bytes, str]:
    """A segment as the bytes of its file, and the checksum of its content.

    Raises:
        StoreError: it is of another kind or shape than ``form``, or has numbers that cannot be kept.
    """
    from safetensors.torch import save

    tensors = form.pack(segment, segment_id)
    header = {"format": form.kind, "segment_id": segment_id, "source_tokens": str(segment.source_tokens)}
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


def read(path: Path | str, segment_id: str, form: AnyFormat) -> AnySegment:
    """A segment on the CPU, its tensors backed by the file until they are touched (int8 is made float16 here).

    Keys, values and vectors are float16, bias float32, lengths int64. The checksum is not looked at, the rest is.

    Raises:
        SegmentUnavailable: missing, cut short, or not this segment.
    """
    tensors, header = _open(path, segment_id, form)
    return form.unpack(tensors, int(header["source_tokens"]))


def verify(path: Path | str, segment_id: str, form: AnyFormat) -> tuple[AnySegment, str]:
    """Like `read`, after every byte was compared with the checksum in the header, which is returned too."""
    tensors, header = _open(path, segment_id, form)
    if checksum(tensors, header) != header.get("checksum"):
        raise _unavailable(segment_id, path, "its content does not match its checksum")
    return form.unpack(tensors, int(header["source_tokens"])), header["checksum"]


def probe(path: Path, segment_id: str, form: AnyFormat) -> None:
    """What `read` would notice, without making a segment; raises `SegmentUnavailable`."""
    _open(path, segment_id, form)


def _open(path: Path | str, segment_id: str, form: AnyFormat) -> tuple[Tensors, dict[str, str]]:
    """Tensors over a private memory map of the file, and the strings of its header."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # half the time of `open`, which makes a buffer
        try:
            mapped = mmap.mmap(file, 0, access=mmap.ACCESS_COPY)
        finally:
            os.close(file)
        tensors, header = _parse(mapped, form)
    except FileNotFoundError as error:
        raise _unavailable(segment_id, path, "the file is missing") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise _unavailable(segment_id, path, f"the file is damaged ({error})") from error
    if header.get("segment_id") != segment_id or not header.get("source_tokens", "").isdecimal():
        what = f"its header says segment {header.get('segment_id')!r} of {header.get('source_tokens')!r} tokens"
        raise _unavailable(segment_id, path, what)
    if fault := form.fault(tensors):
        raise _unavailable(segment_id, path, fault)
    return tensors, header


def _parse(mapped: mmap.mmap, form: AnyFormat) -> tuple[Tensors, dict[str, str]]:
    """Read a safetensors file of known tensors: a third of `safe_open`'s time, and a prompt may need 85 files."""
    import numpy as np
    import torch

    start = 8 + int.from_bytes(mapped[:8], "little")
    if start > len(mapped):
        raise ValueError(f"a header of {start} bytes in a file of {len(mapped)}")
    header = json.loads(mapped[8:start])
    strings = {name: str(value) for name, value in header["__metadata__"].items()}
    if strings.get("format") != form.kind:
        raise ValueError(f"its header says {strings.get('format')!r}, and {form.called} is {form.kind!r}")
    tensors, total = {}, 0
    for name, (code, shape) in form.shapes(header).items():
        entry, (dtype, size) = header[name], _TYPES[code]
        begin, end = entry["data_offsets"]
        if entry["dtype"] != code or entry["shape"] != shape or end - begin != math.prod(shape) * size or begin < 0:
            raise ValueError(f"{name} is {entry['dtype']} {entry['shape']}, not {code} {shape}")
        tensors[name] = torch.from_numpy(np.ndarray(shape, dtype, mapped, start + begin))
        total += end - begin
    if start + total != len(mapped):
        raise ValueError(f"{len(mapped)} bytes, not the {start + total} that its header describes")
    return tensors, strings


def _unavailable(segment_id: str, path: Path | str, why: str) -> SegmentUnavailable:
    return SegmentUnavailable(f"segment {segment_id} ({path}) cannot be used: {why}; ingest its document again")
