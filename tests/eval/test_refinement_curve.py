"""The table of what refinement is worth and costs, on a tiny decoder."""

from __future__ import annotations

import json

import pytest

from lloco_engine.compress.attention_matching import AttentionMatching
from lloco_engine.config import PrefixConfig
from lloco_engine.decoder.local import Prompt
from lloco_engine.eval import refinement_curve
from lloco_engine.prefix import place

TEXT = "The mill at Orne has three wheels. Its keeper, Ada Brandt, came from the north in 1874 and never left."
ASKED = [("Who kept the mill?", "Ada Brandt"), ("How many wheels?", "three")]


def test_every_row_is_what_the_decoder_says_of_it(tmp_path, tiny_folder, tiny_loaded, capsys):
    questions = [{"id": str(n), "question": q, "answers": [a]} for n, (q, a) in enumerate(ASKED)]
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"doc_id": "a", "title": "", "text": TEXT, "source": "", "questions": questions}))
    options = ["--decoder", str(tiny_folder), "--chunks", "1", "--ratios", "8", "--runs", "2:32,1:0,1:0:0.5:0.25"]
    refinement_curve.main([str(data), *options, "--plot", str(tmp_path / "curve.svg")])
    shown = capsys.readouterr().out
    for name in (
        "none",
        "full",
        "8x fit",
        "8x 2 steps of 32",
        "8x 1 steps of all",
        "8x 1 steps of all, values 0.5, pace 0.25",
    ):
        assert f"  {name} " in shown
    drawn = (tmp_path / "curve.svg").read_text()
    assert "<svg" in drawn
    curve = refinement_curve.Curve(tiny_loaded, [8], refinement_curve._runs("2:32"))
    curve.add(TEXT, ASKED)
    rows = {row["row"]: row for row in curve.rows()}
    assert rows["none"]["recovered"] == 0
    assert rows["full"]["recovered"] == 1
    fit = AttentionMatching().compress(tiny_loaded, tiny_loaded.template.text_ids(TEXT), [8])[0]
    prefix = place([fit], PrefixConfig(), template_tokens=tiny_loaded.template_tokens)
    losses = tiny_loaded.answer_losses([Prompt(q, prefix) for q, _ in ASKED], [a for _, a in ASKED])
    assert rows["8x fit"]["loss"] == pytest.approx(sum(one for one, _ in losses) / sum(many for _, many in losses))
    assert rows["8x 2 steps of 32"]["held_out"] <= rows["8x fit"]["held_out"]
    assert rows["8x 2 steps of 32"]["prefills"] > 0
    assert rows["8x 2 steps of 32"]["seconds"] > rows["8x fit"]["seconds"] > 0
