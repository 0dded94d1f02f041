"""`lloco eval`: its records, its scores, its grouping, and whole runs on a tiny decoder."""

from __future__ import annotations

import json
import math
import multiprocessing
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lloco_engine.adapters.loading import facts_of
from lloco_engine.adapters.manifest import AdapterManifest
from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.errors import AdapterError, ConfigError, DocumentError, LLoCOError
from lloco_engine.eval import metrics
from lloco_engine.eval.data import Group, Question, Record, group_records, read_records
from lloco_engine.eval.evaluation import Evaluation
from lloco_engine.eval.methods import METHODS, Row
from lloco_engine.eval.partial import Partial
from lloco_engine.eval.reading import Reading
from lloco_engine.eval.run import EvalConfig
from lloco_engine.eval.run import run as run_eval
from lloco_engine.models import cache_folder
from lloco_engine.testing import HashingEmbedder, save_tiny_decoder
from lloco_engine.types import Hit

KEYS = {
    "method", "ratio", "adapter", "documents", "questions", "loss", "recovered", "f1", "rouge_l",
    "prompt_slots", "prompt_tokens", "source_tokens",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_decoder(tmp_path_factory.mktemp("eval") / "tiny")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> None:
    """No test finds another's segments."""
    monkeypatch.setenv("LLOCO_CACHE", str(tmp_path_factory.mktemp("cache")))


def run(config: EvalConfig, **more: Any) -> dict[str, Any]:
    return run_eval(config, embedder=HashingEmbedder(), **more)


@pytest.fixture(scope="module")
def decoder(folder) -> LocalDecoder:
    return LocalDecoder.load(str(folder))


def record(number: int, text: str = "", questions: int = 2) -> dict[str, Any]:
    return {
        "doc_id": f"d{number}",
        "title": f"Pump {number}",
        "text": text or f"The pump in hall {number} needs {number + 3} litres of oil.",
        "source": "made up",
        "questions": [
            {"id": f"{number}-{q}", "question": f"How much oil {q}?", "answers": [f"{number + 3} litres", "some"]}
            for q in range(questions)
        ],
    }


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in records), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    return write(tmp_path / "data.jsonl", *(record(number) for number in range(5)))


# -- scores --------------------------------------------------------------------------------------------------------


def test_f1_counts_shared_words_of_the_best_gold_answer():
    assert metrics.f1("The  oil, pump!", ["an oil pump"]) == 1.0  # case, articles, punctuation and spaces do not count
    assert metrics.f1("seven litres of oil", ["seven litres", "nothing"]) == pytest.approx(2 * 2 / (4 + 2))
    assert metrics.f1("oil oil", ["oil"]) == pytest.approx(2 / 3)  # a repeated word counts once
    assert metrics.f1("", ["oil"]) == 0.0
    assert metrics.f1("", ["the"]) == 1.0  # both are nothing


def test_rouge_l_is_the_longest_common_subsequence():
    # "a c d" of the answer's 4 and the gold's 3 words: precision 3/4, recall 1
    scores = metrics.rouge("a b c d", ["x", "a c d"])
    assert scores["rouge_l"] == pytest.approx(2 * 0.75 / 1.75)
    assert scores["rouge_2"] == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert metrics.rouge("the pumps were running", ["the pump was run"])["rouge_1"] == 0.75  # stems, as SCROLLS takes


def test_recovered_is_the_share_between_none_and_full():
    assert metrics.recovered(2.0, 3.0, 1.0) == 0.5
    assert metrics.recovered(3.0, 3.0, 1.0) == 0.0
    assert metrics.recovered(1.0, 3.0, 1.0) == 1.0
    assert metrics.recovered(4.0, 3.0, 1.0) == -0.5
    assert metrics.recovered(2.0, None, 1.0) is None
    assert metrics.recovered(2.0, 3.0, None) is None
    assert metrics.recovered(2.0, 3.0, 3.0) is None


# -- records and groups ----------------------------------------------------------------------------------------------


def test_records_are_read_up_to_the_limit(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(record(0)), "", json.dumps({"doc_id": "bare", "text": "x", "questions": []}), "not JSON"]
    path.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    records = read_records(path, 2)
    assert [r.doc_id for r in records] == ["d0", "bare"]
    assert records[0].questions[1] == Question("How much oil 1?", ("3 litres", "some"), "0-1")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], "must be a JSON object, not"),
        ({"doc_id": 7, "text": "x", "questions": []}, "field 'doc_id' must be a text, not 7"),
        ({"doc_id": "a", "questions": []}, "field 'text' must be a text, not missing"),
        ({"doc_id": "a", "text": " ", "questions": []}, "field 'text' must not be empty"),
        ({"doc_id": "a", "text": "x"}, "field 'questions' must be a list, not missing"),
        ({"doc_id": "a", "text": "x", "questions": ["q"]}, "field 'questions[0]' must be a JSON object"),
        ({"doc_id": "a", "text": "x", "questions": [{"answers": ["b"]}]}, "field 'questions[0].question' must be"),
        ({"doc_id": "a", "text": "x", "questions": [{"question": "q", "answers": []}]}, "'questions[0].answers' must"),
        ({"doc_id": "a", "text": "x", "questions": [{"question": "q", "answers": [3]}]}, "'questions[0].answers' must"),
    ],
)
def test_a_bad_line_is_named_with_its_field(tmp_path, value, message):
    path = write(tmp_path / "data.jsonl", record(0), value)
    with pytest.raises(DocumentError) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"{path}, line 2: ") and message in str(caught.value)


@pytest.mark.parametrize(("line", "message"), [(b"{'a'", "on one line"), (b'{"a": "\xff"}', "must be UTF-8")])
def test_a_line_that_is_no_json_is_named(tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(record(0)).encode() + b"\n" + line)
    with pytest.raises(DocumentError, match=f"line 2: .*{message}"):
        read_records(path)


def test_files_without_questions_or_none_at_all_are_refused(tmp_path):
    with pytest.raises(DocumentError, match="at least one question"):
        read_records(write(tmp_path / "data.jsonl", record(0, questions=0)))
    with pytest.raises(DocumentError, match="cannot be read: No such file"):
        read_records(tmp_path / "missing.jsonl")


def test_documents_are_grouped_in_order():
    records = [Record(f"d{n}", f"text {n}", (Question(f"q{n}", ("a",)),)) for n in range(7)]
    groups = group_records(records, passages_per_chunk=2, segments=2)
    assert [group.chunks for group in groups] == [
        ("text 0\n\ntext 1", "text 2\n\ntext 3"),
        ("text 4\n\ntext 5", "text 6"),
    ]
    assert [[q.question for q in group.questions] for group in groups] == [
        ["q0", "q1", "q2", "q3"],
        ["q4", "q5", "q6"],
    ]
    assert [group.documents for group in groups] == [4, 3]
    silent = Record("d", "text", ())
    assert group_records([silent, silent, records[0]], 1, 1) == [Group(("text 0",), records[0].questions, 1)]


def evaluation(settings: EvalConfig, decoder: LocalDecoder) -> Evaluation:
    return Evaluation(settings, decoder, HashingEmbedder(), cache_folder())


def chunks(settings: EvalConfig, decoder: LocalDecoder) -> list[Hit]:
    """Those of the first group."""
    made = evaluation(settings, decoder)
    with made.engines.about(made.groups[0]) as about:
        return about.chunks(about.search)


def readings(settings: EvalConfig, decoder: LocalDecoder, row: Row) -> list[Reading]:
    """What the first group's questions are read with in a row."""
    made = evaluation(settings, decoder)
    asked = [question.question for question in made.groups[0].questions]
    with made.engines.about(made.groups[0]) as about:
        reader = made._scorer.reader
        return list(reader.readings(about, METHODS[row.method], row.ratio, None, asked, [40] * len(asked)))


# -- runs ------------------------------------------------------------------------------------------------------------


def config(data: Path, **changes: Any) -> EvalConfig:
    settings: dict[str, Any] = {"ratios": (2, 4), "compressor": "uncompressed", "max_new_tokens": 4}
    return EvalConfig(str(data), **(settings | changes))


def test_a_run_gives_every_key_of_every_row(data, decoder):
    result = run(config(data), decoder=decoder)
    rows = result["results"]
    assert [(row["method"], row["ratio"]) for row in rows] == [("none", None), ("full", None), ("kv", 2), ("kv", 4)]
    assert all(set(row) >= KEYS for row in rows)
    none, full, kv, _ = rows
    assert {row["documents"] for row in rows} == {5} and {row["questions"] for row in rows} == {10}
    assert none["recovered"] == 0 and full["recovered"] == 1
    # The compressor here keeps every slot, so what it makes is worth the full text, but for float16 on the disk.
    assert kv["loss"] == pytest.approx(full["loss"], rel=1e-3) and kv["loss"] != pytest.approx(none["loss"], rel=1e-3)
    assert kv["recovered"] == pytest.approx(1, abs=0.05)
    assert none["prompt_slots"] == none["source_tokens"] == full["prompt_slots"] == 0
    assert kv["prompt_slots"] == kv["source_tokens"] == full["source_tokens"] > 20
    assert full["prompt_tokens"] == pytest.approx(none["prompt_tokens"] + full["source_tokens"])
    assert kv["prompt_tokens"] == none["prompt_tokens"]
    assert all(0 <= row["f1"] <= 1 and 0 <= row["rouge_l"] <= 1 for row in rows)
    facts = result["config"]
    assert facts["decoder"]["fingerprint"] == decoder.fingerprint and len(facts["data_sha256"]) == 64
    assert {"versions", "hardware", "date", "seconds", "notes", "passages_per_chunk"} <= set(facts)
    json.dumps(result, allow_nan=False)


def test_a_run_reads_refined_segments_where_it_is_asked_to(data, decoder, tmp_path):
    changes = {"compressor": "attention_matching", "methods": ("kv",), "ratios": (8,), "answers": False, "limit": 1}
    plain, refined = (run(config(data, refine=n, **changes), decoder=decoder, cache=tmp_path) for n in (0, 2))
    assert "refine" not in plain["config"]["compressor"]["settings"]
    assert refined["config"]["refine"] == refined["config"]["compressor"]["settings"]["refine"] == 2
    assert plain["results"][0]["loss"] != refined["results"][0]["loss"]
    with pytest.raises(ConfigError, match="compressor 'uncompressed'"):  # which has no such setting
        run(config(data, refine=2), decoder=decoder)


def test_loss_is_per_token_over_the_whole_set(data, decoder):
    """The slow, obvious way: every question alone, its text in the prompt."""
    result = run(config(data, methods=("full",), answers=False), decoder=decoder)
    total = tokens = 0.0
    for each in read_records(data):
        context = decoder.tokenizer(each.text, add_special_tokens=False)["input_ids"]
        for question in each.questions:
            prompt = Prompt(question.question, context=context)
            ((loss, count),) = decoder.answer_losses([prompt], [question.answers[0]])
            total, tokens = total + loss, tokens + count
    (row,) = result["results"]
    assert row["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert row["f1"] is None and row["rouge_l"] is None
    assert row["recovered"] is None  # there is no loss without context in this run


def test_answers_are_those_of_the_decoder(data, decoder, monkeypatch):
    seen: list[str] = []
    monkeypatch.setitem(metrics.SCORES, "f1", lambda answer, gold: {"f1": float(seen.append(answer) or 0.25)})
    row = run(config(data, methods=("none",), limit=2), decoder=decoder)["results"][0]
    from lloco_engine.config import GenerateConfig

    alone = [
        decoder.generate([Prompt(question.question)], GenerateConfig(4))[0].text
        for each in read_records(data, 2)
        for question in each.questions
    ]
    assert seen == alone and row["f1"] == 0.25


def test_segments_are_placed_together_in_parallel(data, decoder):
    settings = config(data, passages_per_chunk=2, segments=2, ratios=(4,))
    (reading,) = readings(settings, decoder, Row("kv", 4, "none"))
    (prefix,) = {prompt.prefix for prompt in reading.prompts}
    assert reading.numbers == tuple(range(8)) and len(prefix.segments) == 2
    assert prefix.offsets == (0, 0)
    group = group_records(read_records(data), 2, 2)[0]
    lengths = [len(decoder.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in group.chunks]
    assert prefix.start == decoder.template_tokens + max(lengths)
    result = run(settings, decoder=decoder)
    kv = result["results"][-1]
    last = [len(decoder.tokenizer(each.text, add_special_tokens=False)["input_ids"]) for each in read_records(data)][4]
    assert kv["source_tokens"] == pytest.approx((sum(lengths) * 8 + last * 2) / 10)


def test_a_long_document_becomes_segments_and_a_joined_chunk_does_not(tmp_path, decoder):
    text = " ".join(f"Sentence {n} is here." for n in range(18))
    data = write(tmp_path / "data.jsonl", record(0, text), record(1, text))
    alone = config(data, segment_tokens=64, limit=1)
    pieces = chunks(alone, decoder)
    assert len(pieces) > 1 and max(piece.source_tokens for piece in pieces) <= 64
    result = run(alone, decoder=decoder)
    assert any("1 chunks were longer" in note for note in result["config"]["notes"])
    assert len(chunks(config(data, segment_tokens=64, passages_per_chunk=2), decoder)) == 1


def test_full_text_beyond_the_window_loses_its_middle_and_says_so(tmp_path, decoder, monkeypatch):
    text = "begin " + "x" * 2000 + " end"
    data = write(tmp_path / "data.jsonl", record(0, text))
    read: list[list[int]] = []
    prefill = decoder.prefill
    monkeypatch.setattr(decoder, "prefill", lambda ids, **more: read.append(list(ids)) or prefill(ids, **more))
    result = run(config(data, methods=("full",)), decoder=decoder)
    kept = decoder.tokenizer.decode(read[0])
    assert kept.startswith("begin x") and kept.endswith("x end")
    left_out = len(decoder.tokenizer(text, add_special_tokens=False)["input_ids"]) - len(read[0])
    assert any("lost the middle" in note and f"{left_out:,} tokens" in note for note in result["config"]["notes"])


def test_rows_are_bounded_by_memory(data, decoder, monkeypatch):
    widths: list[int] = []
    kept = decoder.answer_losses
    monkeypatch.setattr(
        decoder, "answer_losses", lambda prompts, *rest: widths.append(len(prompts)) or kept(prompts, *rest)
    )
    settings = config(data, segments=5, answers=False, ratios=(2,))
    whole = run(settings, decoder=decoder)["results"]
    assert widths == [10, 10, 10]
    monkeypatch.setattr("lloco_engine.eval.scoring._LOGITS", 1 << 18)
    widths.clear()
    parts = run(settings, decoder=decoder)["results"]
    assert max(widths) < 10 and sum(widths) == 30
    assert [row["loss"] for row in parts] == pytest.approx([row["loss"] for row in whole], rel=1e-5)


def test_a_run_cut_off_goes_on(data, decoder, tmp_path, monkeypatch):
    output = tmp_path / "out" / "result.json"
    whole = run(config(data), decoder=decoder)
    measure, calls = Evaluation.measure, []

    def dying(self: Evaluation, *what: Any) -> Any:
        if len(calls) == 14:
            raise KeyboardInterrupt
        calls.append(what)
        return measure(self, *what)

    monkeypatch.setattr(Evaluation, "measure", dying)
    with pytest.raises(KeyboardInterrupt):
        run(config(data), output=output, decoder=decoder)
    left = output.with_name("result.json.partial.jsonl")
    assert left.exists() and not output.exists()
    with left.open("a") as lines:
        lines.write('{"number": 14, "val')  # killed while it wrote
    calls.clear()
    monkeypatch.setattr(Evaluation, "measure", lambda self, *what: calls.append(what) or measure(self, *what))
    result = run(config(data), output=output, decoder=decoder)
    assert len(calls) == 6, "five documents of four rows: only what was not done is measured"
    assert result["results"] == whole["results"] == json.loads(output.read_text())["results"]
    assert not left.exists()


def test_workers_go_on_where_one_process_stopped_and_measure_what_it_does(data, folder, tmp_path, monkeypatch):
    settings = config(data, decoder=str(folder))
    output, told, calls = tmp_path / "result.json", [], []
    alone = run_eval(settings, cache=tmp_path / "cache")
    measure = Evaluation.measure

    def dying(self: Evaluation, *what: Any) -> Any:
        calls.append(what)
        return measure(self, *what) if len(calls) < 7 else 1 / 0

    monkeypatch.setattr(Evaluation, "measure", dying)
    with pytest.raises(ZeroDivisionError):
        run_eval(settings, output=output, cache=tmp_path / "cache")
    made = run_eval(  # their own `measure` is as it was: they are new processes
        settings, output=output, cache=tmp_path / "cache", workers=2, progress=lambda *what: told.append(what)
    )
    assert len(calls) == 7
    assert made["results"] == alone["results"] == json.loads(output.read_text())["results"]
    assert told[0][1] > 0 and told[-1][1] == told[-1][2]
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_is_named_and_what_was_done_is_kept(data, folder, tmp_path, monkeypatch):
    class Broken:
        def __init__(self, *what: Any) -> None:
            pass

        def submit(self, measure: Any, number: int, ats: list[int]) -> Future[Any]:
            made: Future[Any] = Future()
            if number == 0:
                made.set_result([(number, at, {"seconds": 0}) for at in ats])
            else:
                made.set_exception(BrokenProcessPool())
            return made

        def shutdown(self, **what: Any) -> None:
            pass

        def __enter__(self) -> Broken:
            return self

        def __exit__(self, *what: Any) -> None:
            pass

    monkeypatch.setattr("lloco_engine.eval.workers.ProcessPoolExecutor", Broken)
    monkeypatch.setattr("lloco_engine.eval.workers.as_completed", lambda futures: futures)
    output = tmp_path / "result.json"
    with pytest.raises(LLoCOError, match="fewer workers"):
        run_eval(config(data, decoder=str(folder)), output=output, cache=tmp_path / "cache", workers=2)
    assert len(output.with_name("result.json.partial.jsonl").read_text().splitlines()) == 1 + 4
    with pytest.raises(ConfigError, match="workers load a decoder"):
        run_eval(config(data), embedder=HashingEmbedder(), workers=2)
    with pytest.raises(ConfigError, match="workers must be at least 1, not 0"):
        run_eval(config(data), workers=0)


def test_other_settings_do_not_use_what_is_left(tmp_path):
    output = tmp_path / "result.json"
    Partial(output, "one").add(0, {"a": 1})
    assert Partial(output, "one").done == {0: {"a": 1}}
    assert Partial(output, "two").done == {}
    assert Partial(output, "one").done == {}, "another run's start drops it"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("none", "magic")}, "methods must be some of none, full, .*, not 'magic'"),
        ({"methods": ()}, "not none at all"),
        ({"ratios": (0.5,)}, "ratios must be at least 1"),
        ({"ratios": ()}, "at least one ratio"),
        ({"segments": 0}, "segments must be at least 1"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"methods": ("none", "kv@default")}, "after a method's @ must be one of auto, not 'default'"),
        ({"methods": ("magic@auto",)}, "not 'magic'"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram must not be negative"),
        ({"pointing": -1.0}, "pointing must not be negative"),
        ({"min_new_tokens": 33}, r"min_new_tokens must be from 0 to max_new_tokens \(32\), not 33"),
        ({"task": "recipes"}, "task must be one of"),
    ],
)
def test_settings_have_rules(changes, message):
    with pytest.raises(ConfigError, match=message):
        EvalConfig("data.jsonl", **changes)


def test_a_task_has_its_own_lengths_and_short_answers_may_be_asked_for():
    lengths = [
        (made.min_new_tokens, made.max_new_tokens)
        for made in (
            EvalConfig("data.jsonl", "qmsum").generation,
            EvalConfig("data.jsonl", "qmsum", max_new_tokens=24).generation,
            EvalConfig("data.jsonl", "qmsum", min_new_tokens=0).generation,
        )
    ]
    assert lengths == [(48, 96), (24, 24), (0, 96)]
    with pytest.raises(ConfigError, match="min_new_tokens"):
        EvalConfig("data.jsonl", "qmsum", min_new_tokens=25, max_new_tokens=24)


def test_an_adapter_that_is_not_loaded_is_refused(data, decoder):
    with pytest.raises(AdapterError, match="'law' is none of them"):
        run(config(data, adapter="law"), decoder=decoder)


def test_the_shipped_adapter_is_used_where_it_fits(data, decoder, monkeypatch):
    from lloco_engine.eval.evaluation import _fitting

    assert _fitting(decoder, "auto") == "none" and _fitting(decoder, "law") == "law"
    earlier = {name: fact[:16] for name, fact in facts_of(decoder).items()}  # as the shipped one has them
    made = AdapterManifest(
        1, "default", "tiny", **earlier, memory="compact_kv", compressor="", compressor_settings={}, ratios=[], data=[],
        config={}, weights_sha256="",
    )  # fmt: skip
    monkeypatch.setattr("lloco_engine.eval.evaluation.AdapterManifest.load", lambda folder: made)
    monkeypatch.setattr("lloco_engine.eval.evaluation.default_folder", lambda: Path("shipped"))
    assert _fitting(decoder, "auto") == "default"
    monkeypatch.setattr("lloco_engine.eval.evaluation.default_folder", lambda: None)
    assert _fitting(decoder, "auto") == "none"


def test_an_output_that_cannot_be_written_is_refused_first(data, decoder, tmp_path):
    with pytest.raises(ConfigError, match="it is a folder"):
        run(config(data), output=tmp_path, decoder=decoder)


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_writes_json(data, folder, tmp_path):
    from lloco_engine.cli import app

    output = tmp_path / "result.json"
    command = [
        "eval",
        "--data",
        str(data),
        "--limit",
        "3",
        "--methods",
        "none,full,kv",
        "--ratios",
        "4",
        "--no-answers",
    ]
    command += ["--passages-per-chunk", "2", "--segments", "2", "--adapter", "none", "--decoder", str(folder)]
    done = CliRunner().invoke(app, [*command, "--json", str(output)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads(output.read_text())
    assert set(result) >= {"config", "results"}
    assert [(row["method"], row["ratio"]) for row in result["results"]] == [("none", None), ("full", None), ("kv", 4)]
    assert all(math.isfinite(row["loss"]) and row["documents"] == 3 for row in result["results"])
    for word in ("method", "recovered", "kv", "6 questions about 3 documents"):
        assert word in done.stdout
    assert f"{result['results'][0]['loss']:.3f}" in done.stdout


def test_the_command_refuses_what_it_cannot_read(data, folder, tmp_path):
    from lloco_engine.cli import app

    bad = CliRunner().invoke(app, ["eval", "--data", str(data), "--ratios", "8,many"])
    assert bad.exit_code == 2 and "--ratios" in bad.output
    write(data, record(0), {"doc_id": "a"})
    bad = CliRunner().invoke(app, ["eval", "--data", str(data), "--decoder", str(folder)])
    assert bad.exit_code == 1 and "line 2: field 'text'" in bad.output
    bad = CliRunner().invoke(app, ["eval", "--data", str(tmp_path / "none.jsonl")])
    assert bad.exit_code == 1 and "cannot be read" in bad.output
