"""Engines, documents and helpers that the tests of the LangChain classes share. The decoder is tiny and seeded."""

from __future__ import annotations

from pathlib import Path

from lloco_engine import ChunkConfig, CompressConfig, Document, Engine
from lloco_engine.decoder.local import LocalDecoder
from lloco_engine.testing import HashingEmbedder, tiny_decoder, tiny_tokenizer

SMALL = ChunkConfig(segment_tokens=64, window_tokens=24, window_overlap=4)
WHOLE = CompressConfig("uncompressed", 1)


def decoder() -> LocalDecoder:
    """A tiny decoder with a window long enough for a chain's prompt."""
    return LocalDecoder(tiny_decoder(max_position_embeddings=8192), tiny_tokenizer(), "tiny")


def open_engine(path: Path, made: LocalDecoder, **changes) -> Engine:
    """An engine on a store of its own."""
    options = {"decoder": made, "embedder": HashingEmbedder(), "compress": WHOLE, "chunk": SMALL}
    return Engine.open(path, **(options | changes))


def story(topic: str, sentences: int = 1) -> str:
    return " ".join(f"The {topic} number {number} stands in the hall of {topic}." for number in range(sentences))


def fact(topic: str, tenant: str = "", **metadata) -> Document:
    """A document of one segment."""
    return Document(f"{topic}.md", story(topic), title=topic, source=f"in/{topic}.md", metadata=metadata, tenant=tenant)


class Spy:
    """Records what an engine is asked: (question, options)."""

    def __init__(self, monkeypatch, engine: Engine) -> None:
        self.asked: list[tuple[str, dict]] = []
        stream = engine.stream

        def spied(question, **options):
            self.asked.append((question, options))
            return stream(question, **options)

        monkeypatch.setattr(engine, "stream", spied)

    @property
    def last(self) -> tuple[str, dict]:
        return self.asked[-1]

    @property
    def segments(self) -> list[str]:
        """Ids of the segments that the last question read, in order."""
        return [hit.segment_id for hit in self.last[1]["hits"]]

    @property
    def text(self) -> str:
        """All text that the last question put into the prompt."""
        question, options = self.last
        history = (turn.text for turn in options.get("history", ()))
        return "\n".join([question, options.get("context", ""), *history])


def format_docs(documents) -> str:
    return "\n\n".join(document.page_content for document in documents)
