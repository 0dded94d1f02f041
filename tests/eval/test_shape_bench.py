"""What `lloco bench --shape` measures, on a tiny shape: every figure is there, and nothing is measured twice."""

from __future__ import annotations

import pytest
import torch

from lloco_engine.config import RefineConfig
from lloco_engine.errors import ConfigError
from lloco_engine.eval import shape_bench
from lloco_engine.eval.shape_bench import ShapeConfig, run
from lloco_engine.eval.shapes import CHUNK, document, random_decoder

CONFIG = ShapeConfig("tiny", "cpu", source_tokens=256, repeats=1)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(shape_bench, "CHUNK", 64)
    monkeypatch.setattr(shape_bench, "_MOST", 3)
    monkeypatch.setattr(shape_bench, "_STEPS", 2)
    monkeypatch.setattr(shape_bench, "RefineConfig", lambda: RefineConfig(steps=1, stretch=16))


def test_a_run_cut_off_goes_on_where_it_stopped_and_has_all_figures(tmp_path, monkeypatch):
    output, asked = tmp_path / "out.json", []
    compress = shape_bench._Measured._compress

    def cut_off(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(shape_bench._Measured, "_compress", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run(CONFIG, output)
    monkeypatch.setattr(shape_bench._Measured, "_compress", compress)
    for name in ("_in_context", "_lloco", "_size"):
        monkeypatch.setattr(shape_bench._Measured, name, lambda *given: asked.append(given))
    result = run(CONFIG, output)

    assert not asked
    measured = result["measured"]
    assert {name.partition(".")[0] for name in measured} >= {"decoder", "in_context", "padded", "compress"}
    assert measured["in_context.256"].keys() >= {"ttft_s", "step_s", "bytes_a_user", "users", "tokens_per_s"}
    mine, text = measured["padded.256.16"], measured["in_context.256"]
    assert 0 < mine["bytes_a_user"] < text["bytes_a_user"]
    assert result["over_in_context"]["padded.256.16"]["first_token"] == text["ttft_s"] / mine["ttft_s"]
    assert measured["compress"]["refine_steps"] == 1


def test_a_document_has_the_slots_of_its_ratio_spread_unevenly():
    decoder = random_decoder("tiny", torch.device("cpu"), torch.float32)
    prefix = document(decoder, 2 * CHUNK + 100, 16.0, focus=2)

    assert [each.source_tokens for each in prefix.compact] == [CHUNK, CHUNK, 100]
    first = prefix.compact[0]
    assert first.slots == pytest.approx(CHUNK / 16, rel=0.05)
    assert first.lengths.max() > 2 * first.lengths.min()
    assert prefix.start == decoder.template_tokens + CHUNK


def test_a_device_without_room_for_more_is_given_fewer_users(monkeypatch):
    tried = []

    def step_s(users: int) -> float:
        tried.append(users)
        if users > 1:
            raise torch.OutOfMemoryError
        return 0.5

    measured = shape_bench._Measured(CONFIG)
    assert measured._most_users(1, step_s) == (1, 0.5)
    assert tried == [3, 2, 1]


def test_an_unknown_shape_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"shape must be one of llama-2-7b, .*, not 'gpt'"):
        ShapeConfig("gpt")
