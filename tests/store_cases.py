"""Synthetic documents, segments and stores, shared by the store's tests. No model is loaded."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lloco_engine.errors import SegmentUnavailable
from lloco_engine.store import Manifest, Store, Writer, schema
from lloco_engine.store.connecting import connect
from lloco_engine.types import AnySegment, Chunk, Document, Segment, Span

DIM = 8
LAYERS, KV_HEADS, HEAD_DIM = 2, 3, 4
CHUNK = 20  # characters, and tokens: one a character
WINDOW = 10


def manifest(**changes: Any) -> Manifest:
    """A valid manifest of a tiny decoder."""
    values: dict[str, Any] = {
        "format_version": 1,
        "decoder": "tiny",
        "decoder_fingerprint": "dec0",
        "tokenizer_fingerprint": "tok0",
        "template_fingerprint": "tem0",
        "layers": LAYERS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "memory": "compact_kv",
        "compressor": "attention_matching",
        "compressor_settings": {"score": "max"},
        "ratio": 16.0,
        "dtype": "float16",
        "embedder": "tiny-embedder",
        "embedder_fingerprint": "emb0",
        "embedder_dim": DIM,
        "chunk": {"segment_tokens": CHUNK},
        "created": "2026-01-01T00:00:00+00:00",
        "engine_version": "0.1.0",
    }
    return Manifest(**values | changes)


def tokens(text: str) -> tuple[int, ...]:
    """One token a character."""
    return tuple(map(ord, text))


def unit(seed: int, dim: int = DIM) -> np.ndarray:
    """A seeded vector of length 1."""
    vector = np.random.default_rng(seed).normal(size=dim).astype(np.float32)
    return vector / np.linalg.norm(vector)


def text_vector(text: str) -> np.ndarray:
    """A vector of length 1 that depends on the text alone."""
    return unit(zlib.crc32(text.encode()))


def segment(text: str) -> Segment:
    """A ragged segment that depends on the text alone."""
    generator = torch.Generator().manual_seed(sum(tokens(text)) * 31 + len(text))
    lengths = torch.randint(1, 5, (LAYERS, KV_HEADS), generator=generator)
    rows = int(lengths.sum())
    return Segment(
        keys=torch.randn(rows, HEAD_DIM, generator=generator),
        values=torch.randn(rows, HEAD_DIM, generator=generator),
        bias=torch.randn(rows, generator=generator),
        lengths=lengths,
        source_tokens=len(text),
    )


def chunks_of(document: Document) -> list[Chunk]:
    """Chunks of `CHUNK` characters with windows of `WINDOW`."""
    chunks = []
    for ordinal, start in enumerate(range(0, len(document.text), CHUNK)):
        text = document.text[start : start + CHUNK]
        windows = tuple(
            Span(start + at, min(start + at + WINDOW, start + len(text))) for at in range(0, len(text), WINDOW)
        )
        chunks.append(Chunk(document.doc_id, ordinal, Span(start, start + len(text)), text, tokens(text), windows))
    return chunks


def put(writer: Writer, document: Document, vectors: Mapping[str, np.ndarray] | None = None) -> str:
    """Ingest a document as the engine does, resuming from segments that are there.

    ``vectors`` gives windows of a certain text a certain vector.
    """
    chunks = chunks_of(document)
    ids, stats, windows = [], [], []
    for chunk in chunks:
        segment_id = writer.segment_id(document.tenant, chunk.token_ids)
        ids.append(segment_id)
        stats.append(writer.segment_stats(segment_id) or writer.save_segment(segment_id, segment(chunk.text)))
        texts = [document.text[window.start : window.end] for window in chunk.windows]
        windows.append(np.stack([(vectors or {}).get(text, text_vector(text)) for text in texts]))
    return writer.put_document(document, chunks, ids, windows, seconds=0.5, segment_stats=stats)


def document(doc_id: str, length: int = 50, *, seed: str = "", tenant: str = "", **metadata: Any) -> Document:
    """A document whose every window has a text of its own, unless another document has the same seed."""
    seed = seed or doc_id
    text = "".join(f"{seed}{at:03d}".rjust(WINDOW, ".")[-WINDOW:] for at in range(length // WINDOW))
    return Document(doc_id, text, title=f"Title of {doc_id}", source=f"{doc_id}.txt", metadata=metadata, tenant=tenant)


def make_store(path: Path, *documents: Document, **changes: Any) -> Store:
    """A new store that holds these documents."""
    store = Store.create(path, manifest(**changes))
    with store.writer() as writer:
        for each in documents:
            put(writer, each)
    return store


def segment_file(path: Path, segment_id: str) -> Path:
    """Where a store keeps a segment."""
    return path / "segments" / segment_id[:2] / f"{segment_id}.safetensors"


def set_back(store: Path, version: int) -> None:
    """Make a store's catalogue what it was after so many migrations, with the rows that it had a place for then."""
    path, former = store / "catalogue.sqlite", store / "former.sqlite"
    with closing(connect(former)) as connection:
        connection.execute("ATTACH ? AS now", (str(path),))
        connection.executescript("PRAGMA foreign_keys = OFF;" + "".join(schema.MIGRATIONS[:version]))
        there = "SELECT name FROM {}.sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
        tables = [name for (name,) in connection.execute(there.format("main")) if not name.startswith("words")]
        for table in tables:
            own, now = (
                [row[1] for row in connection.execute(f"PRAGMA {where}.table_info({table})")]
                for where in ("main", "now")
            )
            shared = ", ".join(name for name in own if name in now)
            connection.execute(f"DELETE FROM {table}")
            connection.execute(f"INSERT INTO main.{table} ({shared}) SELECT {shared} FROM now.{table}")
        connection.execute(f"PRAGMA user_version = {version}")
        connection.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    former.rename(path)


def load_all(store: Store, segment_ids: Iterable[str]) -> list[AnySegment | SegmentUnavailable]:
    """Segments in order; one that is missing or damaged is the error itself."""
    loaded: list[AnySegment | SegmentUnavailable] = []
    for segment_id in segment_ids:
        try:
            loaded.append(store.load_segment(segment_id))
        except SegmentUnavailable as error:
            loaded.append(error)
    return loaded
