"""Practice made of documents with questions: sown facts and multiple choice, the command that writes it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from lloco_engine.cli import app
from lloco_engine.errors import ConfigError, LLoCOError
from lloco_engine.eval.tasks.choices import letter, options_of
from lloco_engine.finetune.practice import PracticeConfig, practise, write
from lloco_engine.readers.records import Question, Record, read_records

TEXT = "The barge came at noon. It carried stones. Nobody met it. The bell rang twice! Why, no one knew."


def record(number: int, questions: int = 4) -> Record:
    asked = [Question(f"Question {number}-{n}?", (f"Answer {number} of kind {n}.",), f"q{n}") for n in range(questions)]
    return Record(f"doc-{number}", f"{TEXT} This is text {number}.", tuple(asked))


RECORDS = [record(number) for number in range(12)]


def test_facts_are_sown_between_sentences_and_asked_for():
    for before, after in zip(RECORDS, practise(RECORDS, PracticeConfig(fact_every=40, choices=0)), strict=True):
        facts = after.questions[len(before.questions) :]
        assert (
            len(facts) == round(len(before.text) / 40) and after.questions[: len(before.questions)] == before.questions
        )
        for fact in facts:
            assert fact.answers[0] in after.text and "-fact-" in fact.id
        # what is left when the sown sentences are taken out again is the text, sentence by sentence
        kept = [part for part in before.text.replace("!", "!\n").replace(". ", ".\n").split("\n") if part.strip()]
        place = 0
        for sentence in kept:
            place = after.text.index(sentence.strip(), place) + len(sentence.strip())


def test_a_short_text_has_one_fact_and_none_when_none_is_wanted():
    (one,) = practise([Record("a", "Short", ())], PracticeConfig(choices=0))
    assert len(one.questions) == 1 and one.text.count("Short") == 1
    (none,) = practise([RECORDS[0]], PracticeConfig(fact_every=0, choices=0))
    assert none == RECORDS[0]


def test_choices_have_the_answer_once_among_four_and_name_its_letter():
    asked = [q for made in practise(RECORDS, PracticeConfig(fact_every=0, choices=1)) for q in made.questions]
    gold = {question.question: question.answers[0] for each in RECORDS for question in each.questions}
    letters, texts = 0, 0
    for question in asked:
        options = options_of(question.question)
        right = gold[question.question.split("\n")[0]]
        assert len(options) == len(set(options)) == 4 and options.count(right) == 1 and question.id.endswith("-choice")
        at = letter(options.index(right))
        assert question.answers[0] in (at, f"({at}) {right}")
        letters, texts = letters + (question.answers[0] == at), texts + (question.answers[0] != at)
    assert letters > 5 and texts > 5
    assert len({question.answers[0][:2] for question in asked}) > 4, "the right option must stand at every place"


def test_answers_that_make_no_option_stay_open():
    alone = Record("a", TEXT, (Question("What?", ("Stones.",)), Question("Long?", ("x" * 300,))))
    (made,) = practise([alone], PracticeConfig(fact_every=0, choices=1))
    assert made == alone, "there are not four different answers"


def test_equal_seeds_make_equal_practice():
    assert list(practise(RECORDS)) == list(practise(RECORDS)) != list(practise(RECORDS, PracticeConfig(seed=1)))


@pytest.mark.parametrize("wrong", [{"fact_every": -1}, {"choices": 1.5}])
def test_settings_outside_their_rule_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        PracticeConfig(**wrong)


def test_what_is_written_is_read_again_and_a_failure_leaves_nothing(tmp_path):
    report = write(tmp_path / "out.jsonl", practise(RECORDS))
    assert read_records(tmp_path / "out.jsonl") == list(practise(RECORDS))
    assert report["documents"] == 12 and report["facts"] == 12 and report["choices"] > 0
    with pytest.raises(LLoCOError, match=r"could not be written to .*no-folder"):
        write(tmp_path / "out.jsonl" / "no-folder", practise(RECORDS))

    def broken():
        yield RECORDS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out.jsonl", broken())
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]
    assert len(read_records(tmp_path / "out.jsonl")) == 12


def test_the_command(tmp_path):
    data = tmp_path / "data.jsonl"
    write(data, RECORDS)
    out = tmp_path / "practice.jsonl"
    result = CliRunner().invoke(app, ["practice", "--data", str(data), "--out", str(out), "--choices", "1", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"documents": 12, "questions": 60, "facts": 12, "choices": 48}
    told = CliRunner().invoke(app, ["practice", "--data", str(data), "--out", str(out)])
    assert "12 documents with 60 questions" in told.output
    data.write_text("{}\n")
    failed = CliRunner().invoke(app, ["practice", "--data", str(data), "--out", str(out)])
    assert failed.exit_code != 0 and "'text'" in failed.output
    assert len(read_records(out)) == 12, "what was there stays"
