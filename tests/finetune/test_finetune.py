"""Learning offline: passes with gradients, plans, checkpoints, and whole runs on a tiny decoder."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from decoder_cases import OTHERS, TEXT, place, tiny, tokens, whole
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from lloco_engine import Document, Engine
from lloco_engine.adapters.loading import load
from lloco_engine.adapters.manifest import AdapterManifest
from lloco_engine.chunking import Chunker
from lloco_engine.cli import app
from lloco_engine.compress import registry
from lloco_engine.compress.uncompressed import Uncompressed
from lloco_engine.config import ChunkConfig, CompressConfig, GenerateConfig
from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.errors import ConfigError, DocumentError, PromptTooLong
from lloco_engine.finetune import checkpoint
from lloco_engine.finetune.batches import Planner, split_records
from lloco_engine.finetune.config import FinetuneConfig, preset
from lloco_engine.finetune.distill import Teacher, distillation_loss, read_teachers, teach
from lloco_engine.finetune.packing import answer_logits
from lloco_engine.finetune.run import DataFile, Finetune, finetune_store
from lloco_engine.finetune.segments import Segments
from lloco_engine.finetune.train import rate
from lloco_engine.readers.records import Question, Record
from lloco_engine.store import Store
from lloco_engine.testing import HashingEmbedder, tiny_tokenizer
from lloco_engine.types import Prefix

QUESTIONS = ["Who is the keeper?", "Who came from the north?", "When?"]
ANSWERS = ["Ada Brandt", "She did, in 1874.", "1874"]


def adapted(**changes):
    """A decoder with a new adapter that is no longer without effect, and the adapter's parameters."""
    decoder = tiny(**changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        parameters = decoder.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]), "new")
        for name, parameter in parameters.items():
            if "lora_B" in name:
                parameter.data.normal_(std=0.2)
    return decoder, parameters


# -- passes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "segments", "text", "none", "one"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_packed_questions_give_the_losses_and_gradients_of_each_alone(kind, family):
    decoder, parameters = adapted(family=family)
    segments = [whole(decoder), *(whole(decoder, text) for text in OTHERS)]
    prefix = {"memory": place(decoder, segments[:1]), "segments": place(decoder, segments)}.get(kind)
    if prefix is not None:  # the choice of segments has jumps, at which slopes mean nothing
        prefix = replace(prefix, focus=0)
    context = tokens(decoder, TEXT) if kind in ("text", "one") else None
    asked = QUESTIONS[:1] if kind == "one" else QUESTIONS
    prompts = [Prompt(question, prefix, context) for question in asked]
    end = decoder.tokenizer.eos_token_id
    gold = [[*tokens(decoder, answer), end] for answer in ANSWERS[: len(asked)]]

    made = answer_logits(decoder, prompts, gold, "new")
    loss = torch.nn.functional.cross_entropy(made.logits, made.targets, reduction="none")
    found = torch.autograd.grad(loss.sum(), list(parameters.values()))

    # the slow reference: each question alone, token by token after the template, every key kept with its graph
    expected = decoder.answer_losses(prompts, ANSWERS[: len(asked)], "new")
    assert [round(float(part.sum()), 3) for part in loss.detach().split([len(answer) for answer in gold])] == [
        round(total, 3) for total, _ in expected
    ]
    difference = 1e-3
    for parameter, gradient in zip(parameters.values(), found, strict=True):
        where = int(gradient.abs().argmax())
        before = parameter.detach().clone()
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.view(-1)[where] = before.view(-1)[where] + sign * difference
            decoder._prefix_cache.clear()  # the template is read with the adapter too
            sides.append(sum(total for total, _ in decoder.answer_losses(prompts, ANSWERS[: len(asked)], "new")))
        with torch.no_grad():
            parameter.copy_(before)
        slope = (sides[0] - sides[1]) / (2 * difference)
        assert float(gradient.view(-1)[where]) == pytest.approx(slope, rel=0.05, abs=0.01)


@pytest.mark.parametrize("kind", ["memory", "text"])
def test_checkpointing_keeps_less_for_the_same_gradients(kind):
    decoder, parameters = adapted(num_hidden_layers=6)
    prefix = place(decoder, [whole(decoder)]) if kind == "memory" else None
    context = None if prefix is not None else tokens(decoder, TEXT)
    prompts = [Prompt(question, prefix, context) for question in QUESTIONS]
    gold = [[*tokens(decoder, answer), decoder.tokenizer.eos_token_id] for answer in ANSWERS]
    kept, gradients = [], []
    for recompute in (False, True):
        sizes: list[int] = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            made = answer_logits(decoder, prompts, gold, "new", recompute=recompute)
            kept.append(sum(sizes))
        loss = torch.nn.functional.cross_entropy(made.logits, made.targets)
        gradients.append(torch.autograd.grad(loss, list(parameters.values())))
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)
    assert kept[1] < kept[0] / 2


def test_a_pass_needs_no_template_prefix():
    decoder, _ = adapted()
    decoder.template = replace(decoder.template, before="")
    decoder._prefix_cache.clear()
    prompts = [Prompt(question) for question in QUESTIONS]
    end = decoder.tokenizer.eos_token_id
    made = answer_logits(decoder, prompts, [[*tokens(decoder, answer), end] for answer in ANSWERS], "new")
    total = sum(loss for loss, _ in decoder.answer_losses(prompts, ANSWERS, "new"))
    loss = torch.nn.functional.cross_entropy(made.logits, made.targets, reduction="sum")
    assert loss.item() == pytest.approx(total, rel=1e-4)


def test_a_prompt_that_does_not_fit_the_window_is_refused():
    decoder, _ = adapted(max_position_embeddings=64)
    with pytest.raises(PromptTooLong, match="64"):
        answer_logits(decoder, [Prompt("Who? " * 20)], [[1, 2]], "new")


# -- settings and plans ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rank", 0, "rank must be at least 1, not 0"),
        ("learning_rate", 0, "learning_rate must be above 0"),
        ("ratios", [0.5], "ratios must be numbers of at least 1"),
        ("ratios", [], "ratios must be"),
        ("layouts", [[1, 0, 0.5]], "layouts must have"),
        ("text_share", 1.5, "text_share must be from 0 to 1"),
        ("targets", [], "targets must name"),
        ("epoch", 1, "no setting 'epoch'"),
    ],
)
def test_a_setting_outside_its_rule_is_refused(name, value, message):
    with pytest.raises(ConfigError, match=message):
        preset("small", **{name: value})


def test_presets():
    paper = preset("paper")
    assert (paper.rank, paper.alpha, paper.epochs, paper.learning_rate) == (8, 16, 3, 2e-5)
    assert paper.targets == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert FinetuneConfig.from_json(preset("small").to_json()) == preset("small")
    with pytest.raises(ConfigError, match="preset must be one of paper, small, not 'big'"):
        preset("big")


def test_the_learning_rate_rises_and_falls():
    config = preset("small", learning_rate=1.0, warmup=0.1)
    rates = [rate(share, config) for share in (0.0, 0.05, 0.1, 0.55, 1.0)]
    assert rates == pytest.approx([0.01, 0.5, 1.0, 0.5, 0.0], abs=1e-9)


def passages(count: int, questions: int = 3, words: int = 9) -> list[Record]:
    return [
        Record(
            f"d{number}",
            f"The pump in hall {number} needs {number + 3} litres of oil" + " and more" * words + ".",
            tuple(Question(f"How much oil {number} {q}?", (f"{number + 3} litres",)) for q in range(questions)),
        )
        for number in range(count)
    ]


def planner(segment_tokens: int = 400, **changes) -> Planner:
    tokenizer = tiny_tokenizer()
    return Planner(Chunker(tokenizer, ChunkConfig(segment_tokens, 24, 4)), tokenizer, preset("small", **changes))


def test_every_question_is_asked_once_in_an_epoch_and_order_follows_the_seed():
    records = passages(40)
    plan = planner().plan(records, 7)
    asked = [question.question for example in plan for question in example.questions]
    assert sorted(asked) == sorted(question.question for record in records for question in record.questions)
    assert plan == planner().plan(records, 7)
    assert plan != planner().plan(records, 8)
    assert all(len(example.questions) <= 16 for example in plan)


def test_layouts_share_prompts_among_documents():
    records = passages(64)
    plan = planner(layouts=[[8, 1, 1.0]], text_share=0, none_share=0).plan(records, 0)
    assert {len(example.chunks) for example in plan} == {8}
    joined = planner(layouts=[[1, 2, 1.0]], text_share=0, none_share=0).plan(records, 0)
    assert {len(example.chunks) for example in joined} == {1}
    lengths = {len(example.chunks[0]) for example in joined}
    one = max(len(chunk) for example in plan for chunk in example.chunks)
    assert min(lengths) > one
    narrow = planner(segment_tokens=one + 1, layouts=[[1, 4, 1.0]], text_share=0, none_share=0)
    assert all(len(example.chunks[0]) <= one for example in narrow.plan(records, 0))  # two do not fit one segment


def test_epochs_read_the_same_chunks_in_other_company():
    records = passages(40)
    made = planner(layouts=[[2, 3, 0.5], [1, 3, 0.2], [4, 1, 0.3]], text_share=0, none_share=0)
    first, second = made.plan(records, 0), made.plan(records, 1)
    assert {ids for example in first for ids in example.chunks} == {ids for e in second for ids in e.chunks}
    assert {frozenset(example.chunks) for example in first} != {frozenset(example.chunks) for example in second}
    asked = [Counter(q.question for example in plan for q in example.questions) for plan in (first, second)]
    assert asked[0] == asked[1] == Counter(q.question for record in records for q in record.questions)


def test_examples_without_memory_have_their_share():
    kinds = Counter(e.kind for e in planner(text_share=0.3, none_share=0.2, layouts=[[1, 1, 1]]).plan(passages(300), 1))
    assert kinds["text"] / 300 == pytest.approx(0.3, abs=0.07)
    assert kinds["none"] / 300 == pytest.approx(0.2, abs=0.07)
    assert all(not e.chunks for e in planner(text_share=0, none_share=1).plan(passages(9), 1))


def test_a_long_document_comes_alone_with_all_its_chunks_or_as_many_as_there_may_be():
    (record,) = passages(1, words=300)
    whole = planner(segment_tokens=100, layouts=[[4, 1, 1.0]], max_segments=100, text_share=0, none_share=0)
    (example,) = whole.plan([record], 0)
    assert sum(map(len, example.chunks)) > 1000
    few = planner(segment_tokens=100, layouts=[[4, 1, 1.0]], max_segments=5, text_share=0, none_share=0)
    (limited,) = few.plan([record], 0)
    assert len(limited.chunks) == 5
    assert set(limited.chunks) <= set(example.chunks)


def test_of_too_many_chunks_those_come_that_the_questions_are_about():
    words = " and more" * 90
    parts = [f"The pump in hall {name} needs oil{words}." for name in ("amber", "birch", "cedar", "denim", "ebony")]
    asked = (Question("What does the pump in hall denim need?", ("oil",)), Question("And the one in birch?", ("oil",)))
    few = planner(segment_tokens=100, layouts=[[1, 1, 1.0]], max_segments=2, text_share=0, none_share=0)
    (example,) = few.plan([Record("d", " ".join(parts), asked)], 0)
    read = " ".join(tiny_tokenizer().decode(ids) for ids in example.chunks)
    assert [name for name in ("amber", "birch", "cedar", "denim", "ebony") if name in read] == ["birch", "denim"]


def test_documents_are_held_out_by_their_text():
    config = preset("small", holdout=0.1, holdout_documents=3)
    train, held = split_records(passages(50), config)
    assert (len(train), len(held)) == (47, 3)
    again = split_records(list(reversed(passages(50))), preset("small", holdout=0.1, holdout_documents=3, seed=9))[1]
    assert {record.doc_id for record in again} == {record.doc_id for record in held}
    assert split_records(passages(3), config)[1] == []
    assert split_records(passages(50), preset("small", holdout=0))[1] == []


# -- runs -----------------------------------------------------------------------------------------------------------

QUICK = {
    "learning_rate": 0.02,
    "rank": 4,
    "ratios": [1, 2],
    "layouts": [[1, 1, 0.5], [2, 1, 0.5]],
    "batch_questions": 6,
    "evaluate_every": 2,
    "holdout": 0.2,
}


@pytest.fixture
def decoder(decoder_folder) -> LocalDecoder:
    return LocalDecoder.load(str(decoder_folder))


def write(path: Path, records: list[Record]) -> Path:
    lines = [
        {
            "doc_id": record.doc_id,
            "text": record.text,
            "questions": [
                {"id": f"{record.doc_id}/{n}", "question": q.question, "answers": list(q.answers)}
                for n, q in enumerate(record.questions)
            ],
        }
        for record in records
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    return write(tmp_path / "qa.jsonl", passages(16))


def prepared(decoder, data, **changes) -> Finetune:
    config = preset("small", **(QUICK | changes))
    chunker = Chunker(decoder.tokenizer, ChunkConfig(200, 24, 4))
    return Finetune(decoder, registry.get("attention_matching"), chunker, [DataFile(data)], config, group="pumps")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_a_run_makes_an_adapter_that_reads_memory_better(decoder, data, tmp_path):
    base = {name: tensor.clone() for name, tensor in decoder.runner.model.state_dict().items()}
    run = prepared(decoder, data)
    seen = []
    manifest = run.run(tmp_path / "out", tmp_path / "work", seen.append)
    after = decoder.runner.model.state_dict()
    assert all(torch.equal(tensor, base[name.replace(".base_layer", "")]) for name, tensor in after.items())
    assert decoder.adapters == ()
    assert not (tmp_path / "work").exists()
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "lloco.json", "log.jsonl",
    ]  # fmt: skip
    assert manifest == AdapterManifest.load(tmp_path / "out")
    metrics = manifest.metrics
    assert metrics["held_out_loss"] < 0.8 * metrics["held_out_loss_before"]
    assert metrics["updates"] == run.summary["updates"] == seen[-1].step == seen[-1].steps
    assert manifest.data[0]["documents"] == 16
    assert "/" not in json.dumps([file["name"] for file in manifest.data])
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, metrics["updates"] + 1))
    # what was measured is what anyone gets who loads it
    load(decoder, tmp_path / "out", "pumps")
    prompts = [Prompt(question.question) for record in run._held for question in record.questions]
    answers = [question.answers[0] for record in run._held for question in record.questions]
    tuned, plain = (decoder.answer_losses(prompts, answers, name) for name in ("pumps", None))
    assert sum(loss for loss, _ in tuned) < sum(loss for loss, _ in plain)


def test_what_is_held_out_is_measured_with_the_best_weights(decoder, data, tmp_path):
    run = prepared(decoder, data, layouts=[[1, 1, 1.0]], ratios=[1])
    manifest = run.run(tmp_path / "out", tmp_path / "work")
    load(decoder, tmp_path / "out", "pumps")
    segments = Segments(decoder, registry.get("attention_matching"), tmp_path / "again")
    loss = count = 0.0
    for example in run._held_out:
        prompts = [Prompt(question.question, segments.prefix(example)) for question in example.questions]
        for total, size in decoder.answer_losses(prompts, [q.answers[0] for q in example.questions], "pumps"):
            loss, count = loss + total, count + size
    assert loss / count == pytest.approx(manifest.metrics["held_out_loss"], rel=1e-3)


class Stopped(Exception):
    pass


def stop_after(step: int):
    def progress(at) -> None:
        if at.step == step:
            raise Stopped

    return progress


def stopped(*_) -> None:
    raise Stopped


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(decoder_folder, data, tmp_path):
    def begin(name, progress=None):
        decoder = LocalDecoder.load(str(decoder_folder))
        return prepared(decoder, data).run(tmp_path / name, tmp_path / f"{name}-work", progress)

    straight = begin("straight")
    with pytest.raises(Stopped):
        begin("stopped", stop_after(5))
    assert not (tmp_path / "stopped").exists()
    steps = []
    resumed = begin("stopped", lambda at: steps.append(at.step))
    assert steps[0] == 5  # from the checkpoint after the fourth update
    for name, tensor in weights(tmp_path / "straight").items():
        assert torch.equal(tensor, weights(tmp_path / "stopped")[name]), name
    keys = ("held_out_loss", "best_update", "updates", "tokens")
    assert [resumed.metrics[key] for key in keys] == [straight.metrics[key] for key in keys]


def test_a_run_killed_at_any_moment_goes_on(decoder_folder, data, tmp_path):
    command = [sys.executable, "-m", "lloco_engine", "finetune", "--data", str(data), "--out", str(tmp_path / "out")]
    command += ["--decoder", str(decoder_folder), *(f"--set={n}={json.dumps(v)}" for n, v in QUICK.items())]
    command += ["--set=evaluate_every=1", "--epochs", "40", "--set=patience=1000"]
    work = tmp_path / ".out.work"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (work / "checkpoint.safetensors").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
    found = checkpoint.load(work, _key_of(work))
    assert found is not None
    assert found[0].step >= 1
    command[command.index("40")] = "40"
    shortened = [*command, "--max-minutes", "0.0001"]  # the clock is not part of what a run is
    finished = subprocess.run(shortened, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert AdapterManifest.load(tmp_path / "out").metrics["updates"] >= found[0].step
    assert not work.exists()


def _key_of(work: Path) -> str:
    with safe_open(str(work / "checkpoint.safetensors"), framework="pt") as file:
        return file.metadata()["key"]


def test_an_unfinished_run_with_other_settings_or_a_damaged_checkpoint_is_refused(decoder, data, tmp_path):
    with pytest.raises(Stopped):
        prepared(decoder, data).run(tmp_path / "out", tmp_path / "work", stop_after(3))
    with pytest.raises(ConfigError, match="unfinished run with other data or settings"):
        prepared(decoder, data, learning_rate=0.5).run(tmp_path / "out", tmp_path / "work")
    (tmp_path / "work" / "checkpoint.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"cannot be read.*remove"):
        prepared(decoder, data).run(tmp_path / "out", tmp_path / "work")
    assert decoder.adapters == ()


def test_a_folder_that_exists_is_not_written_over(decoder, data, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="must be new"):
        prepared(decoder, data).run(tmp_path / "out", tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_run_stops_when_it_no_longer_gets_better_and_keeps_the_best(decoder, data, tmp_path):
    run = prepared(decoder, data, learning_rate=3.0, evaluate_every=1, patience=2, epochs=20)
    metrics = run.run(tmp_path / "out", tmp_path / "work").metrics
    assert metrics["updates"] < run.summary["updates"]
    assert metrics["updates"] - metrics["best_update"] == 2
    assert metrics["held_out_loss"] <= metrics["held_out_loss_before"]


def test_a_run_ends_on_time_with_the_learning_rate_at_its_end(decoder, data, tmp_path):
    run = prepared(decoder, data, epochs=5000, max_minutes=0.05, evaluate_every=10**6)
    manifest = run.run(tmp_path / "out", tmp_path / "work")
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    rates = [entry["learning_rate"] for entry in log if "loss" in entry]
    assert manifest.metrics["updates"] < run.summary["updates"]
    assert rates[-1] < 0.2 * max(rates)


def test_a_run_can_begin_with_an_adapter_of_its_shape(decoder, data, tmp_path):
    first = prepared(decoder, data).run(tmp_path / "first", tmp_path / "work").metrics

    def on(**changes):
        config = preset("small", **(QUICK | changes))
        chunker = Chunker(decoder.tokenizer, ChunkConfig(200, 24, 4))
        files = [DataFile(data)]
        compressor = registry.get("attention_matching")
        return Finetune(decoder, compressor, chunker, files, config, group="pumps", start=tmp_path / "first")

    second = on().run(tmp_path / "second", tmp_path / "work").metrics
    assert second["held_out_loss_before"] == pytest.approx(first["held_out_loss"], rel=1e-3)
    wider = on(targets=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"])  # what is new adds nothing as yet
    third = wider.run(tmp_path / "third", tmp_path / "work").metrics
    assert third["held_out_loss_before"] == pytest.approx(first["held_out_loss"], rel=1e-3)
    trained = load_file(tmp_path / "third" / "adapter_model.safetensors")
    assert any(trained[key].any() for key in trained if "up_proj.lora_B" in key)
    for other in ({"rank": 8}, {"targets": ["q_proj", "v_proj"]}):
        with pytest.raises(ConfigError, match="must be of the run's rank"):
            on(**other).run(tmp_path / "fourth", tmp_path / "work")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"doc_id": "x", "text": "y", "questions": [{"question": "", "answers": ["a"]}]}', r"line 17.*question'"),
        ('{"doc_id": "x", "questions": []}', r"line 17: field 'text'"),
        ("not JSON", r"line 17: a record must be a JSON object"),
    ],
)
def test_bad_data_is_named_by_line_and_field_and_leaves_nothing(decoder_folder, data, tmp_path, line, message):
    data.write_text(data.read_text() + line + "\n")
    before = sorted(tmp_path.rglob("*"))
    command = ["finetune", "--data", str(data), "--out", str(tmp_path / "out"), "--decoder", str(decoder_folder)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert re.search(message, result.stderr)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_trains_on_refined_segments(decoder_folder, data, tmp_path):
    command = ["finetune", "--data", str(data), "--limit", "4", "--refine", "1", "--decoder", str(decoder_folder)]
    quick = [f"--set={name}={json.dumps(value)}" for name, value in (QUICK | {"ratios": [4]}).items()]
    done = CliRunner().invoke(app, [*command, *quick, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert AdapterManifest.load(tmp_path / "out").compressor_settings["refine"] == 1
    refused = CliRunner().invoke(app, [*command, "--store", str(tmp_path / "store")])
    assert refused.exit_code == 2
    assert "goes with --out" in refused.output


# -- stores ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path, decoder_folder) -> Path:
    path = tmp_path / "store"
    chunk = ChunkConfig(200, 24, 4)
    with Engine.open(
        path, decoder=str(decoder_folder), embedder=HashingEmbedder(), chunk=chunk, compress=CompressConfig(ratio=2)
    ) as engine:
        engine.ingest([Document(r.doc_id, r.text) for r in passages(16)], metadata={"group": "pumps"})
    return path


def opened(store: Path) -> Engine:
    return Engine.open(store, embedder=HashingEmbedder())


def test_a_stores_own_segments_are_read_where_they_match(store, data, monkeypatch):
    config = preset("small", **(QUICK | {"ratios": [2], "layouts": [[2, 1, 1.0]]}))
    with opened(store) as engine:
        monkeypatch.setattr(engine.compressor, "make", None)  # nothing may be compressed
        kept = finetune_store(engine, [DataFile(data)], config, group="pumps")
        assert (kept.group, kept.version, kept.current) == ("pumps", 1, True)
        assert engine.ask("How much oil?", generate=GenerateConfig(max_new_tokens=4)).adapter == "pumps@1"
        plain = engine.ask("How much oil?", generate=GenerateConfig(max_new_tokens=4), adapter="none")
        assert plain.adapter == "none"
    assert sorted(p.name for p in (store / "adapters").iterdir()) == ["pumps"]


def test_a_store_is_as_it_was_when_a_run_ends_early_and_the_next_goes_on(store, data):
    config = preset("small", **QUICK)
    with opened(store) as engine:
        with pytest.raises(Stopped):
            finetune_store(engine, [DataFile(data)], config, group="pumps", progress=stop_after(3))
        assert engine.adapters.registry.kept() == []
        assert engine.ask("How much oil?", generate=GenerateConfig(max_new_tokens=4)).adapter == "none"
        steps: list[int] = []
        finetune_store(engine, [DataFile(data)], config, group="pumps", progress=lambda at: steps.append(at.step))
        assert steps[0] == 3
        assert [one.version for one in engine.adapters.registry.kept()] == [1]
    assert not [p for p in Store.open(store).verify() if p.kind != "orphan"]


def test_a_run_killed_between_the_store_and_its_end_is_not_added_twice_nor_for_other_data(store, data, monkeypatch):
    config = preset("small", **QUICK)
    with opened(store) as engine:
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr("lloco_engine.finetune.run._tidy", stopped)  # in the store, its folder still there
            finetune_store(engine, [DataFile(data)], config, group="pumps")
        trained: list[int] = []

        def train(**changes) -> int:
            return finetune_store(
                engine,
                [DataFile(data, **changes)],
                config,
                group="pumps",
                progress=lambda at: trained.append(at.step),
            ).version

        assert train() == 1 and not trained  # the same run: there already
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr("lloco_engine.finetune.run._tidy", stopped)
            finetune_store(engine, [DataFile(data)], config, group="pumps")
        trained.clear()
        assert train(limit=8) == 3 and trained  # another one: trained on its own data
        versions = [one.manifest.data[0]["limit"] for one in engine.adapters.registry.kept()]
        assert versions == [None, None, 8]


# -- distillation ---------------------------------------------------------------------------------------------------


def test_a_teacher_is_what_the_decoder_expects_with_the_text(decoder):
    context, end = tokens(decoder, TEXT), decoder.tokenizer.eos_token_id
    gold = [[*tokens(decoder, answer), end] for answer in ANSWERS]
    (whole,) = Uncompressed().compress(decoder, context, [1])
    text = Prefix((whole,), (0,), decoder.template_tokens + len(context))
    teachers = teach(decoder, text, QUESTIONS, gold)
    for question, answer, teacher in zip(QUESTIONS, gold, teachers, strict=True):
        ids = [*decoder.template.prefix_ids, *decoder.template.question_ids(question, context), *answer[:-1]]
        logits = decoder.runner.model(torch.tensor([ids])).logits[0, -len(answer) :]
        expected = torch.softmax(logits.float(), dim=-1).topk(16)
        torch.testing.assert_close(
            teacher.weights, expected.values / expected.values.sum(-1, keepdim=True), rtol=1e-3, atol=1e-4
        )
        assert torch.equal(teacher.tokens[:, 0], expected.indices[:, 0])
    again = Teacher.from_json(json.loads(json.dumps(teachers[0].to_json())), "here")
    torch.testing.assert_close(again.weights, teachers[0].weights, rtol=1e-2, atol=1e-3)


def test_the_distillation_loss_is_least_where_the_teacher_is_met():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 30, generator=generator)
    top = torch.softmax(logits, dim=-1).topk(30)
    teacher = Teacher(top.indices, top.values)
    met = distillation_loss(logits, [teacher])
    entropy = -(top.values * top.values.log()).sum()
    assert met == pytest.approx(entropy.item(), rel=1e-5)
    assert distillation_loss(torch.randn(5, 30, generator=generator), [teacher]) > met


@pytest.mark.parametrize("teacher", ["x", [[1, 2]], [[[1, 2], [0.5]]], [[[1], [0.0]]]])
def test_a_teacher_of_another_form_is_named(tmp_path, teacher):
    question = {"id": "a", "question": "Who?", "answers": ["I"], "teacher": teacher}
    path = tmp_path / "studied.jsonl"
    path.write_text(json.dumps({"doc_id": "d", "text": "t", "questions": [question]}) + "\n")
    with pytest.raises(DocumentError, match=r"line 1: field 'questions\[0\].*teacher"):
        read_teachers(path)


def test_linear_layers_in_bfloat16_give_nearly_the_same_loss_and_gradients():
    decoder, parameters = adapted()
    prompts = [Prompt(question, place(decoder, [whole(decoder)])) for question in QUESTIONS]
    prompts = [Prompt(question, prompts[0].prefix) for question in QUESTIONS]
    gold = [[*tokens(decoder, answer), decoder.tokenizer.eos_token_id] for answer in ANSWERS]
    losses, gradients = [], []
    for in_bf16 in (False, True):
        made = answer_logits(decoder, prompts, gold, "new", in_bf16=in_bf16)
        loss = torch.nn.functional.cross_entropy(made.logits, made.targets)
        losses.append(loss.detach())
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(parameters.values()))]))
        assert made.logits.dtype == gradients[-1].dtype == torch.float32
    assert losses[0] != losses[1], "nothing ran in bfloat16"
    torch.testing.assert_close(losses[0], losses[1], rtol=0.02, atol=0.02)
    assert float(torch.nn.functional.cosine_similarity(*gradients, dim=0)) > 0.99
    with torch.no_grad():  # what is held out is measured in single precision
        measured = [answer_logits(decoder, prompts, gold, "new", in_bf16=in_bf16).logits for in_bf16 in (False, True)]
    assert torch.equal(*measured)
