"""`lloco data`: each published form on a small hand-made sample of it, bad records included."""

from __future__ import annotations

import csv
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lloco_engine.cli import app
from lloco_engine.eval import tasks
from lloco_engine.eval.published import NAMES, get
from lloco_engine.readers.records import Record, read_records


def convert(name: str, source: Path, out: Path, *more: str) -> tuple[list[Record], Any]:
    done = CliRunner().invoke(app, ["data", name, str(source), "--out", str(out), *more], catch_exceptions=False)
    assert done.exit_code in (0, 1), done.output
    return read_records(out), done


def lines(path: Path, *values: Any) -> Path:
    path.write_text("".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values), encoding="utf-8")
    return path


def quality(number: int, article: str, **changes: Any) -> dict[str, Any]:
    """A line as QuALITY v1.0.1 has it, with every field of the release."""
    question = {
        "question": "Why did the pump stop?",
        "question_unique_id": f"52845_{number}_1",
        "options": ["It was old.", "No oil\n was left.", "It rained.", "Nobody knows."],
        "writer_label": 2,
        "gold_label": 2,
        "validation": [{"untimed_annotator_id": "0001", "untimed_answer": 2}],
        "speed_validation": [{"speed_annotator_id": "0002", "speed_answer": 1}],
        "difficult": 1,
    }
    return {
        "article_id": article,
        "set_unique_id": f"{article}_{number}",
        "batch_num": "23",
        "writer_id": "1003",
        "source": "Gutenberg",
        "title": "The Pump",
        "year": 1954,
        "author": "A. Writer",
        "topic": "Science fiction",
        "article": f"The pump of hall {article} stopped.\n\nNo oil was left.",
        "url": "http://aleph.gutenberg.org/",
        "license": "public domain",
        "questions": [question | changes],
    }


def test_quality(tmp_path):
    folder = tmp_path / "QuALITY.v1.0.1"
    folder.mkdir()
    lines(
        folder / "QuALITY.v1.0.1.htmlstripped.dev",
        quality(1, "52845"),
        quality(2, "52845"),
        quality(3, "99999", gold_label=5),
        quality(4, "99999", options=["one"]),
        {"article_id": "1", "article": "x"},
        "{nonsense",
        quality(5, "61263", gold_label=1),
    )
    records, done = convert("quality", folder, tmp_path / "out.jsonl")
    assert done.exit_code == 1 and "2 documents with 3 questions" in done.stdout
    assert [record.doc_id for record in records] == ["52845", "61263"]
    assert records[0].title == "The Pump" and records[0].text.startswith("The pump of hall 52845")
    assert [question.id for question in records[0].questions] == ["52845_1_1", "52845_2_1"]
    first = records[0].questions[0]
    assert first.question.startswith("Why did the pump stop?\n\n (A) It was old.\n (B) No oil was left.\n (C)")
    assert first.answers == ("(B) No oil was left.",)
    task = tasks.get("quality")
    assert task.options(first)[1] == first.answers[0], "the task finds the gold answer among the options"
    for reason in (
        "htmlstripped.dev, line 3, questions[0]: field 'gold_label' must be 1 to 4, not 5",
        "line 4, questions[0]: field 'options' must be a list of at least two texts",
        "line 5: field 'questions' must be a list, not missing",
        "line 6: a record must be a JSON object",
    ):
        assert reason in done.stderr


@pytest.mark.parametrize("name", ["qasper", "qmsum", "narrative_qa"])
def test_scrolls(tmp_path, name):
    def line(identity: str, number: int, question: str, text: str, answer: str) -> dict[str, str]:
        return {"id": identity, "pid": f"{identity}_{number}", "input": f"{question}\n\n{text}", "output": answer}

    folder = tmp_path / name
    folder.mkdir()
    lines(
        folder / "validation.jsonl",
        line("a", 0, "How old is it?", "The mill.\n\nIt is old.", "Ninety years"),
        line("a", 1, "How old is it?", "The mill.\n\nIt is old.", "90"),
        line("b", 0, "Who keeps it?", "The mill.\n\nIt is old.", "Ada"),
        {"id": "c", "pid": "c_0", "input": "no blank line", "output": "x"},
        {"id": "d", "pid": "d_0", "input": "q\n\ntext", "output": None},
        line("e", 0, "What rang?", "The tram bell rang.", "The bell"),
    )
    records, done = convert(name, folder, tmp_path / "out.jsonl")
    assert done.exit_code == 1
    assert [record.text for record in records] == ["The mill.\n\nIt is old.", "The tram bell rang."]
    assert len({record.doc_id for record in records}) == 2 and records[0].doc_id.startswith(f"{name}-")
    assert [(q.id, q.question, q.answers) for q in records[0].questions] == [
        ("a", "How old is it?", ("Ninety years", "90")),
        ("b", "Who keeps it?", ("Ada",)),
    ]
    assert "validation.jsonl, line 4: field 'input' must be a question, a blank line and a document" in done.stderr
    assert "line 5: field 'output' must be a text that is not empty, not missing" in done.stderr
    alone, done = convert(name, folder / "validation.jsonl", tmp_path / "one.jsonl", "--limit", "1")
    assert alone == records[:1]


def test_scrolls_from_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    archive = tmp_path / "qmsum.zip"
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr(
            "qmsum/validation.jsonl",
            json.dumps({"id": "a", "pid": "a_0", "input": "Sum up.\n\nA: hm.", "output": "A said hm."}),
        )
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *names, **more: asked.append((names, more)) or str(archive)
    )
    out = tmp_path / "out.jsonl"
    done = CliRunner().invoke(app, ["data", "qmsum", "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert asked == [(("tau/scrolls", "qmsum.zip"), {"repo_type": "dataset"})]
    assert read_records(out)[0].questions[0].answers == ("A said hm.",)

    def unreachable(*names: str, **more: str) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    done = CliRunner().invoke(app, ["data", "qmsum", "--out", str(tmp_path / "none.jsonl")])
    assert done.exit_code == 1 and "could not be had from the hub" in done.stderr and "download it" in done.stderr
    done = CliRunner().invoke(app, ["data", "quality", "--out", str(tmp_path / "none.jsonl")])
    assert done.exit_code == 1 and "is not on the hub in the form that is read here" in done.stderr
    assert not (tmp_path / "none.jsonl").exists()


def test_hotpotqa(tmp_path):
    good = {
        "_id": "5a8b57f25542995d1e6f1371",
        "question": "Were Ada and Bo keepers of the same mill?",
        "answer": "yes",
        "supporting_facts": [["Ada", 0], ["Bo", 0]],
        "context": [["Ada", ["Ada kept the mill.", " She left it."]], ["Bo", ["Bo kept the mill too."]]],
        "type": "comparison",
        "level": "hard",
    }
    bad = [good | {"answer": 4}, good | {"context": [["Ada", "one text"]]}, "nonsense"]
    path = tmp_path / "hotpot_dev_distractor_v1.json"
    path.write_text(json.dumps([good, *bad]))
    records, done = convert("hotpotqa", tmp_path, tmp_path / "out.jsonl")
    assert len(records) == 1 and done.exit_code == 1
    assert records[0].text == "Ada\nAda kept the mill. She left it.\n\nBo\nBo kept the mill too."
    assert records[0].questions[0].answers == ("yes",) and records[0].doc_id == good["_id"]
    for reason in (
        "hotpot_dev_distractor_v1.json, record 1: field 'answer' must be a text",
        "record 2, context[0] must be a title and a list of sentences",
        "record 3: a record must be a JSON object, not 'nonsense'",
    ):
        assert reason in done.stderr
    path.write_text("{")
    done = CliRunner().invoke(app, ["data", "hotpotqa", str(path), "--out", str(tmp_path / "no.jsonl")])
    assert done.exit_code == 1 and "must be JSON" in done.stderr and not (tmp_path / "no.jsonl").exists()


def table(path: Path, *rows: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_narrativeqa(tmp_path):
    source = tmp_path / "narrativeqa"

    def document(identity: str, part: str) -> dict[str, str]:
        return {
            "document_id": identity,
            "set": part,
            "kind": "gutenberg",
            "story_url": "http://x/",
            "wiki_title": "Mill",
        }

    def question(identity: str, part: str, asked: str, *answers: str) -> dict[str, str]:
        one, two = answers
        return {"document_id": identity, "set": part, "question": asked, "answer1": one, "answer2": two}

    table(
        source / "documents.csv",
        document("00aa", "valid"),
        document("11bb", "valid"),
        document("22cc", "train"),
        document("33dd", "valid"),
        document("../etc", "valid"),
    )
    table(
        source / "qaps.csv",
        question("00aa", "valid", "Who keeps\nthe mill?", "Ada", "Ada Brandt"),
        question("00aa", "valid", "Where?", "At Orne", "At Orne"),
        question("11bb", "valid", "What rang?", "A bell", ""),
        question("22cc", "train", "Who?", "He", "She"),
        question("33dd", "valid", "Who?", "He", "She"),
        question("00aa", "valid", "Who?", "", "She"),
    )
    table(source / "third_party" / "wikipedia" / "summaries.csv",
          {"document_id": "11bb", "set": "valid", "summary": "A bell rang."})  # fmt: skip
    (source / "tmp").mkdir()
    (source / "tmp" / "00aa.content").write_text("Ada kept the mill at Orne.")
    records, done = convert("narrativeqa_csv", source, tmp_path / "out.jsonl", "--split", "valid")
    assert [record.doc_id for record in records] == ["00aa", "11bb"]
    assert records[0].text == "Ada kept the mill at Orne." and records[0].source == "NarrativeQA"
    assert records[1].text == "A bell rang." and records[1].source == "NarrativeQA, summary"
    assert [q.answers for q in records[0].questions] == [("Ada", "Ada Brandt"), ("At Orne",)]
    assert len({q.id for record in records for q in record.questions}) == 3
    for reason in (
        "documents.csv, line 5: document 33dd must have a story or a summary, and has neither",
        "field 'document_id' must be letters and digits, not '../etc'",
        "field 'document_id' must be a document that was read, not '33dd'",
        "field 'answer1' must be a text that is not empty, not ''",
    ):
        assert reason in done.stderr
    assert done.exit_code == 1


def test_what_cannot_be_read_is_named(tmp_path):
    for name in NAMES:
        missing = CliRunner().invoke(app, ["data", name, str(tmp_path / "none"), "--out", str(tmp_path / "o.jsonl")])
        assert missing.exit_code == 1 and str(tmp_path / "none") in missing.stderr, missing.output
        assert get(name).name == name and get(name).about
    assert not (tmp_path / "o.jsonl").exists() and not list(tmp_path.glob(".o.jsonl*"))
    unknown = CliRunner().invoke(app, ["data", "riddles", str(tmp_path)])
    assert unknown.exit_code == 1 and "must be one of quality, qasper" in unknown.stderr
    part = CliRunner().invoke(app, ["data", "qmsum", str(tmp_path), "--split", "test"])
    assert part.exit_code == 2 and "--split" in part.output


def test_json_says_what_was_written(tmp_path):
    source = lines(tmp_path / "v.jsonl", {"id": "a", "pid": "a_0", "input": "q\n\ntext", "output": "x"})
    out = tmp_path / "out.jsonl"
    done = CliRunner().invoke(app, ["data", "qmsum", str(source), "--out", str(out), "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout) == {"documents": 1, "questions": 1, "skipped": 0, "out": str(out)}
