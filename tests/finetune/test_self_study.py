"""Self-study: what is asked, what is dropped and why, and runs that are cut off."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lloco_engine import Document, Engine
from lloco_engine.chunking import Chunker
from lloco_engine.cli import app
from lloco_engine.compress import registry
from lloco_engine.config import ChunkConfig, CompressConfig
from lloco_engine.decoder.local import Generation, LocalDecoder
from lloco_engine.errors import ConfigError
from lloco_engine.finetune.config import preset
from lloco_engine.finetune.distill import read_teachers
from lloco_engine.finetune.run import DataFile, Finetune
from lloco_engine.finetune.self_study import KINDS, SelfStudy, SelfStudyConfig
from lloco_engine.readers.records import read_records
from lloco_engine.testing import HashingEmbedder
from lloco_engine.types import Hit, Span

ALL = SelfStudyConfig(gain=-1000.0)  # a tiny decoder is not helped by the text


def chunk(number: int) -> Hit:
    text = f"The pump in hall {number} needs {number + 3} litres of oil."
    return Hit(f"s{number}", "pumps.md", number, Span(0, len(text)), text, 12, 1.0)


class Scripted:
    """What the decoder writes: questions by kind, and an answer to each question."""

    def __init__(self, decoder: LocalDecoder, monkeypatch) -> None:
        self.questions = {kind: f"{kind.title()} is in hall {{n}}?" for kind in KINDS}
        self.answer, self.finish, self.calls = "three litres", "stop", 0
        monkeypatch.setattr(decoder, "generate", self.generate)

    def generate(self, prompts, config=None, adapter=None):
        assert adapter is None
        self.calls += 1
        made = []
        for prompt in prompts:
            kind = next((kind for kind, asks in KINDS.items() if asks == prompt.question), None)
            if kind is not None:
                assert prompt.verbatim
                made.append(Generation(pieces=[self.questions[kind].format(n=self.calls)], finish="stop"))
            else:
                made.append(Generation(pieces=[self.answer], finish=self.finish))
        return made


@pytest.fixture
def decoder(decoder_folder) -> LocalDecoder:
    return LocalDecoder.load(str(decoder_folder))


@pytest.fixture
def scripted(decoder, monkeypatch) -> Scripted:
    return Scripted(decoder, monkeypatch)


def test_questions_of_every_kind_are_asked_and_answered(decoder, scripted, tmp_path):
    done = []
    study = SelfStudy(decoder, ALL, lambda at, total: done.append((at, total)))
    report = study.run([chunk(0), chunk(1)], tmp_path / "out.jsonl")
    assert report["questions_tried"] == report["questions_kept"] == 2 * (len(KINDS) + 1)
    assert report["kept_by_kind"] == dict.fromkeys(sorted([*KINDS, "about"]), 2)
    assert report["dropped"] == {}
    assert done == [(0, 2), (1, 2), (2, 2)]
    records = read_records(tmp_path / "out.jsonl")
    assert [record.text for record in records] == [chunk(0).text, chunk(1).text]
    assert {question.answers for record in records for question in record.questions} == {("three litres",)}
    teachers = read_teachers(tmp_path / "out.jsonl")
    assert sorted(teachers) == sorted(question.id for record in records for question in record.questions)
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_what_is_no_question_or_was_asked_before_is_dropped(decoder, scripted, tmp_path):
    scripted.questions = dict.fromkeys(KINDS, "What is in the  hall? I do not know.") | {
        "who": "The pump needs oil.",
        "when": "When?",
        "where": "what IS in the hall?",
    }
    report = SelfStudy(decoder, ALL).run([chunk(0)], tmp_path / "out.jsonl")
    assert report["dropped"] == {"asked before": len(KINDS) - 3, "not a question": 2}
    (record,) = read_records(tmp_path / "out.jsonl")
    assert record.questions[0].question == "What is in the  hall?"
    assert len(record.questions) == 2  # and what the text is about


def test_questions_about_the_prompt_are_dropped_and_those_about_its_words_are_not(decoder, scripted, tmp_path):
    scripted.questions["who"] = "Who answers this question?"
    scripted.questions["what"] = "What is the text above about?"
    scripted.questions["when"] = "When was the prison sentence passed?"
    report = SelfStudy(decoder, ALL).run([chunk(0)], tmp_path / "out.jsonl")
    assert report["dropped"] == {"about the prompt": 2}
    (record,) = read_records(tmp_path / "out.jsonl")
    assert scripted.questions["when"] in [question.question for question in record.questions]


def test_an_answer_must_end_and_be_likelier_with_the_text(decoder, scripted, tmp_path, monkeypatch):
    scripted.finish = "length"
    report = SelfStudy(decoder, ALL).run([chunk(0)], tmp_path / "cut.jsonl")
    assert report["dropped"] == {"no answer that ends": len(KINDS) + 1}
    assert report["chunks_with_questions"] == 0
    scripted.finish = "stop"

    def losses(prompts, answers, adapter=None):
        # two nats a token less with the text, but for the first question, which it makes worse
        return [(8.0 if p.prefix is None else 9.0 if i == 0 else 0.0, 4) for i, p in enumerate(prompts)]

    monkeypatch.setattr(decoder, "answer_losses", losses)
    report = SelfStudy(decoder, SelfStudyConfig(gain=1.9)).run([chunk(0)], tmp_path / "out.jsonl")
    assert report["dropped"] == {"the text does not help": 1}
    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    assert {question["gain"] for question in json.loads(line)["questions"]} == {2.0}


class Stopped(Exception):
    pass


def test_a_run_that_was_cut_off_goes_on_after_its_last_chunk(decoder, scripted, tmp_path):
    chunks = [chunk(number) for number in range(4)]
    straight = SelfStudy(decoder, ALL).run(chunks, tmp_path / "straight.jsonl")
    scripted.calls = 0

    def stop(done, total):
        if done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        SelfStudy(decoder, ALL, stop).run(chunks, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    partial = tmp_path / "out.jsonl.partial"
    with partial.open("a") as lines:
        lines.write('{"doc_id": "cut o')  # killed while it wrote
    with pytest.raises(ConfigError, match="other data or settings"):
        SelfStudy(decoder, SelfStudyConfig(seed=1)).run(chunks, tmp_path / "out.jsonl")
    done = []
    resumed = SelfStudy(decoder, ALL, lambda at, _: done.append(at)).run(chunks, tmp_path / "out.jsonl")
    assert done[0] == 2
    assert resumed == straight
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "straight.jsonl").read_text()
    with pytest.raises(ConfigError, match="must be a new file"):
        SelfStudy(decoder, ALL).run(chunks, tmp_path / "out.jsonl")


def test_an_adapter_learns_the_teachers_answers(decoder, scripted, tmp_path):
    SelfStudy(decoder, ALL).run([chunk(number) for number in range(10)], tmp_path / "out.jsonl")
    changes = {"learning_rate": 0.02, "ratios": [8], "layouts": [[1, 1, 1.0]], "text_share": 0, "none_share": 0}
    config = preset("small", **changes, evaluate_every=3, holdout=0.2, epochs=2)
    files = [DataFile(tmp_path / "out.jsonl", self_study=True)]
    chunker = Chunker(decoder.tokenizer, ChunkConfig(200, 24, 4))
    run = Finetune(decoder, registry.get("attention_matching"), chunker, files, config, group="pumps")
    metrics = run.run(tmp_path / "adapter", tmp_path / "work").metrics
    assert metrics["held_out_loss"] < metrics["held_out_loss_before"]


@pytest.fixture
def store(tmp_path, decoder_folder) -> Path:
    path = tmp_path / "store"
    with Engine.open(
        path,
        decoder=str(decoder_folder),
        embedder=HashingEmbedder(),
        chunk=ChunkConfig(64, 24, 4),
        compress=CompressConfig("uncompressed", 1),
    ) as engine:
        engine.ingest([Document("law.md", chunk(1).text)], metadata={"group": "law"})
        engine.ingest([Document("pump.md", " ".join(chunk(number).text for number in range(40)))])
    return path


def test_a_killed_command_goes_on(store, tmp_path, monkeypatch):
    program = (
        "import sys; from lloco_engine import engine; from lloco_engine.testing import HashingEmbedder; "
        "import lloco_engine.embedder as e; e.Embedder = lambda *a: HashingEmbedder(); "
        "from lloco_engine.cli import main; main()"
    )
    command = [sys.executable, "-c", program, "self-study", "--store", str(store), "--out", str(tmp_path / "out.jsonl")]
    command += ["--gain", "-1000"]
    partial = tmp_path / "out.jsonl.partial"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not partial.exists() or partial.read_text().count("\n") < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "out.jsonl").exists()
    finished = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["chunks"] > 3
    assert report["questions_tried"] == report["questions_kept"] + sum(report["dropped"].values())
    assert (tmp_path / "out.jsonl").exists()
    assert not partial.exists()


def test_only_a_groups_documents_are_studied(store, tmp_path, monkeypatch):
    monkeypatch.setattr("lloco_engine.embedder.Embedder", lambda *_: HashingEmbedder())
    command = ["self-study", "--store", str(store), "--group", "law", "--out", str(tmp_path / "out.jsonl"), "--json"]
    result = CliRunner().invoke(app, [*command, "--gain", "-1000"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["chunks"] == 1
    nobody = CliRunner().invoke(app, [*command[:4], "poems", *command[5:6], str(tmp_path / "none.jsonl")])
    assert nobody.exit_code == 1
    assert "at least one chunk" in nobody.stderr


def test_teachers_of_another_tokenizer_are_refused(decoder, scripted, tmp_path):
    path = tmp_path / "out.jsonl"
    SelfStudy(decoder, ALL).run([chunk(0)], path)
    record = json.loads(path.read_text())
    record["questions"][0]["teacher"].append(record["questions"][0]["teacher"][0])
    path.write_text(json.dumps(record) + "\n")
    chunker = Chunker(decoder.tokenizer, ChunkConfig(200, 24, 4))
    compressor = registry.get("attention_matching")
    with pytest.raises(Exception, match="run `lloco self-study` with this decoder"):
        Finetune(decoder, compressor, chunker, [DataFile(path, self_study=True)], preset("small"), group="pumps")
    assert torch.is_grad_enabled()
