"""What the tests of the server share."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lloco_engine import Document, Engine
from lloco_engine.config import ChunkConfig, CompressConfig
from lloco_engine.decoder.local import LocalDecoder
from lloco_engine.testing import HashingEmbedder

PUMPS = Document(
    "pumps.md",
    " ".join(f"The pump number {number} stands in hall {number} of the mill." for number in range(12)),
    title="Pumps",
    source="pumps.md",
    metadata={"year": 2023, "group": "mill"},
)
CRANES = Document(
    "in/cranes.md",
    " ".join(f"The crane number {number} was repaired by Anna Vogt in year {number}." for number in range(12)),
    title="Cranes <b>&",
    source="in/cranes.md",
    metadata={"year": 2024},
)
SECRET = Document("secret.md", "The password of the vault is swordfish, and the pump is blue.", tenant="other")
DOCUMENTS = [PUMPS, CRANES, SECRET]
QUESTION = "Which pump stands in hall 3 of the mill?"


def open_engine(store: Path, decoder: LocalDecoder) -> Engine:
    """An engine whose memories are the chunks' whole keys and values, and whose embedder has no model."""
    return Engine.open(
        store,
        decoder=decoder,
        embedder=HashingEmbedder(),
        chunk=ChunkConfig(segment_tokens=64, window_tokens=24, window_overlap=4),
        compress=CompressConfig("uncompressed", 1),
    )


def user(text: str) -> list[dict[str, Any]]:
    """A conversation of one question."""
    return [{"role": "user", "content": text}]


def until(holds: Any, seconds: float = 20.0) -> Any:
    """What a function gives, as soon as that is true."""
    end = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)
    return value
