"""What the tests of the integrations share: documents of two tenants in a store of a tiny seeded decoder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lloco_engine import AnswerStream, ChunkConfig, CompressConfig, Document, Engine
from lloco_engine.testing import HashingEmbedder

TENANTS = ("red", "blue")
TOPICS = ("pump", "crane", "valve", "mirror", "ladder", "kettle")
# what a real decoder is asked about
TEXTS = {
    "velmora": "Velmora Pumps was founded in 1931 in the harbour town of Astrelin by the engineer Ilse Kontar. Its "
    "best known pump, the Kingfisher, lifts two hundred litres a second and stands in the lock of Orvane.",
    "harrow": "The Harrow-9 dries kelp. Its production drum is made of phosphor bronze, and its spindle clamp is "
    "tightened to 27 newton metres. It was designed by Maud Tessaly in Brackenhythe.",
}
QUESTION = "Who founded Velmora Pumps?"


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


def gated(engine: Engine, monkeypatch: Any, gate: Any) -> list[str]:
    """Let every answer of the engine stop after its first piece until a gate opens; returns the pieces made so far."""
    made: list[str] = []
    real = engine.stream

    def stream(*args: Any, **options: Any) -> AnswerStream:
        answer = real(*args, **options)
        pieces = answer._pieces

        def slowly() -> Iterator[str]:
            for number, piece in enumerate(pieces):
                if number == 1:
                    assert gate.wait(20), "nothing opened the gate: the event loop was blocked"
                made.append(piece)
                yield piece

        answer._pieces = slowly()
        return answer

    monkeypatch.setattr(engine, "stream", stream)
    return made
