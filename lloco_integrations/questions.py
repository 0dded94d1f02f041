"""The vector of a question, which some embedders tell from a text that is searched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lloco_engine import Engine

__all__ = ["question_vector"]


def question_vector(engine: Engine, question: str) -> Any:
    """(dim,) float32, of length 1: as the engine's own search has it."""
    encode = getattr(engine.embedder, "encode_query", engine.embedder.encode)
    return encode([question])[0]
