"""`lloco report`: a page of tables, commands and plots of what measurements wrote."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from places import ROOT
from typer.testing import CliRunner

from lloco_engine.cli import app
from lloco_engine.errors import ConfigError, DocumentError
from lloco_engine.eval import tables
from lloco_engine.eval.commands import command
from lloco_engine.eval.report import PLAN, check_report, read_report, write_report

PNG = b"\x89PNG\r\n\x1a\n"
RESULTS = sorted((ROOT / "results").glob("*.json"))


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
        "methods": ["none", "full", "kv"], "ratios": [8, 32.0], "adapter": "none,law", "limit": 4,
        "notes": ["something was cut"], "hardware": {"processor": "P", "threads": 2, "dtype": "float32"},
        "versions": {"lloco": "0.1", "torch": "2"}, "date": "2026-01-01",
    }  # fmt: skip
    return {"config": config, "results": rows, "differences": [difference], "cells": cells} | changes


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "needles.json"
    path.write_text(json.dumps(evaluation()))
    return path


def test_a_page_has_the_table_the_command_and_every_plot_that_can_be_drawn(saved, tmp_path):
    page = tmp_path / "page" / "report.md"
    done = CliRunner().invoke(app, ["report", str(saved), "--out", str(page)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    names = {str(path.relative_to(page.parent)) for path in page.parent.rglob("*") if path.is_file()}
    assert names == {"report.md", *(f"report/needles-{kind}.png" for kind in ("ratio", "prompt", "needles"))}
    assert all((page.parent / name).read_bytes().startswith(PNG) for name in names if name.endswith("png"))
    assert {str(Path(line).relative_to(page.parent)) for line in done.stdout.split()} == names
    text = page.read_text()
    assert "| compact KV | law | 32x | 2.300 [2.175, 2.550] | 0.500 | 0.250 | 0.750 | 40 | 47 | 1,500 |" in text
    assert "| the decoder reads | adapter | ratio | less | loss | F1 | success |" in text
    assert "| full text, adapter none | **-0.500 [-0.750, -0.250]** | - | +0.050 [-0.010, +0.125] |" in text
    assert "* something was cut" in text and "ROUGE" not in text, "a score that no row has is left out"
    assert "lloco eval --task needle --data-folder DATA --limit 4 --ratios 8,32 --adapter none,law" in text
    assert all(f"]({name})" in text for name in names if name.endswith("png"))


def test_results_of_one_section_share_a_table_with_what_tells_them_apart(tmp_path):
    for name, segments in (("two", 2), ("four", 4)):
        value = evaluation(cells=[], differences=[])
        value["config"] |= {"segments": segments, "task": "plain", "data": "a.jsonl"}
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    plan = '[[section]]\ntitle = "Both"\nresults = ["two", "four"]\nscores = ["f1"]\nplots = []\n'
    (tmp_path / PLAN).write_text(plan)
    made = read_report([tmp_path / "four.json", tmp_path / "two.json"], tmp_path / "p.md")
    assert "| segments | the decoder reads | adapter | ratio | loss | recovered | F1 | text tokens |" in made.text
    assert "| 4 | compact KV | law | 8x | 2.400 [2.275, 2.650] | 0.500 | 0.250 | 40 |" in made.text
    assert made.text.index("| 2 | compact KV") < made.text.index("| 4 | compact KV") and not made.pictures
    assert "lloco eval --data a.jsonl --limit 4 --ratios 8,32 --segments 2" in made.text


def test_a_result_that_the_plan_does_not_name_is_not_left_out(saved, tmp_path):
    (tmp_path / PLAN).write_text('title = "T"\n')
    assert "## needles" in read_report([saved], tmp_path / "p.md").text
    (tmp_path / PLAN).write_text('[[section]]\ntitle = "T"\nresults = ["gone"]\n')
    with pytest.raises(ConfigError, match=r"there is no gone\.json"):
        read_report([saved], tmp_path / "p.md")
    (tmp_path / PLAN).write_text('[[section]]\ntitle = "T"\nresult = ["needles"]\n')
    with pytest.raises(DocumentError, match="must be TOML"):
        read_report([saved], tmp_path / "p.md")


@pytest.mark.parametrize(
    ("method", "ratio", "config", "expected"),
    [
        ("kv_guided", 16, {"answers": True, "pointing": 8.0}, ("spelling", "pointing")),
        ("kv_retrieved", 16, {"answers": True, "pointing": 0.0}, ("spelling",)),
        ("kv_retrieved", 16, {"answers": True, "beams": 4}, ()),
        ("kv_retrieved", 16, {"answers": False}, ()),
        ("text_retrieved", None, {"answers": True}, ()),
        ("text_slots_retrieved", 16, {"answers": True}, ()),
        ("kv", 16, {"answers": True}, ()),
    ],
)
def test_a_row_says_what_helped_its_answers(method, ratio, config, expected):
    assert tables.hints_of({"method": method, "ratio": ratio}, config) == expected
    assert tables.hints_of({"method": method, "ratio": ratio, "hints": ["spelling"]}, config) == ("spelling",)


def test_a_check_sees_a_changed_page_and_a_picture_of_another_result(saved, tmp_path):
    page = tmp_path / "r.md"
    made = read_report([saved], page)
    with pytest.raises(ConfigError, match="Fix: lloco report"):
        check_report(made)
    write_report(made)
    check_report(made)
    page.write_text(made.text.replace("2.300", "2.301"))
    with pytest.raises(ConfigError, match=r"r\.md must be what the results say; line \d+ is .*2\.301"):
        check_report(made)
    page.write_text(made.text)
    changed = evaluation()
    changed["config"]["seconds"] = 1.0  # which no table shows
    saved.write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match=r"needles-\w+\.png must be a picture of the result as it is"):
        check_report(read_report([saved], page))


def test_a_bench_is_drawn_by_its_own_plot(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("lloco_engine.eval.plot.draw", lambda result, path: drawn.append(path))
    bench = {"bytes_per_source_token": 1400.0, "in_context_ttft_over_lloco": {"2048": 20.0}, "peak_memory_mb": None,
             "details": {"hardware": {}, "versions": {}, "config": {"source_tokens": 2048, "repeats": 7},
                         "whole": {"2048": {"prompt_slots": 70, "ttft_s": 0.03}}, "in_context": {}}}  # fmt: skip
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(bench))
    written = write_report(read_report([path], tmp_path / "out.md"))
    assert drawn == [tmp_path / "out" / "bench-time.png"]
    text = written[0].read_text()
    assert "| 2,048 | 70 | 0.030 | - |" in text and "| bytes per source token | 1,400 |" in text
    assert "lloco bench --json results/bench.json --source-tokens 2048\n" in text
    assert "Of base weights, with no adapter and no hints" in text, "as benches once asked"
    generate = {"hints": ["spelling"], "lookup": True}
    prefix = {"focus": 2, "relevance": 20.0}
    bench["details"]["settings"] = {"adapter": "law@0123abcd", "generate": generate, "prefix": prefix}
    path.write_text(json.dumps(bench))
    text = read_report([path], tmp_path / "out.md").text
    assert "adapter law, guesses ahead on, hints spelling, focus 2, relevance 20." in text


def test_what_is_no_result_is_refused(saved, tmp_path):
    page = tmp_path / "out.md"
    for text, message in (("[1]", "must be what lloco eval, bench, memories, scores wrote"), ("{", "must be JSON")):
        path = tmp_path / "bad.json"
        path.write_text(text)
        with pytest.raises(DocumentError, match=message):
            read_report([path], page)
    with pytest.raises(DocumentError, match="cannot be read"):
        read_report([tmp_path / "none.json"], page)
    with pytest.raises(ConfigError, match="'needles' comes twice"):
        read_report([saved, saved], page)
    with pytest.raises(ConfigError, match=r"must be a file whose name ends in \.md"):
        read_report([saved], tmp_path / "report")
    with pytest.raises(ConfigError, match="at least one result"):
        read_report([], page)


# -- the committed results -------------------------------------------------------------------------------------------


def test_the_page_of_results_is_what_the_results_say():
    check_report(read_report(RESULTS, ROOT / "docs" / "results.md"))


def test_words_about_results_have_no_figure():
    plan = tomllib.loads((ROOT / "results" / PLAN).read_text(encoding="utf-8"))
    for text in (plan["text"].replace("95%", ""), *(section.get("text", "") for section in plan["section"])):
        assert not re.search(r"\d[.,]\d|\d%", text), text


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_command_of_a_result_asks_for_what_the_result_is_of(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    kind = tables.kind_of(result)
    parsed = typer.main.get_command(app).commands[kind].make_context(
        kind, shlex.split(command(kind, path.stem, result))[2:], resilient_parsing=True
    ).params  # fmt: skip
    config = result.get("config") or result.get("details", {}).get("config") or result
    assert parsed["json_out"] == Path("results", path.name)
    for name, value in parsed.items():
        if name in ("json_out", "data", "data_folder", "decoder", "compressor", "adapter", "methods", "ratios"):
            continue
        if name in config and value is not None:
            assert value == config[name], name
    if kind == "eval":
        assert [float(each) for each in parsed["ratios"].split(",")] == config["ratios"]
        methods = [re.sub(r"@.*/", "@", each) for each in config["methods"]]
        assert [re.sub(r"@.*/", "@", each) for each in parsed["methods"].split(",")] == methods
        adapters = [each.partition("@")[0] for each in config["adapter"].split(",")]
        assert [Path(each).name for each in parsed["adapter"].split(",")] == adapters
        assert all(each in ("none", "default") or (ROOT / each).is_dir() for each in parsed["adapter"].split(","))
