"""`lloco bench` on a tiny decoder and tiny sizes: its keys, its corpus and its plot. Times are not judged."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lloco_engine.compress import registry
from lloco_engine.decoder.local import LocalDecoder
from lloco_engine.errors import ConfigError
from lloco_engine.eval import bench, reference
from lloco_engine.eval.bench import BenchConfig
from lloco_engine.eval.corpus import Corpus, CorpusSizes, source_ids
from lloco_engine.eval.machine import PeakMemory
from lloco_engine.eval.plot import draw
from lloco_engine.eval.timing import median_ratio
from lloco_engine.testing import HashingEmbedder, save_tiny_decoder

KEYS = [
    "ttft_retrieved_over_no_context", "decode_retrieved_over_no_context",
    "ttft_whole_over_no_context", "decode_whole_over_no_context", "in_context_ttft_over_lloco",
    "decode_over_transformers_generate", "compress_over_prefill", "bytes_per_source_token", "peak_memory_mb", "details",
]  # fmt: skip
TINY = BenchConfig(
    source_tokens=1600,
    repeats=2,
    shortest=400,
    segment_tokens=96,
    new_tokens=4,
    reference_context=64,
    reference_tokens=6,
    compressor="uncompressed",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_decoder(tmp_path_factory.mktemp("bench") / "tiny")


@pytest.fixture(scope="module")
def decoder(folder) -> LocalDecoder:
    return LocalDecoder.load(str(folder))


@pytest.fixture(scope="module")
def result(decoder, tmp_path_factory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("stores")
    return bench.run(TINY, decoder=decoder, embedder=HashingEmbedder(), folder=place)


def test_the_keys_are_there_in_order_and_finite(result):
    assert list(result) == KEYS
    for name in KEYS[:-1]:
        values = result[name].values() if isinstance(result[name], dict) else [result[name]]
        assert values and all(isinstance(v, float) and math.isfinite(v) and v > 0 for v in values), name
    assert list(result["ttft_whole_over_no_context"]) == list(result["decode_whole_over_no_context"])
    assert list(result["ttft_whole_over_no_context"]) == ["400", "800", "1600"]
    assert list(result["in_context_ttft_over_lloco"]) == ["400", "800"], "the decoder's window is 1024"
    json.dumps(result, allow_nan=False)


def test_the_details_say_what_was_measured(result):
    details = result["details"]
    assert details["retrieved"]["segments"] == 4 and details["retrieved"]["source_tokens"] == 4 * 96
    assert details["retrieved"]["store_source_tokens"] == 1600
    assert details["whole"]["1600"]["source_tokens"] == 1600 and details["whole"]["1600"]["segments"] == 17
    assert set(details["retrieved"]["seconds"]) == {"search_s", "open_s", "read_s", "place_s", "prefill_s"}
    assert set(details["whole"]["400"]["seconds"]) == {"list_s", "search_s", "open_s", "read_s", "place_s", "prefill_s"}
    assert details["retrieved"]["bytes_read"] > 4 * 96 * 2 * 2 * 2 * 8 * 2  # keys and values of 2 layers, 2 heads of 8
    assert details["retrieved"]["ttft_over_no_context_with_embedding"] > 0
    assert details["in_context"]["400"]["text_tokens"] == 400
    assert details["in_context"]["400"]["prompt_tokens"] > 400
    sizes = details["bytes_per_source_token"]
    assert sizes["int8"]["segments"] < sizes["float16"]["segments"] < sizes["float16"]["store"]
    assert {"versions", "hardware", "date", "seconds", "config"} <= set(details)


def test_answers_have_the_same_number_of_tokens_and_the_decoder_is_as_before(decoder, tmp_path, monkeypatch):
    eos, counts = set(decoder.eos), []
    kept = decoder.stream

    def stream(prompt: Any, config: Any) -> Any:
        assert config.temperature == 0 and not (config.lookup and decoder.eos == set())
        generation, text = kept(prompt, config)
        counts.append((generation, config.max_new_tokens))
        return generation, text

    monkeypatch.setattr(decoder, "stream", stream)
    monkeypatch.setattr(decoder, "eos", set(range(decoder.shape.vocabulary)))  # else any token would end an answer
    sizes = CorpusSizes(96, 16, 30, (400,))
    with Corpus(decoder, registry.get("uncompressed"), HashingEmbedder(), sizes, folder=tmp_path) as corpus:
        from lloco_engine.eval.costs import QuestionCosts
        from lloco_engine.eval.timing import never_ending

        config = replace(TINY, source_tokens=400, shortest=400, repeats=1)
        costs = QuestionCosts(
            config, decoder, HashingEmbedder(), corpus, PeakMemory(decoder.runner.device), lambda *_: None
        )
        with never_ending(decoder):
            costs.retrieved()
    assert counts and all(len(generation.token_ids) == wanted for generation, wanted in counts)
    assert decoder.eos == set(range(decoder.shape.vocabulary)) and eos


def test_answers_that_differ_from_transformers_give_no_ratio(decoder, monkeypatch):
    ask = {"context_tokens": 64, "new_tokens": 6, "repeats": 1, "progress": lambda *_: None}
    same = reference.against_transformers(decoder, **ask)
    assert same["equal"] and same["ratio"] > 0 and same["ratio_without_lookup"] > 0
    assert all(row["equal"] and row["prompt_tokens"] > 64 for row in same["prompts"])
    ours = reference._ours
    monkeypatch.setattr(reference, "_ours", lambda *args, **more: replace(ours(*args, **more), token_ids=(1, 2, 3)))
    differing = reference.against_transformers(decoder, **ask)
    assert not differing["equal"] and differing["ratio"] is None and differing["ratio_without_lookup"] is None


def test_the_source_is_as_long_as_asked_and_does_not_repeat(decoder):
    ids = source_ids(decoder.tokenizer, 200_000)
    assert len(ids) == 200_000
    assert ids[:5_000] == source_ids(decoder.tokenizer, 5_000), "a shorter source is the beginning of a longer one"
    chunks = {tuple(ids[at : at + 1536]) for at in range(0, 200_000 - 1536, 1536)}
    assert len(chunks) == 130


class CountingCompressor(type(registry.get("uncompressed"))):
    """Remembers the lengths of the chunks that it was given, and may stop."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.stop_after = 10**9

    def make(self, decoder: Any, token_ids: Any, ratios: Any) -> Any:
        if len(self.lengths) >= self.stop_after:
            raise KeyboardInterrupt
        self.lengths.append(len(token_ids))
        return super().make(decoder, token_ids, ratios)


def test_the_source_is_compressed_once_goes_on_and_grows(decoder, tmp_path):
    compressor = CountingCompressor()
    compressor.stop_after = 3

    def corpus(*lengths: int) -> Corpus:
        sizes = CorpusSizes(96, 16.0, 30.0, lengths)
        return Corpus(decoder, compressor, HashingEmbedder(), sizes, folder=tmp_path)

    with pytest.raises(KeyboardInterrupt):
        corpus(200, 400)
    compressor.stop_after = 10**9
    with corpus(200, 400) as made:
        assert sorted(compressor.lengths) == [8, 16, 96, 96, 96, 96], "nothing that was done is done again"
        assert [hit.source_tokens for hit in made.whole.chunks("source-200")] == [96, 96, 8]
        assert made.retrieved.stats()["source_tokens"] == 400
        assert not made.retrieved.verify() and not made.whole.verify()
        assert made.chunk_ids()[1] == made.ids[96:192]
    with corpus(200, 400):
        assert len(compressor.lengths) == 6
    with corpus(200, 400, 600) as made:
        assert sorted(compressor.lengths[6:]) == [24, 96, 96]
        assert made.retrieved.stats()["source_tokens"] == 600
    with corpus(200) as made:
        assert len(compressor.lengths) == 9 and made.retrieved.stats()["source_tokens"] == 600


def test_a_ratio_is_the_median_of_pairs():
    assert median_ratio([(1.0, 2.0), (10.0, 30.0), (2.0, 100.0)]) == 3.0


def test_lengths_double_up_to_the_longest():
    assert BenchConfig().lengths == (2048, 4096, 8192, 16384, 32768, 65536, 131072)
    assert BenchConfig(source_tokens=5000).lengths == (2048, 4096, 5000)
    with pytest.raises(ConfigError, match="source_tokens must be at least 2048, not 100"):
        BenchConfig(source_tokens=100)
    with pytest.raises(ConfigError, match="repeats at least 1"):
        BenchConfig(repeats=0)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_plot_is_drawn(result, tmp_path, suffix):
    path = tmp_path / f"bench.{suffix}"
    draw(result, path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG" if suffix == "png" else b"<?xml") and len(data) > 5_000
    with pytest.raises(ConfigError, match=r"must end in \.png or \.svg, not '\.pdf'"):
        draw(result, path.with_suffix(".pdf"))


def test_peak_memory_sees_what_was_held():
    import torch

    memory = PeakMemory(torch.device("cpu"))
    with memory.phase("large"):
        held = torch.ones(50_000_000)  # 200 MB
        del held
    with memory.phase("small"):
        pass
    assert memory.highest > 200
    if memory.phases:  # the system can tell phases apart
        assert memory.highest >= memory.phases["large"] > memory.phases["small"] + 150


def test_the_command_ends_with_one_line_of_json(result, folder, tmp_path, monkeypatch):
    from lloco_engine.cli import app

    seen: list[BenchConfig] = []
    monkeypatch.setattr(bench, "run", lambda config, progress: seen.append(config) or result)
    out, plot = tmp_path / "new" / "bench.json", tmp_path / "bench.svg"
    command = ["bench", "--json", str(out), "--plot", str(plot), "--source-tokens", "4096", "--repeats", "3"]
    done = CliRunner().invoke(app, [*command, "--decoder", str(folder)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1]) == result == json.loads(out.read_text())
    assert plot.exists()
    assert (seen[0].source_tokens, seen[0].repeats, seen[0].decoder) == (4096, 3, str(folder))
    bad = CliRunner().invoke(app, ["bench", "--plot", "bench.gif"])
    assert bad.exit_code == 1 and ".png or .svg" in bad.output and len(seen) == 1
