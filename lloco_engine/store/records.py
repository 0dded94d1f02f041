"""The small values that the store hands out, besides those of `lloco_engine.types`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lloco_engine.types import MetadataValue

__all__ = ["DocumentInfo", "Problem", "SegmentStats"]


@dataclass(frozen=True)
class SegmentStats:
    """What the catalogue keeps of one segment file.

    ``slots`` is the mean over all KV heads, rounded up; ``source_tokens`` the decoder tokens it stands for;
    ``bytes`` the size of the file; ``checksum`` the SHA-256 of its content (see `segments.checksum`); ``previous`` the
    segment that it builds on, None where it stands by itself.
    """

    segment_id: str
    slots: int
    source_tokens: int
    bytes: int
    checksum: str
    previous: str | None = None


@dataclass(frozen=True)
class DocumentInfo:
    """What the catalogue knows of one document.

    ``chars`` and ``source_tokens`` measure its text; ``segments``, ``windows``, ``slots`` and ``bytes`` its memory
    (a segment shared with another document counts in both); ``compress_s`` is the seconds that compressing this
    version took; ``ingested_at`` is an ISO 8601 time in UTC; ``origin`` is where it was read (`Document.origin`);
    ``encoding`` is that of the file it was read from and ``pages`` how many pages of it hold text ("" and 0 where it
    has none).
    """

    doc_id: str
    tenant: str
    title: str
    source: str
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)
    version: int = 1
    content_hash: str = ""
    chars: int = 0
    source_tokens: int = 0
    segments: int = 0
    windows: int = 0
    slots: int = 0
    bytes: int = 0
    compress_s: float = 0.0
    ingested_at: str = ""
    origin: str = ""
    encoding: str = ""
    pages: int = 0


@dataclass(frozen=True)
class Problem:
    """One thing that `verify` found wrong.

    ``path`` is the file, relative to the store's folder; ``doc_ids`` are the documents that suffer from it.
    An ``"orphan"`` does no harm: a file that no document refers to, left by a killed ingest, which the next ingest
    of the same document uses.
    """

    kind: Literal["manifest", "catalogue", "segment", "index", "adapter", "orphan"]
    path: str
    detail: str
    doc_ids: tuple[str, ...] = ()
