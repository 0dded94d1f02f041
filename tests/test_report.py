"""`lloco report`: tables and plots of what eval and bench wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lloco_engine.cli import app
from lloco_engine.errors import ConfigError, DocumentError
from lloco_engine.eval.report import write_report

PNG = b"\x89PNG\r\n\x1a\n"


def evaluation(**changes: Any) -> dict[str, Any]:
    def row(method: str, ratio: float | None, adapter: str, loss: float) -> dict[str, Any]:
        return {
            "method": method, "ratio": ratio, "adapter": adapter, "documents": 4, "questions": 20, "loss": loss,
            "recovered": None if method == "none" else 0.5, "f1": 0.25, "rouge_l": None, "success": 0.75,
            "prompt_slots": 0.0 if ratio is None else 1500 / ratio, "prompt_tokens": 40.0, "source_tokens": 1500.0,
            "intervals": {"loss": [loss - 0.125, loss + 0.25]},
        }  # fmt: skip

    about = [(m, r, a) for a in ("none", "law") for m, r in (("none", None), ("full", None), ("kv", 8), ("kv", 32))]
    rows = [row(m, r, a, 3 - 0.1 * n) for n, (m, r, a) in enumerate(about)]
    cells = [
        {"length": length, "depth": depth, "method": m, "ratio": r, "adapter": a, "success": (n + depth) % 3 / 2}
        for n, (m, r, a) in enumerate(about)
        for length in (1024, 2048)
        for depth in (0, 50, 100)
    ]
    against = {"method": "full", "ratio": None, "adapter": "none"}
    difference = {"method": "kv", "ratio": 8, "adapter": "law", "against": against,
                  "metrics": {"loss": {"difference": -0.5, "interval": [-0.75, -0.25]},
                              "success": {"difference": 0.05, "interval": [-0.01, 0.125]}}}  # fmt: skip
    config = {
        "task": "needle", "data": "essays", "decoder": {"name": "embedded"}, "compressor": {"name": "x"},
        "notes": ["something was cut"], "hardware": {"processor": "P", "threads": 2, "dtype": "float32"},
        "versions": {"lloco": "0.1", "torch": "2"}, "date": "2026-01-01",
    }  # fmt: skip
    return {"config": config, "results": rows, "differences": [difference], "cells": cells} | changes


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "needles.json"
    path.write_text(json.dumps(evaluation()))
    return path


def test_a_report_has_a_table_and_every_plot_that_can_be_drawn(saved, tmp_path):
    out = tmp_path / "report"
    done = CliRunner().invoke(app, ["report", str(saved), "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    names = {path.name for path in out.iterdir()}
    assert names == {"report.md", "needles-ratio.png", "needles-prompt.png", "needles-needles.png"}
    assert all((out / name).read_bytes().startswith(PNG) for name in names if name.endswith("png"))
    assert {line.rpartition("/")[2] for line in done.stdout.split()} == names
    text = (out / "report.md").read_text()
    assert "| kv | law | 32 | 2.300 [2.175, 2.550] | 0.500 | 0.250 | 0.750 | 40 | 47 | 1,500 |" in text
    assert "| method | adapter | ratio | against | loss | F1 | success |" in text
    assert "| **-0.500 [-0.750, -0.250]** | - | +0.050 [-0.010, +0.125] |" in text and "something was cut" in text
    assert "ROUGE" not in text, "a score that no row has is left out"
    assert all(f"]({name})" in text for name in names if name.endswith("png"))


def test_a_result_of_an_older_version_is_shown_too(tmp_path):
    """Without intervals, differences, task and cells; the committed first result is one."""
    old = Path(__file__).parents[1] / "results" / "wikifacts.json"
    written = write_report([old], tmp_path)
    assert [path.name for path in written] == ["report.md", "wikifacts-ratio.png", "wikifacts-prompt.png"]


def test_a_bench_is_drawn_by_its_own_plot(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("lloco_engine.eval.plot.draw", lambda result, path: drawn.append(path))
    bench = {"bytes_per_source_token": 1400.0, "in_context_ttft_over_lloco": {"2048": 20.0}, "peak_memory_mb": None,
             "details": {"hardware": {}, "versions": {}}}  # fmt: skip
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(bench))
    written = write_report([path], tmp_path / "out")
    assert drawn == [tmp_path / "out" / "bench-time.png"]
    assert "| in_context_ttft_over_lloco | 2,048: 20.000 |" in written[0].read_text()


def test_what_is_no_result_is_refused(saved, tmp_path):
    for text, message in (("[1]", "must be what lloco eval or lloco bench wrote"), ("{", "must be JSON")):
        path = tmp_path / "bad.json"
        path.write_text(text)
        with pytest.raises(DocumentError, match=message):
            write_report([path], tmp_path / "out")
    with pytest.raises(DocumentError, match="cannot be read"):
        write_report([tmp_path / "none.json"], tmp_path / "out")
    with pytest.raises(ConfigError, match="'needles' comes twice"):
        write_report([saved, saved], tmp_path / "out")
    assert not (tmp_path / "out").exists()
