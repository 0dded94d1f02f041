"""What segments take of a server's memory: the table of docs/scaling.md is what the command prints."""

from __future__ import annotations

import json

from places import ROOT

from lloco_engine.eval import sizes


def test_a_million_tokens_of_llama_31_8b():
    made = sizes.sizes("llama-3.1-8b", 16.0)
    assert made.context == 1_000_000 * 32 * 8 * 128 * 2 * 2 == 131_072_000_000
    assert abs(made.slots / (made.context / 16) - 1) < 0.01
    assert 1.05 < made.pool / made.slots < 1.2
    whole = sizes.sizes("llama-3.1-8b", 16.0, page=1)
    assert abs(whole.pool / whole.slots - (4 * 128 + 4) / (4 * 128)) < 1e-9


def test_the_table_in_the_guide_is_the_one_that_is_printed(capsys):
    assert sizes.main([]) == 0
    assert capsys.readouterr().out in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert sizes.main(["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["shape"] for row in rows} == {"llama-2-7b", "llama-3.1-8b", "qwen3-4b"}
