"""The cost table of both kinds of memory, on a tiny decoder."""

from __future__ import annotations

import json

import pytest
from decoder_cases import tiny
from typer.testing import CliRunner

from lloco_engine.cli import app
from lloco_engine.errors import ConfigError
from lloco_engine.eval.memories import LLAMA_2_7B, MemoriesConfig, run, segment_bytes
from lloco_engine.testing import save_tiny_decoder


def test_both_kinds_are_measured_on_the_same_text():
    config = MemoriesConfig(segments=2, segment_tokens=120, summary_length=6, repeats=2)
    result = run(config, decoder=tiny(max_position_embeddings=2048))
    kv, same, summary = result["rows"]
    assert (same["slots_per_segment"], summary["slots_per_segment"], summary["prompt_slots"]) == (6, 6, 12)
    assert [row["memory"] for row in result["rows"]] == ["compact KV 16x", "compact KV 20x", "summary 20x"]
    assert kv["slots_per_segment"] >= same["slots_per_segment"]
    # a slot of the tiny decoder: 2 layers, 2 heads, keys and values of 8, a bias; a vector: 32 numbers
    assert same["bytes_per_segment"]["float16"] > 6 * 2 * 2 * (2 * 8 * 2 + 4) > 6 * 32 * 2
    assert 6 * 32 * 2 < summary["bytes_per_segment"]["float16"] < 6 * 32 * 2 + 600  # the header
    for row in result["rows"]:
        assert row["ttft_s"] > 0 and row["compress_s_per_segment"] > 0
    assert "random" in result["config"]["summary_tokens"]
    json.dumps(result)


def test_sizes_of_the_published_decoder_are_computed():
    assert segment_bytes(LLAMA_2_7B, "summary", 50) == 50 * 4096 * 2
    assert segment_bytes(LLAMA_2_7B, "compact_kv", 50) == 50 * 32 * 32 * (2 * 128 * 2 + 8)
    with pytest.raises(ConfigError, match="repeats must be at least 1"):
        MemoriesConfig(repeats=0)


def test_the_command_prints_the_table(tmp_path):
    folder = save_tiny_decoder(tmp_path / "tiny", max_position_embeddings=2048)
    arguments = ["memories", "--decoder", str(folder), "--segments", "1", "--segment-tokens", "100", "--repeats", "1"]
    done = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "out.json"), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "summary 2x" in done.stdout and "random numbers" in done.stdout
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 3
