"""A kind of memory of a user's own, in one file: registered, packed into a store, placed and read."""

from __future__ import annotations

import sys

import pytest
import torch
from decoder_cases import TEXT, tiny

from lloco_engine import (
    CompressConfig,
    ConfigError,
    Document,
    Engine,
    MemoryKind,
    SegmentUnavailable,
    StoreCorrupt,
    StoreError,
    plugins,
    register_memory,
)
from lloco_engine.compress import registry
from lloco_engine.config import ChunkConfig, GenerateConfig
from lloco_engine.kinds import base
from lloco_engine.store import Store
from lloco_engine.testing import HashingEmbedder

# keys and values side by side in one tensor: read, it is compact KV
FILE = """
from dataclasses import dataclass

import torch

from lloco_engine import Compressor, MemoryKind, Segment, register, register_memory
from lloco_engine.compress.uncompressed import Uncompressed
from lloco_engine.kinds import Format
from lloco_engine.kinds.compact_kv import CompactKV


@dataclass(frozen=True, eq=False)
class Paired:
    pairs: torch.Tensor  # (N, 2D)
    lengths: torch.Tensor  # (L, H)
    source_tokens: int

    @property
    def slots(self):
        return len(self.pairs) // self.lengths.numel()


@dataclass(frozen=True)
class PairedFormat(Format):
    sizes: object

    called = "paired KV"
    segment = Paired

    def marker(self, tensors):
        return "paired.1"

    def _pack(self, segment, segment_id):
        return {"pairs": segment.pairs.half(), "lengths": segment.lengths.int()}

    def shapes(self, header):
        rows, sizes = header["pairs"]["shape"][0], self.sizes
        return {"pairs": ("F16", [rows, 2 * sizes.head_dim]), "lengths": ("I32", [sizes.layers, sizes.kv_heads])}

    def unpack(self, tensors, source_tokens, strings):
        return Paired(tensors["pairs"], tensors["lengths"], source_tokens)


@register_memory
class PairedKV(MemoryKind):
    name = "paired"
    called = PairedFormat.called
    segment = Paired

    def format(self, sizes, dtype):
        return PairedFormat(sizes)

    def place(self, segments, config, room, scores=None):
        return CompactKV().place([self.read(one) for one in segments], config, room, scores)

    def read(self, segment):
        keys, values = segment.pairs.chunk(2, dim=1)
        bias = torch.zeros(len(keys))
        return Segment(keys.contiguous(), values.contiguous(), bias, segment.lengths.long(), segment.source_tokens)


@register
class Pairing(Compressor):
    name = "pairing"
    memory = "paired"

    def make(self, decoder, token_ids, ratios):
        return [
            Paired(torch.cat((one.keys, one.values), dim=1), one.lengths, one.source_tokens)
            for one in Uncompressed().make(decoder, token_ids, ratios)
        ]
"""
FIVE = GenerateConfig(max_new_tokens=5)


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "_kinds", dict(base._kinds))
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(plugins, "_run", set())
    path = tmp_path / "paired.py"
    path.write_text(FILE)
    yield path
    sys.modules.pop("lloco_plugin_paired", None)


def opened(folder, compressor: str) -> Engine:
    chunk, compress = ChunkConfig(64, 24, 4), CompressConfig(compressor)
    return Engine.open(folder, decoder=tiny(), embedder=HashingEmbedder(), chunk=chunk, compress=compress)


def test_a_kind_in_one_file_is_ingested_and_asked_like_the_one_it_is_read_as(plugin, tmp_path):
    plugins.run_plugin(plugin)
    answers = {}
    for compressor in ("pairing", "uncompressed"):
        with opened(tmp_path / compressor, compressor) as engine:
            assert engine.ingest([Document("mill", TEXT)]).added == ("mill",)
            answers[compressor] = engine.ask("Who keeps the mill?", whole_document="mill", generate=FIVE)
            assert engine.verify() == []
    pairing, plain = answers["pairing"], answers["uncompressed"]
    assert pairing.token_ids == plain.token_ids and pairing.usage.prompt_slots == plain.usage.prompt_slots > 0


def test_its_files_are_checked_and_other_kinds_are_refused_by_name(plugin, tmp_path):
    plugins.run_plugin(plugin)
    with opened(tmp_path / "s", "pairing") as engine:
        engine.ingest([Document("mill", TEXT)])
        (hit, *_) = engine.store.chunks("mill")
        segment = engine.store.load_segment(hit.segment_id)
        assert segment.pairs.dtype == torch.float16 and type(segment).__name__ == "Paired"
        path = engine.store.path / "segments" / hit.segment_id[:2] / f"{hit.segment_id}.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")
        with pytest.raises(SegmentUnavailable, match="does not match its checksum"):
            engine.store.load_segment(hit.segment_id, verify=True)
    refused = "memory of a segment must be the store's, compact KV, and this one is paired KV"
    with (
        opened(tmp_path / "kv", "uncompressed") as engine,
        engine.store.writer() as writer,
        pytest.raises(StoreError, match=refused),
    ):
        writer.save_segment("0" * 32, segment)


def test_a_store_of_it_opens_where_its_file_is_named_and_says_so_where_it_is_not(plugin, tmp_path, monkeypatch):
    plugins.run_plugin(plugin)
    with opened(tmp_path / "s", "pairing") as engine:
        engine.ingest([Document("mill", TEXT)])
    del base._kinds["paired"]
    plugins._run.clear()
    with pytest.raises(StoreCorrupt, match=r"memory must be one of .*, not 'paired'; .* `lloco --plugin FILE`"):
        Store.open(tmp_path / "s")
    monkeypatch.setenv(plugins.PLUGINS, str(plugin))
    with Store.open(tmp_path / "s") as store:
        assert store.verify() == [] and store.manifest.memory == "paired"


def test_names_are_checked(plugin):
    with pytest.raises(ConfigError, match="derived from MemoryKind"):
        register_memory(str)
    with pytest.raises(ConfigError, match="'summary' is there already: give Other another name"):
        register_memory(type("Other", (MemoryKind,), {"name": "summary"}))
    with pytest.raises(ConfigError, match="must be of one of the kinds compact_kv, summary, not int"):
        base.of(3)
