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
from lloco_engine.config import GenerateConfig, PrefixConfig, RetrieveConfig
from lloco_engine.decoder.local import LocalDecoder
from lloco_engine.engine import Engine
from lloco_engine.errors import ConfigError, StoreMismatch
from lloco_engine.eval import bench, reference
from lloco_engine.eval.bench import BenchConfig
from lloco_engine.eval.corpus import parts, source_ids
from lloco_engine.eval.machine import PeakMemory
from lloco_engine.eval.plot import draw
from lloco_engine.eval.timing import median_ratio
from lloco_engine.testing import HashingEmbedder, save_tiny_decoder
from lloco_engine.types import Answer

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
    assert details["retrieved"]["segments"] == 4 and 3 * 96 < details["retrieved"]["source_tokens"] <= 4 * 96
    assert details["retrieved"]["store_source_tokens"] == pytest.approx(1600, rel=0.02)
    assert details["whole"]["1600"]["source_tokens"] == details["retrieved"]["store_source_tokens"]
    assert 5 + 5 + 9 <= details["whole"]["1600"]["segments"] <= 5 + 5 + 10, "of 400, 400 and 800 tokens"
    assert details["whole"]["400"]["segments"] == 5
    for part in (details["retrieved"], details["whole"]["400"]):
        assert set(part["seconds"]) == {"retrieve_s", "load_s", "decoder_s"}
        assert sum(part["seconds"].values()) == pytest.approx(part["ttft_s"], rel=0.5)
    assert (
        details["retrieved"]["bytes_read"] > 4 * 96 * 2 * 2 * 8
    )  # keys and values of 2 layers, 2 heads of 8, half a byte
    assert details["retrieved"]["ttft_over_no_context_with_embedding"] > 0
    assert details["retrieved"]["decode_over_no_context_without_lookup"] > 0
    assert details["in_context"]["400"]["prompt_tokens"] > 400
    sizes = details["bytes_per_source_token"]
    assert sizes["int4"]["segments"] < sizes["int8"]["segments"] < sizes["float16"]["segments"]
    assert sizes["float16"]["segments"] < sizes["float16"]["store"]
    assert result["bytes_per_source_token"] == sizes[details["config"]["dtype"]]["store"]
    assert {"versions", "hardware", "date", "seconds", "config"} <= set(details)


def test_what_is_timed_is_what_the_engine_does_by_default(decoder, tmp_path, monkeypatch):
    """Adapter, hints, guesses, placing and search are those of a question without options; the length alone is set."""
    calls: list[tuple[dict[str, Any], Answer]] = []
    ask = Engine.ask

    def noted(self: Engine, question: str, **options: Any) -> Answer:
        calls.append((options, ask(self, question, **options)))
        return calls[-1][1]

    monkeypatch.setattr(Engine, "ask", noted)
    monkeypatch.setattr(decoder, "eos", set(range(0, decoder.shape.vocabulary, 2)))  # most tokens would end an answer
    config = replace(TINY, source_tokens=400, repeats=1)
    settings = bench.run(config, decoder=decoder, embedder=HashingEmbedder(), folder=tmp_path)["details"]["settings"]
    assert settings == {
        "adapter": "none",  # there is none for this decoder
        "generate": GenerateConfig(4, min_new_tokens=4).to_json() | {"stop": [], "hints": []},  # as JSON has it
        "prefix": PrefixConfig().to_json(),
        "retrieve": RetrieveConfig(top_k=4).to_json(),
    }
    assert {name for options, _ in calls for name in options} == {"generate", "hits", "whole_document"}
    assert {options["generate"] for options, _ in calls} == {
        GenerateConfig(4, min_new_tokens=4),
        GenerateConfig(4, min_new_tokens=4, lookup=False),
        GenerateConfig(1),
    }
    assert all(len(answer.token_ids) == options["generate"].max_new_tokens
               for options, answer in calls if options["generate"] != GenerateConfig(1))  # fmt: skip
    firsts = [options for options, _ in calls if options["generate"] == GenerateConfig(1)]
    assert len(firsts) == 2 * len(config.lengths), "once to warm up, and once beside the text in context"
    assert {len(answer.hits) for options, answer in calls if "whole_document" in options} == {5}
    assert {len(answer.hits) for options, answer in calls if "hits" in options} == {0}


def test_answers_that_differ_from_transformers_give_no_ratio(decoder, monkeypatch):
    ask = {"context_tokens": 64, "new_tokens": 6, "repeats": 1, "progress": lambda *_: None}
    same = reference.against_transformers(decoder, **ask)
    assert same["equal"] and same["ratio"] > 0 and same["ratio_without_lookup"] > 0
    assert all(row["equal"] and row["prompt_tokens"] > 64 for row in same["prompts"])
    ours = reference._ours
    monkeypatch.setattr(reference, "_ours", lambda *args, **more: replace(ours(*args, **more), token_ids=(1, 2, 3)))
    differing = reference.against_transformers(decoder, **ask)
    assert not differing["equal"] and differing["ratio"] is None and differing["ratio_without_lookup"] is None


def test_speeds_of_prompts_that_keep_many_guesses_and_few_are_weighed_alike(decoder, monkeypatch):
    speeds = iter([(1, 1, 1), (1, 5, 4), (1, 3, 2), (1, 9, 8), (1, 2, 1), (1, 12, 4)] * 2)

    def runs(*_: Any) -> list[Any]:
        return [tuple(reference._Decoded((1, 2), float(speed), 1) for speed in next(speeds)) for _ in range(3)]

    monkeypatch.setattr(reference, "_runs", runs)
    found = reference.against_transformers(
        decoder, context_tokens=64, new_tokens=6, repeats=3, progress=lambda *_: None
    )
    assert found["ratio"] == pytest.approx(27**0.5), "medians of 3 and 9, twice"
    assert found["ratio_without_lookup"] == pytest.approx(8**0.5), "medians of 2 and 4, twice"


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


def test_the_source_is_compressed_once_for_both_stores_and_goes_on(decoder, tmp_path):
    compressor = CountingCompressor()
    compressor.stop_after = 3
    config = replace(TINY, source_tokens=400, shortest=200)
    source = parts(decoder.tokenizer, config.lengths)
    assert "".join(document.text for document in source.values()) == decoder.tokenizer.decode(
        source_ids(decoder.tokenizer, 400)
    )

    def engines() -> list[Engine]:
        embedder = HashingEmbedder()
        return bench._engines(config, decoder, embedder, compressor, source, tmp_path, lambda *_: None)[0]

    with pytest.raises(KeyboardInterrupt):
        engines()
    compressor.stop_after = 10**9
    for engine, ratio in zip(engines(), (16, 30), strict=True):
        with engine:
            assert engine.manifest.ratio == ratio and not engine.verify()
            assert [info.segments for info in engine.documents()] == [3, 3]
            assert engine.stats()["source_tokens"] == sum(compressor.lengths)
    assert len(compressor.lengths) == 6, "nothing that was done is done again"
    assert not (tmp_path / "made").exists()
    for engine in engines():
        engine.close()
    assert len(compressor.lengths) == 6
    with pytest.raises(StoreMismatch, match="to have it made again"):
        bench._engines(replace(config, ratio=8), decoder, HashingEmbedder(), compressor, source, tmp_path, print)


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
    assert "engine does by default: adapter none, guesses ahead on, hints none, focus 2" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1]) == result == json.loads(out.read_text())
    assert plot.exists()
    assert (seen[0].source_tokens, seen[0].repeats, seen[0].decoder) == (4096, 3, str(folder))
    bad = CliRunner().invoke(app, ["bench", "--plot", "bench.gif"])
    assert bad.exit_code == 1 and ".png or .svg" in bad.output and len(seen) == 1
