"""What `lloco scores` searches: an engine with a decoder of which no weights are loaded."""

from __future__ import annotations

from lloco_engine import Document, Engine
from lloco_engine.config import ChunkConfig
from lloco_engine.decoder.facts import DecoderFacts
from lloco_engine.decoder.local import LocalDecoder
from lloco_engine.eval.scores import _Searched
from lloco_engine.testing import HashingEmbedder

TEXTS = {"a": "The pump of hall nine needs oil. " * 8, "b": "A tram bell was cast in the old foundry. " * 8}


def test_scores_are_those_of_an_engine_and_no_decoder_is_loaded(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(LocalDecoder, "load", lambda *what, **more: 1 / 0)
    documents = [Document(name, text) for name, text in TEXTS.items()]
    searched = _Searched(tmp_path / "blank", DecoderFacts.of(str(tiny_folder)), HashingEmbedder(), documents)
    asked = ["Which hall needs oil?", "When was the bell cast?"]
    found = searched.scores("some", True, asked)
    monkeypatch.undo()
    searched.close()
    with Engine.open(
        tmp_path / "store", decoder=str(tiny_folder), embedder=HashingEmbedder(), chunk=ChunkConfig(768)
    ) as engine:
        engine.ingest(documents)
        hits = [engine.retrieve(text, top_k=1)[0] for text in asked]
    assert [hit.doc_id for hit in hits] == ["a", "b"]
    assert found.scores == tuple(hit.score for hit in hits)
