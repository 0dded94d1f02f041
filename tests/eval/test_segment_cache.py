"""Segments found again by what they are made of: by evaluation, by finetuning, and in a store."""

from __future__ import annotations

import pytest
import torch

from lloco_engine import Document, Engine
from lloco_engine.compress import registry
from lloco_engine.config import ChunkConfig, CompressConfig
from lloco_engine.finetune.batches import Example
from lloco_engine.finetune.segments import Segments
from lloco_engine.segment_cache import SegmentCache
from lloco_engine.testing import HashingEmbedder

IDS = tuple(range(40, 80))


@pytest.fixture
def compressor():
    return registry.get("kvzip")


def test_evaluation_and_finetuning_find_each_others_segments(tiny_loaded, compressor, tmp_path):
    cache = SegmentCache(tmp_path / "segments", tiny_loaded, compressor)
    made = cache.get(IDS, 4, (2, 8))
    assert cache.made == 1
    segments = Segments(tiny_loaded, compressor, tmp_path)
    segments.expect([Example("memory", (IDS,), ratio, ()) for ratio in (2, 4, 8)])
    assert torch.equal(segments.get(IDS, 4).keys, made.keys)
    for ratio in (2, 8):
        segments.get(IDS, ratio)
    assert segments._cache.made == 0


def test_whatever_a_segment_depends_on_is_in_its_id(tiny_loaded, compressor, tmp_path):
    other = registry.get("attention_matching")
    caches = [
        SegmentCache(tmp_path, tiny_loaded, compressor),
        SegmentCache(tmp_path, tiny_loaded, other),
        SegmentCache(tmp_path, tiny_loaded, registry.get("attention_matching", ridge=0.5)),
    ]
    ids = {cache._id(tokens, ratio) for cache in caches for tokens in (IDS, IDS[1:]) for ratio in (2, 4)}
    ids |= {cache._id(IDS, 2, "0" * 32) for cache in caches}
    assert len(ids) == 3 * (2 * 2 + 1)


def test_a_stores_own_segments_come_first(tiny_folder, tmp_path):
    with Engine.open(
        tmp_path / "store",
        decoder=str(tiny_folder),
        embedder=HashingEmbedder(),
        chunk=ChunkConfig(64, 24, 4),
        compress=CompressConfig("kvzip", 4),
    ) as engine:
        engine.ingest([Document("a", "the pump of hall nine needs oil and a new seal every year " * 4)])
        chunk = engine.chunker.split(engine.store.load_documents(["a"])[0])[0]
        cache = SegmentCache(tmp_path / "kept", engine.decoder, engine.compressor, store=engine.store)
        (stored, *_) = engine.store.chunks("a")
        assert cache.get(chunk.token_ids, 4) is engine.store.load_segment(stored.segment_id)
        assert cache.made == 0 and not (tmp_path / "kept").exists()
        cache.get(chunk.token_ids, 2)
        assert cache.made == 1, "the store has its own ratio only"
