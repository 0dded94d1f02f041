"""The demo's program, on a tiny decoder: it runs, goes on, and measures the baseline as the engine does."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lloco_engine.baselines import in_context, room_for_text, whole
from lloco_engine.config import ChunkConfig, CompressConfig, GenerateConfig
from lloco_engine.demo import __main__ as program
from lloco_engine.demo import documents_folder, questions
from lloco_engine.demo.in_context import InContext
from lloco_engine.errors import ConfigError, StoreMismatch
from lloco_engine.testing import HashingEmbedder

SHORT = GenerateConfig(max_new_tokens=6)


@pytest.fixture
def options(decoder, tmp_path, monkeypatch):
    monkeypatch.setenv("LLOCO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(program, "_GENERATE", SHORT)
    return {
        "decoder": decoder,
        "embedder": HashingEmbedder(),
        "compress": CompressConfig("uncompressed", 16),
        "chunk": ChunkConfig(160, 60, 10),
    }


def test_a_quick_run_and_the_next_one(options, capsys, tmp_path):
    assert program.run(["--quick"], **options) == 0
    first = capsys.readouterr().out
    assert "brindle-weir-judgment.md" in first
    assert "Compressed " in first
    assert "reading " in first
    assert first.count("expected    ") == 2
    assert "the middle is cut out" in first
    for part in (
        "source tokens as",
        "slots for",
        "first token after",
        "tokens/s",
        "Gideon and Absalom Marsh",
        "source  ",
        "text retrieval",
    ):
        assert part in first
    assert "from the first run" not in first
    assert (tmp_path / "cache" / "demo" / "store-16" / "manifest.json").exists()
    assert program.run(["--quick"], **options) == 0
    second = capsys.readouterr().out
    assert "Nothing had to be compressed" in second
    assert "reading " not in second
    assert second.count(", from the first run") == 2
    assert "in context (first run)" in second
    answers = [[line for line in out.splitlines() if line.startswith("    in context")] for out in (first, second)]
    assert answers[0] == answers[1]


def test_its_own_store_is_made_again_when_it_no_longer_fits_but_not_anothers(options, capsys, tmp_path):
    mine = tmp_path / "mine"
    assert program.run(["--quick", "--store", str(mine)], **options) == 0
    assert not (tmp_path / "cache" / "demo" / "store-16").exists()
    assert program.run(["--quick"], **options) == 0
    other = options | {"chunk": ChunkConfig(200, 60, 10)}
    assert program.run(["--quick"], **other) == 0
    assert "made again: chunk of the store" in capsys.readouterr().out
    with pytest.raises(StoreMismatch):
        program.run(["--quick", "--store", str(mine)], **other)
    assert (mine / "manifest.json").exists()


def test_the_whole_run_asks_about_every_file():
    from lloco_engine.readers import read_paths

    asked = program._chosen_questions(list(read_paths([documents_folder()])), quick=False)
    assert len(asked) == 6
    assert len({question.doc_id for question in asked}) == 6


def test_reading_once_gives_the_baselines_own_answer(decoder, tmp_path):
    text = "The pump in hall three needs oil. " * 90
    asked = ["Who repaired it?", "What does the pump in hall three need, and why does nobody know?"]
    lines: list[str] = []
    mine = InContext(decoder, [text], asked, SHORT, tmp_path / "kept.json", lines.append)
    assert mine.text.left_out > 0
    for question in asked:
        answer, kept = mine.ask(question)
        assert not kept
        assert answer.usage.prompt_tokens == len(mine.text.ids) + len(decoder.template.question_ids(question))
        assert answer.usage.prompt_slots == 0
    assert len(lines) == 1
    longest = max(asked, key=len)  # its room was the measure, so here both read the very same tokens
    assert mine.text == whole(decoder, [text], room_for_text(decoder, longest, SHORT))
    assert mine.ask(longest)[0].text == in_context(decoder, [text], longest, SHORT).text


def test_kept_answers_are_for_the_same_text_question_and_decoder(decoder, tmp_path):
    file = tmp_path / "kept.json"

    def ask(text: str = "Some text.", question: str = "Why?", generate: GenerateConfig = SHORT):
        return InContext(decoder, [text], [question], generate, file, lambda _: None).ask(question)

    first, kept = ask()
    assert not kept
    assert ask() == (first.__class__(first.text, usage=first.usage, finish=first.finish), True)
    assert not ask(text="Another text.")[1]
    assert not ask(question="How?")[1]
    assert not ask(generate=GenerateConfig(max_new_tokens=7))[1]
    assert ask()[1]
    for broken in ("nonsense", "[]", json.dumps({key: {"text": 1} for key in json.loads(file.read_text())})):
        file.write_text(broken)
        assert not ask()[1]


def test_an_error_is_one_line_and_an_interrupt_says_how_to_go_on(monkeypatch, capsys):
    assert program.main(["--ratio", "0.5"]) == 1
    assert capsys.readouterr().err.startswith("error: ratio must be at least 1")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "run", interrupted)
    assert program.main([]) == 130
    assert "goes on from here" in capsys.readouterr().err


def test_help_is_quick_and_loads_no_model_library():
    code = (
        "import sys; from lloco_engine.demo.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print([m for m in ('torch', 'transformers', 'faiss') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--quick" in out
    assert out.endswith("[]\n")


def test_a_ratio_out_of_range_is_the_configs_error():
    assert len(questions()) > 6
    with pytest.raises(ConfigError):
        program.run(["--ratio", "0"])
