"""What the tests of the integrations share: documents of two tenants in a store of a tiny seeded decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lloco_engine import ChunkConfig, CompressConfig, Document, Engine
from lloco_engine.testing import HashingEmbedder

TENANTS = ("red", "blue")
TOPICS = ("pump", "crane", "valve", "mirror", "ladder", "kettle")


def story(topic: str, tenant: str = "red", sentences: int = 5) -> str:
    return " ".join(f"The {topic} {number} of {tenant} stands in hall {number + 3}." for number in range(sentences))


def documents(tenant: str = "red", topics: tuple[str, ...] = TOPICS) -> list[Document]:
    return [Document(f"{topic}.md", story(topic, tenant), title=topic, tenant=tenant) for topic in topics]


def open_engine(path: Path, decoder: Any, **changes: Any) -> Engine:
    options = {
        "decoder": decoder,
        "embedder": HashingEmbedder(),
        "compress": CompressConfig("uncompressed", 1),
        "chunk": ChunkConfig(segment_tokens=256, window_tokens=48, window_overlap=8),
    }
    return Engine.open(path, **(options | changes))
