"""Segment files: one safetensors file a segment, read into memory of our own and checked there.

A segment is found again by its content: its id is a hash of all that it is made of and by (`content_id`), and its file
is ``ab/<id>.safetensors`` in a folder of such files (`SegmentFiles`).

A memory map would be quicker to open, but a file that changes under it changes what was checked, and one that is cut
ends the process by a signal. A kind's `Format` says what the tensors are. The header's strings are ``format``,
``segment_id``, ``source_tokens`` and ``checksum``, and what the kind adds to them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lloco_engine.errors import SegmentUnavailable
from lloco_engine.kinds import Format, Tensors
from lloco_engine.store.files import Layout, segment_name, write_atomic
from lloco_engine.store.records import SegmentStats
from lloco_engine.types import AnySegment

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

__all__ = ["SegmentFile", "SegmentFiles", "checksum", "content_id", "encode", "pack", "read", "received", "verify"]

# Types of tensors as safetensors calls them: as numpy does, and the bytes of a number.
_TYPES = {"F16": ("<f2", 2), "F32": ("<f4", 4), "U8": ("u1", 1), "I8": ("i1", 1), "I16": ("<i2", 2), "I32": ("<i4", 4)}


def content_id(made_with: Mapping[str, Any], token_ids: Iterable[int], previous: str | None = None) -> str:
    """Id of a segment: 32 hex digits of what it is made from.

    Args:
        made_with: everything but the tokens that its content depends on, as JSON values.
        token_ids: of its chunk.
        previous: id of the segment that it builds on, so that the ids of a chain stand for all before them too.
    """
    if previous is not None:
        made_with = {**made_with, "previous": previous}
    digest = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode("utf-8"))
    digest.update(b"\0" + ",".join(map(str, token_ids)).encode("ascii"))
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class SegmentFile:
    """A segment as the bytes of its file, wherever it was made, and what is to be known of it."""

    stats: SegmentStats
    data: bytes


@dataclass(frozen=True)
class SegmentFiles:
    """A folder of segment files of one form.

    Args:
        folder: of the files.
        temporary: a folder of the same file system, for what is not written wholly yet.
        form: what the files have in common.
    """

    folder: Path
    temporary: Path
    form: Format

    @classmethod
    def of(cls, layout: Layout, form: Format) -> Self:
        """Those of a store."""
        return cls(layout.segments, layout.temporary, form)

    def name(self, segment_id: str) -> str:
        """Path of a segment's file, as `segment_name` gives it."""
        return segment_name(str(self.folder), segment_id)

    def read(self, segment_id: str) -> AnySegment:
        """A segment, as `read` gives it."""
        return read(self.name(segment_id), segment_id, self.form)

    def verify(self, segment_id: str) -> tuple[AnySegment, str]:
        """A segment and its checksum, as `verify` gives them."""
        return verify(self.name(segment_id), segment_id, self.form)

    def is_usable(self, segment_id: str, size: int, checksum: str, *, verify: bool) -> bool:
        """Whether a file has this size and a right header; with ``verify``, whether its content has this checksum."""
        try:
            if verify:
                return self.verify(segment_id)[1] == checksum
            _open(name := self.name(segment_id), segment_id, self.form)
            return os.stat(name).st_size == size
        except (SegmentUnavailable, OSError):
            return False

    def data(self, segment_id: str) -> bytes:
        """The bytes of a segment's file, as they are.

        Raises:
            SegmentUnavailable: there is none that can be read.
        """
        try:
            return Path(name := self.name(segment_id)).read_bytes()
        except OSError as error:
            raise _unavailable(segment_id, name, f"the file cannot be read ({error.strerror})") from error

    def write(self, file: SegmentFile) -> None:
        """Write a segment's file, wholly or not at all.

        Raises:
            StoreFull: no room; nothing was changed.
        """
        write_atomic(Path(self.name(file.stats.segment_id)), file.data, self.temporary)


def pack(segment: AnySegment, segment_id: str, form: Format) -> SegmentFile:
    """A segment as its file; raises as `encode`."""
    data, digest = encode(segment, segment_id, form)
    return SegmentFile(SegmentStats(segment_id, segment.slots, segment.source_tokens, len(data), digest), data)


def received(data: bytes, segment_id: str, form: Format) -> SegmentFile:
    """A segment's file that another process made, all of it checked as `verify` does."""
    segment, digest = verify(data, segment_id, form)
    return SegmentFile(SegmentStats(segment_id, segment.slots, segment.source_tokens, len(data), digest), data)


def encode(segment: AnySegment, segment_id: str, form: Format) -> tuple[bytes, str]:
    """A segment as the bytes of its file, and the checksum of its content.

    Raises:
        StoreError: it is of another kind or shape than ``form``, or has numbers that cannot be kept.
    """
    from safetensors.torch import save

    tensors = form.pack(segment, segment_id)
    header = {"format": form.marker(tensors), "segment_id": segment_id, "source_tokens": str(segment.source_tokens)}
    header |= form.strings(segment)
    digest = checksum(tensors, header)
    return _in_order(save(tensors, metadata=header | {"checksum": digest})), digest


def _in_order(data: bytes) -> bytes:
    """A safetensors file with the strings of its header in order, which are in another one whenever the library writes
    them: so equal segments are equal files."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    return b"".join((data[:8], text.ljust(end - 8), data[end:]))


def checksum(tensors: Mapping[str, torch.Tensor], header: Mapping[str, str]) -> str:
    """SHA-256 of everything that a segment file says, 64 hex digits: independent of how the file is laid out."""
    import torch

    digest = hashlib.sha256()
    first = "format", "segment_id", "source_tokens"
    for name in (*first, *sorted(set(header) - {*first, "checksum"})):
        digest.update(f"{name}={header.get(name)}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read(path: Path | str | bytes, segment_id: str, form: Format) -> AnySegment:
    """A segment on the CPU, every byte of its file compared with the checksum in its header.

    ``path`` may be the file's content itself. Keys, values and vectors are float16, bias float32, lengths int64. What
    becomes of the file later is no matter.

    Raises:
        SegmentUnavailable: missing, cut short, damaged, or not this segment.
    """
    return verify(path, segment_id, form)[0]


def verify(path: Path | str | bytes, segment_id: str, form: Format) -> tuple[AnySegment, str]:
    """Like `read`, with the checksum."""
    tensors, header = _open(path, segment_id, form)
    if checksum(tensors, header) != header.get("checksum"):
        raise _unavailable(segment_id, path, "its content does not match its checksum")
    try:
        return form.unpack(tensors, int(header["source_tokens"]), header), header["checksum"]
    except ValueError as error:
        raise _unavailable(segment_id, path, f"its header cannot be understood ({error})") from error


def _open(path: Path | str | bytes, segment_id: str, form: Format) -> tuple[Tensors, dict[str, str]]:
    """Tensors over a private copy of the file, and the strings of its header."""
    try:
        if isinstance(path, bytes):
            tensors, header = _parse(partial(_part, path), partial(_copy, path), len(path), form)
        else:
            with _opened(path) as (file, size):
                tensors, header = _parse(partial(os.pread, file), partial(_fill, file), size, form)
    except FileNotFoundError as error:
        raise _unavailable(segment_id, path, "the file is missing") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, MemoryError) as error:
        raise _unavailable(segment_id, path, f"the file is damaged ({error})") from error
    except RecursionError as error:  # of a header of a thousand brackets
        raise _unavailable(segment_id, path, "the file is damaged (its header is nested too deep)") from error
    if header.get("segment_id") != segment_id or not header.get("source_tokens", "").isdecimal():
        what = f"its header says segment {header.get('segment_id')!r} of {header.get('source_tokens')!r} tokens"
        raise _unavailable(segment_id, path, what)
    if fault := form.fault(tensors):
        raise _unavailable(segment_id, path, fault)
    return tensors, header


@contextmanager
def _opened(path: Path | str) -> Iterator[tuple[int, int]]:
    """Handle and size of a file; a folder or a pipe in its place is a `ValueError`."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # half the time of `open`, which makes a buffer
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a file")
        yield file, status.st_size
    finally:
        os.close(file)


def _parse(
    part: Callable[[int, int], bytes], fill: Callable[[npt.NDArray[np.uint8], int], None], size: int, form: Format
) -> tuple[Tensors, dict[str, str]]:
    """Read a safetensors file of known tensors: a third of `safe_open`'s time, and a prompt may need 85 files.

    Args:
        part: gives so many bytes from a place on.
        fill: fills an array with the bytes from a place on.
        size: bytes of the file.
        form: what files have in common.
    """
    import numpy as np
    import torch

    start = 8 + int.from_bytes(part(8, 0), "little")
    if start > size:
        raise ValueError(f"a header of {start} bytes in a file of {size}")
    header = json.loads(part(start - 8, 8))
    strings = {name: str(value) for name, value in header["__metadata__"].items()}
    if strings.get("format") != form.marker(header):
        raise ValueError(f"its header says {strings.get('format')!r}, and {form.called} is {form.marker(header)!r}")
    places, total = {}, 0
    for name, (code, shape) in form.shapes(header).items():
        entry, (dtype, width) = header[name], _TYPES[code]
        begin, end = entry["data_offsets"]
        if entry["dtype"] != code or entry["shape"] != shape or end - begin != math.prod(shape) * width or begin < 0:
            raise ValueError(f"{name} is {entry['dtype']} {entry['shape']}, not {code} {shape}")
        places[name] = (shape, dtype, begin)
        total += end - begin
    if start + total != size:
        raise ValueError(f"{size} bytes, not the {start + total} that its header describes")
    body = np.empty(total, np.uint8)
    fill(body, start)
    tensors = {name: torch.from_numpy(np.ndarray(*place[:2], body, place[2])) for name, place in places.items()}
    return tensors, strings


def _part(data: bytes, count: int, start: int) -> bytes:
    return data[start : start + count]


def _copy(data: bytes, body: npt.NDArray[np.uint8], start: int) -> None:
    body.data[:] = data[start:]


def _fill(file: int, body: npt.NDArray[np.uint8], start: int) -> None:
    view, at = body.data, 0
    while at < len(view):
        got = os.preadv(file, [view[at:]], start + at)
        if not got:
            raise ValueError(f"it ends {len(view) - at} bytes early")
        at += got


def _unavailable(segment_id: str, path: Path | str | bytes, why: str) -> SegmentUnavailable:
    if isinstance(path, bytes):
        return SegmentUnavailable(f"segment {segment_id} ({len(path)} bytes that a process sent) cannot be used: {why}")
    return SegmentUnavailable(f"segment {segment_id} ({path}) cannot be used: {why}; ingest its document again")
