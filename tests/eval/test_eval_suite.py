"""The suite of `lloco eval`: tasks, what each method reads, segments kept between runs, intervals, a killed run."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from lloco_engine.cli import app
from lloco_engine.compress import registry
from lloco_engine.config import ChunkConfig, GenerateConfig, PrefixConfig, RetrieveConfig, StoreConfig
from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.errors import ConfigError, DocumentError
from lloco_engine.eval import metrics, results, tasks
from lloco_engine.eval.data import Group, Question, group_records, read_records
from lloco_engine.eval.engines import Engines, GroupEngines, KeptSegments
from lloco_engine.eval.methods import METHODS, Row
from lloco_engine.eval.reading import Reader, Reading
from lloco_engine.eval.run import EvalConfig, run
from lloco_engine.eval.statistics import DRAWS, Sample, interval
from lloco_engine.eval.tasks.choices import options_of, with_options
from lloco_engine.segment_cache import SegmentCache
from lloco_engine.testing import HashingEmbedder, save_tiny_decoder, tiny_decoder, tiny_tokenizer

TOPICS = ("pump oil", "mill wheel", "tram bell", "salt cave", "lamp wick")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_decoder(tmp_path_factory.mktemp("suite") / "tiny")


@pytest.fixture(scope="module")
def decoder(folder) -> LocalDecoder:
    return LocalDecoder.load(str(folder))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> None:
    """No test finds another's segments."""
    monkeypatch.setenv("LLOCO_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def data(tmp_path) -> Path:
    """Three documents of five topics each, a question about each topic."""
    lines = []
    for number in range(3):
        parts = [f"The {topic} of hall {number} was bought in {1900 + 7 * at}. " * 3 for at, topic in enumerate(TOPICS)]
        questions = [
            {"id": f"{number}-{at}", "question": f"When was the {topic} bought?", "answers": [str(1900 + 7 * at)]}
            for at, topic in enumerate(TOPICS)
        ]
        lines.append(json.dumps({"doc_id": f"d{number}", "text": "\n\n".join(parts), "questions": questions}))
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def config(data: Path, **changes: Any) -> EvalConfig:
    settings: dict[str, Any] = {"ratios": (2, 8), "segment_tokens": 96, "max_new_tokens": 4, "top_k": 2}
    return EvalConfig(str(data), **(settings | changes))


# -- scores -----------------------------------------------------------------------------------------------------------


def test_exact_match_and_containment_overlook_what_squad_overlooks():
    assert metrics.exact_match("The Oil!", ["pump", "oil"]) == 1.0
    assert metrics.exact_match("oil pump", ["oil"]) == 0.0
    assert metrics.contains("It is painted, of course, in Dark Orange.", ["dark orange"]) == 1.0
    assert metrics.contains("oranges", ["orange"]) == 0.0


def test_the_geometric_mean_is_that_of_the_averages():
    assert metrics.geometric_mean({"rouge_1": 0.4, "rouge_2": 0.1, "rouge_l": 0.2}) == pytest.approx(0.2)
    assert metrics.geometric_mean({"rouge_1": 0.4, "rouge_2": None, "rouge_l": 0.2}) is None


@pytest.mark.parametrize(
    ("answer", "meant"),
    [
        ("(B) a red hat", 1),
        ("B", 1),
        ("b.", 1),
        ("The answer is C.", 2),
        ("He wore a blue scarf that day", 2),
        ("Zebras", None),
        ("D. or so", 0),  # there is no D, and "or" is in the first option
    ],
)
def test_a_written_choice_is_its_letter_or_the_option_it_is_most_like(answer, meant):
    assert metrics.choice(answer, ["(A) a coat or none", "(B) a red hat", "(C) a blue scarf"]) == meant


# -- tasks ------------------------------------------------------------------------------------------------------------


def test_options_are_read_from_either_form():
    quality = "Who did it?\n\n (A) The cook. \n (B) The butler,\nwith a spoon. \n (C) Nobody"
    assert options_of(quality) == ["The cook.", "The butler,\nwith a spoon.", "Nobody"]
    assert options_of("what did A. Smith say\nA. no\nB. yes") == ["no", "yes"]
    assert options_of("What is a pump?") == []
    assert options_of(with_options("Which?", ["one", "two"])) == ["one", "two"]


def test_every_task_is_registered_and_says_how_it_scores():
    for name in tasks.NAMES:
        task = tasks.get(name)
        assert task.name == name and task.about and set(task.scores) <= set(metrics.SCORES)
        assert tasks.get(name, **task.settings).settings == task.settings
    with pytest.raises(ConfigError, match=r"task must be one of plain, .*not 'riddles'"):
        tasks.get("riddles")
    with pytest.raises(ConfigError, match="'qmsum' has no such setting"):
        tasks.get("qmsum", lengths=[1])


def test_a_task_finds_its_file(tmp_path):
    assert tasks.get("qmsum").source(tmp_path) == tmp_path / "qmsum" / "val.jsonl"
    with pytest.raises(ConfigError, match=r"qmsum/val.jsonl .*--data-folder"):
        tasks.get("qmsum").source(None)
    with pytest.raises(ConfigError, match="--data"):
        tasks.get("plain").source(tmp_path)
    assert tasks.get("needle").source(tmp_path) is None
    (tmp_path / "essays").mkdir()
    assert tasks.get("needle").source(tmp_path) == tmp_path / "essays"


@pytest.mark.parametrize(("name", "gold"), [("quality", "(B) two wheels"), ("tpo", "B")])
def test_multiple_choice_is_by_likelihood_and_by_the_letter(tmp_path, decoder, name, gold):
    asked = with_options("How many wheels?", ["one wheel", "two wheels", "three wheels"])
    record = {"doc_id": "a", "text": "The mill.", "questions": [{"question": asked, "answers": [gold]}]}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(record))
    result = run(config(path, task=name, methods=("none",)), decoder=decoder)["results"][0]
    options = {"quality": ["(A) one wheel", "(B) two wheels", "(C) three wheels"], "tpo": ["A", "B", "C"]}[name]
    losses = [decoder.answer_losses([Prompt(asked)], [option])[0] for option in options]
    assert result["loss"] == pytest.approx(losses[1][0] / losses[1][1], rel=1e-4)
    likeliest = min(range(3), key=lambda n: losses[n][0] / losses[n][1])
    assert result["accuracy"] == float(likeliest == 1)
    assert result["accuracy_generated"] in (0.0, 1.0)
    record["questions"][0]["answers"] = ["(E) five"]
    path.write_text(json.dumps(record))
    with pytest.raises(DocumentError, match=r"must be one of its options .*'\(E\) five'"):
        run(config(path, task=name, methods=("none",)), decoder=decoder)


# -- needles ----------------------------------------------------------------------------------------------------------


def needle(decoder: LocalDecoder, source: Path | None = None, **settings: Any) -> list[Group]:
    task = tasks.get("needle", **({"lengths": (256, 512, 1024), "depths": 3, "segment_tokens": 256} | settings))
    return task.groups(source, decoder, limit=None, passages_per_chunk=1, segments=1)


def test_needles_lie_at_their_depth_and_only_one_chunk_changes(decoder):
    groups = needle(decoder)
    assert [(group.tags["length"], group.tags["depth"]) for group in groups] == [
        (length, depth) for length in (256, 512, 1024) for depth in (0, 50, 100)
    ]
    by_length: dict[float, list[Group]] = {}
    for group in groups:
        by_length.setdefault(group.tags["length"], []).append(group)
    for length, cells in by_length.items():
        counts = {len(group.chunks) for group in cells}
        assert len(counts) == 1
        plain = [max((g.chunks[n] for g in cells), key=lambda c: sum(c == g.chunks[n] for g in cells))
                 for n in range(counts.pop())]  # fmt: skip
        for group in cells:
            text = "".join(group.chunks)
            size = len(decoder.tokenizer(text, add_special_tokens=False)["input_ids"])
            assert 0.5 * length < size <= length + 3 * 96
            assert sum(a != b for a, b in zip(group.chunks, plain, strict=True)) <= 1 or len(plain) < 3
            assert len(group.questions) == 3
            places = []
            for question in group.questions:
                (place,) = [m for m in re.finditer(r"[A-Z][a-z]+", text) if m[0].lower() == question.id]
                places.append(place.start() / len(text))
            if length > 256:  # else it is two sentences long
                nearest = min(abs(place - group.tags["depth"] / 100) for place in places)
                assert nearest < 0.3
    assert [g.chunks for g in needle(decoder)] == [g.chunks for g in groups], "the same every time"
    assert [g.chunks for g in needle(decoder, seed=1)] != [g.chunks for g in groups]


def test_a_haystack_is_a_folder_of_texts_long_enough_or_not(tmp_path, decoder):
    with pytest.raises(DocumentError, match="has none"):
        needle(decoder, tmp_path)
    (tmp_path / "a.txt").write_text("A short one. It has two sentences.\n\nAnd a paragraph.")
    groups = needle(decoder, tmp_path, lengths=(300,))
    assert "A short one." in "".join(groups[0].chunks) and len("".join(groups[0].chunks)) > 200
    for settings, message in (
        ({"lengths": (10,)}, "at least 256"),
        ({"needles": 9}, "needles 1 to 4"),
        ({"segment_tokens": 20}, "segment_tokens must be at least 192"),
    ):
        with pytest.raises(ConfigError, match=message):
            needle(decoder, **settings)


def test_a_grid_gives_a_cell_for_each_length_and_depth(decoder):
    settings = {"lengths": (256, 512), "depths": 2, "segment_tokens": 256}
    result = run(
        EvalConfig("", "needle", settings, methods=("none", "kv_retrieved"), ratios=(4,), max_new_tokens=4, top_k=1),
        decoder=decoder,
        embedder=HashingEmbedder(),
    )
    assert len(result["cells"]) == 2 * 2 * 2
    assert {(cell["length"], cell["depth"], cell["method"]) for cell in result["cells"]} == {
        (length, depth, method) for length in (256, 512) for depth in (0, 100) for method in ("none", "kv_retrieved")
    }
    assert all(0 <= row["success"] <= 1 and row["questions"] == 12 for row in result["results"])


# -- what each method reads -------------------------------------------------------------------------------------------


SHORT = GenerateConfig(max_new_tokens=4)


@pytest.fixture
def about(data, decoder) -> Iterator[GroupEngines]:
    """Engines of the first document, which is five chunks or more."""
    kept = {kind: registry.get("uncompressed") for kind in ("kv", "kvzip")}
    common = Engines(decoder, HashingEmbedder(), kept, ChunkConfig(96, 96, 0), StoreConfig("float16"),
                     RetrieveConfig(top_k=2), PrefixConfig())  # fmt: skip
    with common.about(group_records(read_records(data))[0]) as made:
        yield made


def questions(about: GroupEngines) -> list[str]:
    return [question.question for question in about.group.questions]


def readings(about: GroupEngines, decoder: LocalDecoder, method: str, ratio: float | None = None,
             adapter: str | None = None) -> list[Reading]:  # fmt: skip
    asked = questions(about)
    reader = Reader(decoder, SHORT)
    return list(reader.readings(about, METHODS[method], ratio, adapter, asked, [40] * len(asked)))


@pytest.mark.parametrize("method", ["kv", "kv_guided", "kv_retrieved"])
def test_a_method_asks_what_the_engine_would_be_asked(about, decoder, method):
    """Prompt, hits, tokens and losses are those of `Engine.ask` and `Engine.score` with the same options."""
    engine = about.memory("kv", 2)
    options = {
        "kv": {"hits": engine.store.chunks("0")},
        "kv_guided": {"whole_document": "0"},
        "kv_retrieved": {},
    }[method]
    made = readings(about, decoder, method, 2)
    assert sorted(number for reading in made for number in reading.numbers) == list(range(5))
    for reading in made:
        losses = decoder.answer_losses(reading.prompts, ["1907"] * len(reading.prompts))
        tokens = [generation.token_ids for generation in decoder.generate(reading.prompts, SHORT)]
        for number, prompt, loss, ids in zip(reading.numbers, reading.prompts, losses, tokens, strict=True):
            question = questions(about)[number]
            asked = engine.prepare(question, generate=SHORT, **options)
            assert (prompt.question, prompt.draft) == (asked.prompt.question, asked.prompt.draft)
            assert bool(prompt.draft) == (method != "kv")
            for part in ("offsets", "start", "placement", "focus", "prior"):
                assert getattr(prompt.prefix, part) == getattr(asked.prompt.prefix, part)
            pairs = zip(prompt.prefix.segments, asked.prompt.prefix.segments, strict=True)
            assert all(bool((mine.keys == theirs.keys).all()) for mine, theirs in pairs)
            answer = engine.ask(question, generate=SHORT, **options)
            assert list(answer.token_ids) == ids and answer.usage.prompt_slots == prompt.prefix.slots
            assert engine.score(question, ["1907"], generate=SHORT, **options) == [pytest.approx(loss, rel=1e-4)]
    if method == "kv_retrieved":
        assert [hit.segment_id for hit in answer.hits] == [hit.segment_id for hit in engine.retrieve(question)]
        assert len(answer.hits) == 2


def test_what_reads_the_same_is_read_together(about, decoder):
    (reading,) = readings(about, decoder, "kv", 2)
    assert reading.numbers == tuple(range(5)) and len({id(prompt.prefix) for prompt in reading.prompts}) == 1
    assert len(readings(about, decoder, "kv_guided", 2)) == 5, "search thinks something else of each chunk"


def test_text_retrieval_reads_the_same_chunks_and_the_same_source_tokens(about, decoder, monkeypatch):
    compressed = about.memory("kv", 2)
    texts: list[str] = []
    prefill = decoder.prefill
    monkeypatch.setattr(
        decoder, "prefill", lambda ids, **more: texts.append(decoder.tokenizer.decode(ids)) or prefill(ids, **more)
    )
    made = readings(about, decoder, "text_retrieved")
    assert len(texts) == len(made)
    for reading, text in zip(made, texts, strict=True):
        question = questions(about)[reading.numbers[0]]
        chosen = compressed.retrieve(question)
        assert text == "\n\n".join(hit.text.strip() for hit in chosen)
        assert reading.text_tokens == reading.prompts[0].prefix.source_tokens
        assert abs(reading.text_tokens - sum(hit.source_tokens for hit in chosen)) <= 4
        assert reading.left_out == 0
        assert reading.prompts[0].draft == compressed.prepare(question).prompt.draft != "", "the same hints"


@pytest.mark.parametrize(("method", "memory"), [("text_slots", "kv"), ("text_slots_retrieved", "kv_retrieved")])
def test_text_by_slots_costs_as_many_tokens_as_the_memory_has_slots(about, decoder, method, memory):
    made = {number: each for each in readings(about, decoder, method, 8) for number in each.numbers}
    for number, question in enumerate(questions(about)):
        search = about.search
        scope = search.retrieve(question) if memory == "kv_retrieved" else about.chunks(search)
        assert made[number].text_tokens == sum(math.ceil(hit.source_tokens / 8) for hit in scope)
        assert made[number].prompts[0].prefix.source_tokens == made[number].text_tokens
        best = about.passages.retrieve(question, top_k=1)[0].text.strip()
        assert made[number].text_tokens <= len(decoder.template.text_ids(best)) or memory == "kv"


def test_text_is_read_with_the_adapter_that_answers(about, decoder, monkeypatch):
    used = []
    prefill = decoder.prefill
    monkeypatch.setattr(type(decoder), "adapters", ("law",))
    monkeypatch.setattr(
        decoder, "prefill", lambda ids, adapter=None, **more: used.append(adapter) or prefill(ids, **more)
    )
    for method in ("full", "text_retrieved", "kv"):
        readings(about, decoder, method, 2 if method == "kv" else None, "law")
    chunks = len(about.chunks(about.search))
    assert set(used[:-chunks]) == {"law"}
    assert set(used[-chunks:]) == {None}, "segments are the base weights' own"


def test_full_text_with_an_adapter_is_the_text_in_the_prompt(data, tmp_path):
    """The slow, obvious way: every question alone, the text before it, the adapter over all of it."""
    from decoder_cases import save_adapter

    save_adapter(tmp_path / "adapter", 1)
    decoder = LocalDecoder(tiny_decoder(), tiny_tokenizer(), "tiny")
    decoder.load_adapter(tmp_path / "adapter", "law")
    settings = config(data, methods=("full",), adapter="none,law", answers=False, limit=1)
    base, law = run(settings, decoder=decoder)["results"]
    (each,) = read_records(data, 1)
    total = tokens = 0.0
    for question in each.questions:
        ((loss, count),) = decoder.answer_losses(
            [Prompt(question.question, context=each.text)], question.answers, "law"
        )
        total, tokens = total + loss, tokens + count
    assert law["loss"] == pytest.approx(total / tokens, rel=1e-4)
    assert law["loss"] != pytest.approx(base["loss"], rel=1e-3)


def test_every_method_runs(data, decoder, tmp_path):
    predictions = tmp_path / "answers.jsonl"
    result = run(
        config(data, methods=tuple(METHODS), ratios=(8,)),
        decoder=decoder,
        embedder=HashingEmbedder(),
        predictions=predictions,
    )
    assert [row["method"] for row in result["results"]] == list(METHODS)
    assert all(math.isfinite(row["loss"]) and row["questions"] == 15 for row in result["results"])
    rows = {row["method"]: row for row in result["results"]}
    assert rows["text_slots"]["prompt_tokens"] - rows["none"]["prompt_tokens"] == pytest.approx(
        rows["kv"]["prompt_slots"], rel=0.1
    )
    assert rows["kvzip"]["prompt_slots"] == pytest.approx(rows["kv"]["prompt_slots"], rel=0.1)
    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert len(lines) == 15 * len(METHODS)
    mine = [line for line in lines if line["method"] == "kv"]
    assert sum(line["f1"] for line in mine) / 15 == pytest.approx(rows["kv"]["f1"])
    assert {"id", "question", "answers", "text", "loss", "tokens"} <= set(mine[0])


# -- segments kept between runs ---------------------------------------------------------------------------------------


def test_segments_are_made_once_for_all_runs(data, decoder, monkeypatch):
    method = type(registry.get("attention_matching"))
    made: list[int] = []
    make = method.make
    monkeypatch.setattr(
        method, "make", lambda self, d, ids, ratios: made.append(len(ids)) or make(self, d, ids, ratios)
    )
    one = run(config(data, methods=("kv",), answers=False), decoder=decoder)
    chunks = len(made)
    assert chunks > 3
    other = run(config(data, methods=("none", "kv", "kv_retrieved")), decoder=decoder, embedder=HashingEmbedder())
    assert len(made) == chunks, "another run over the same documents compresses nothing"
    assert [row["loss"] for row in other["results"] if row["method"] == "kv"] == [r["loss"] for r in one["results"]]
    run(config(data, methods=("kv",), ratios=(2, 4), answers=False), decoder=decoder)
    assert len(made) == 2 * chunks, "another ratio is made, and nothing else"


def test_a_damaged_segment_is_made_anew(decoder, tmp_path):
    cache, ids = SegmentCache(tmp_path, decoder, registry.get("kvzip")), list(range(40, 80))
    kept = KeptSegments(cache, (2, 4, 8))
    (first,) = kept.compress(decoder, ids, [4])
    assert cache.made == 1 and len(list(tmp_path.rglob("*.safetensors"))) == 3
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-9] + b"x" * 9)
    (again,) = kept.compress(decoder, ids, [4])
    assert cache.made == 2 and bool((again.keys == first.keys).all())
    assert kept.compress(decoder, ids, [4])[0].lengths.tolist() == first.lengths.tolist() and cache.made == 2
    assert [one.slots for one in kept.compress(decoder, ids, [8, 2])] == [5, 20] and cache.made == 2


def test_other_settings_or_another_method_share_nothing(decoder, tmp_path):
    ids = range(40, 80)
    for made_by in (registry.get("kvzip"), registry.get("attention_matching"),
                    registry.get("attention_matching", ridge=0.5)):  # fmt: skip
        cache = SegmentCache(tmp_path, decoder, made_by)
        cache.get(ids, 4)
        assert cache.made == 1
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3


# -- intervals --------------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_resampled_documents():
    parts = [{"loss": float(n * n), "tokens": 2.0 + n % 3} for n in range(12)]
    drawn = Sample(12, seed=0).ratio(parts, "loss", "tokens")
    assert drawn.shape == (1 + DRAWS,)
    assert drawn[0] == pytest.approx(sum(p["loss"] for p in parts) / sum(p["tokens"] for p in parts))
    chance = np.random.default_rng(7)  # the slow, obvious way, with other draws
    slow = []
    for _ in range(4000):
        drawn_parts = [parts[at] for at in chance.integers(0, 12, 12)]
        slow.append(sum(p["loss"] for p in drawn_parts) / sum(p["tokens"] for p in drawn_parts))
    assert interval(drawn) == pytest.approx(list(np.quantile(slow, [0.025, 0.975])), rel=0.08)
    assert (Sample(12, 0).ratio(parts, "loss", "tokens") == drawn).all()
    assert interval(Sample(1, 0).ratio(parts[:1], "loss", "tokens")) is None
    assert interval(Sample(12, 0).ratio(parts, "loss", "nothing")) is None


def test_differences_are_paired():
    groups = [Group(("x",), (Question("q", ("a",)),), 1) for _ in range(20)]
    about = [Row("none", None, "none"), Row("kv", 8, "none"), Row("full", None, "law")]
    hard = np.random.default_rng(0).uniform(1, 9, 20)  # documents differ far more than methods do

    def value(loss: float) -> dict[str, Any]:
        return {"questions": [{"loss": loss, "tokens": 1, "prompt_slots": 0, "prompt_tokens": 0, "source_tokens": 0}]}

    values = [[value(each), value(each - 0.5 + 0.01 * (n % 2)), value(1.0)] for n, each in enumerate(hard)]
    table = results.rows(about, groups, values, 0)
    low, high = table[1]["intervals"]["loss"]
    assert high - low > 1
    (one,) = [each for each in results.differences(about, groups, values, 0) if each["method"] == "kv"]
    assert one["against"] == {"method": "none", "ratio": None, "adapter": "none"}
    loss = one["metrics"]["loss"]
    assert loss["difference"] == pytest.approx(-0.495) and loss["interval"][1] < -0.49
    assert table[0]["recovered"] is None, "there is no full text with this adapter"


def test_a_method_may_be_for_one_adapter_only(data, decoder, monkeypatch):
    monkeypatch.setattr(type(decoder), "adapters", ("law",))
    monkeypatch.setattr(decoder, "_use", lambda adapter: None)
    methods = ("none", "full@none", "kv@law", "kv")
    result = run(config(data, adapter="none,law", methods=methods, ratios=(8,), answers=False), decoder=decoder)
    found = [(row["adapter"], row["method"]) for row in result["results"]]
    assert found == [("none", "none"), ("none", "full"), ("none", "kv"), ("law", "none"), ("law", "kv")]
    against = {
        (d["method"], d["adapter"]): d["against"] for d in result["differences"] if d["against"]["method"] == "full"
    }
    assert against[("kv", "law")]["adapter"] == "none"


def test_no_method_says_a_run_of_tokens_twice_where_that_is_forbidden(data, decoder, monkeypatch):
    """The tiny decoder goes round in circles when it may."""
    generate, made = type(decoder).generate, []
    monkeypatch.setattr(type(decoder), "generate", lambda *given: made.append(generate(*given)) or made[-1])

    def most(**more):
        made.clear()
        run(config(data, methods=("none", "full", "kv"), ratios=(8,), max_new_tokens=40, **more), decoder=decoder)
        answers = [generation.token_ids for batch in made for generation in batch]
        runs = [Counter(zip(ids, ids[1:], ids[2:], strict=False)) for ids in answers]
        return max(count for each in runs for count in each.values())

    assert most() > 1
    assert most(no_repeat_ngram=3) == 1


def test_answers_are_as_long_as_is_asked_for(data, decoder, monkeypatch):
    generate, made = type(decoder).generate, []
    monkeypatch.setattr(type(decoder), "generate", lambda *given: made.append(generate(*given)) or made[-1])
    monkeypatch.setattr(decoder, "eos", set(range(0, len(decoder.tokenizer), 2)))

    def least(**more):
        made.clear()
        run(config(data, methods=("none", "full", "kv"), ratios=(8,), max_new_tokens=12, **more), decoder=decoder)
        return min(len(generation.token_ids) for batch in made for generation in batch)

    assert least() < 8
    assert least(min_new_tokens=8) >= 8


def test_recovered_is_within_the_same_adapter(data, decoder, monkeypatch):
    """An adapter's rows are measured between its own no-context and full-text rows."""
    monkeypatch.setattr(type(decoder), "adapters", ("law",))
    monkeypatch.setattr(decoder, "_use", lambda adapter: None)  # answers as the base does
    result = run(config(data, adapter="none,law", methods=("none", "full", "kv"), ratios=(8,)), decoder=decoder)
    assert [(row["adapter"], row["method"]) for row in result["results"]] == [
        (adapter, method) for adapter in ("none", "law") for method in ("none", "full", "kv")
    ]
    by_adapter = {a: [r["recovered"] for r in result["results"] if r["adapter"] == a] for a in ("none", "law")}
    assert by_adapter["none"] == pytest.approx(by_adapter["law"])
    against = [
        (each["against"]["method"], each["against"]["adapter"])
        for each in result["differences"]
        if (each["method"], each["adapter"]) == ("kv", "law")
    ]
    assert against == [("full", "none"), ("none", "law"), ("full", "law")]


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_runs_a_task_of_a_folder(data, folder, tmp_path):
    home = tmp_path / "all" / "qasper"
    home.mkdir(parents=True)
    (home / "val.jsonl").write_bytes(data.read_bytes())
    out = tmp_path / "out.json"
    command = ["eval", "--task", "qasper", "--data-folder", str(home.parent), "--methods", "none,full,kv,snapkv"]
    command += ["--ratios", "8", "--limit", "2", "--decoder", str(folder), "--json", str(out), "--max-new-tokens", "4"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert result["config"]["task"] == "qasper" and result["config"]["data"] == "val.jsonl"
    assert {"em", "rouge_2", "rouge_geometric", "intervals"} <= set(result["results"][0])
    assert "loss" in result["results"][2]["intervals"]
    for word in ("snapkv", "rouge geometric", "10 questions about 2 documents"):
        assert word in done.stdout
    assert str(tmp_path) not in out.read_text(), "no path of this machine"


def test_the_command_hides_needles_in_the_demo_documents(folder, tmp_path):
    out = tmp_path / "out.json"
    command = ["eval", "--task", "needle", "--lengths", "0.5k", "--depths", "2", "--decoder", str(folder)]
    bad = CliRunner().invoke(app, command)
    assert bad.exit_code == 2 and "--lengths" in bad.output
    command[4] = "300"
    done = CliRunner().invoke(app, [*command, "--methods", "none,kv", "--ratios", "8", "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert {cell["length"] for cell in json.loads(out.read_text())["cells"]} == {300}
    none = CliRunner().invoke(app, ["eval"])
    assert none.exit_code == 1 and "--data" in none.output


def test_a_killed_run_goes_on(data, folder, tmp_path, monkeypatch):
    """kill -9 in the middle, in a process of its own; the same command ends with what an undisturbed one gives."""
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "lloco_engine", "eval", "--data", str(data), "--decoder", str(folder)]
    command += ["--methods", "none,full,kv,kvzip", "--ratios", "2,4,8,16", "--json"]
    left = tmp_path / "out.json.partial.jsonl"
    process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < until:
        if left.exists() and len(left.read_text().splitlines()) > 5:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert left.exists() and not out.exists(), "it was killed half way"
    done = CliRunner().invoke(app, [*command[3:], str(out)], catch_exceptions=False)
    assert done.exit_code == 0 and not left.exists()
    other = tmp_path / "other.json"
    monkeypatch.setenv("LLOCO_CACHE", str(tmp_path / "elsewhere"))
    assert CliRunner().invoke(app, [*command[3:], str(other)], catch_exceptions=False).exit_code == 0
    one, two = (json.loads(path.read_text()) for path in (out, other))
    for mine, theirs in zip(one["results"], two["results"], strict=True):
        numbers = [name for name, value in mine.items() if isinstance(value, int | float)]
        assert [mine[name] for name in numbers] == pytest.approx([theirs[name] for name in numbers], rel=1e-4)
