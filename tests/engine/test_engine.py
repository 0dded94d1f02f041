"""The facade, from documents to answers, on a tiny seeded decoder and an embedder without a model."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import os
import shutil
import sqlite3
import threading
import time
from pathlib import Path

import pytest
import torch

from lloco_engine import Document, Engine, Failure, context
from lloco_engine.compress.uncompressed import Uncompressed
from lloco_engine.config import ChunkConfig, CompressConfig, GenerateConfig, PrefixConfig, StoreConfig
from lloco_engine.context import ContextBuilder
from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.engine import Progress
from lloco_engine.errors import (
    AdapterError,
    ConfigError,
    LLoCOError,
    ModelNotFound,
    NotInStore,
    PromptTooLong,
    SegmentUnavailable,
    StoreFull,
    StoreMismatch,
    StoreNotFound,
)
from lloco_engine.prefix import Room, assemble
from lloco_engine.readers import jsonl, read, size_of_files
from lloco_engine.readers.walk import open_file
from lloco_engine.store import Store
from lloco_engine.testing import HashingEmbedder, save_tiny_decoder
from lloco_engine.types import Prefix, Turn

SMALL = ChunkConfig(segment_tokens=64, window_tokens=24, window_overlap=4)
SHORT = GenerateConfig(max_new_tokens=8)
WHOLE = CompressConfig("uncompressed", 1)


def story(topic: str, sentences: int = 12) -> str:
    return " ".join(f"The {topic} number {number} stands in hall {number} of {topic}." for number in range(sentences))


PUMPS = Document("pumps.md", story("pump"), title="Pumps", source="in/pumps.md", metadata={"year": 2023, "kind": "a"})
CRANES = Document("cranes.md", story("crane"), title="Cranes", source="in/cranes.md", metadata={"year": 2024})
BOTH = [PUMPS, CRANES]


@pytest.fixture(scope="module")
def opened(tmp_path_factory, decoder):
    """Opens engines on the one decoder; a store by name, a fresh one each time."""

    def opens(store: Path, **changes) -> Engine:
        options = {"decoder": decoder, "embedder": HashingEmbedder(), "compress": WHOLE, "chunk": SMALL}
        return Engine.open(store, **(options | changes))

    return opens


@pytest.fixture(scope="module")
def filled_store(tmp_path_factory, opened) -> Path:
    path = tmp_path_factory.mktemp("filled") / "store"
    with opened(path) as engine:
        engine.ingest(BOTH)
    return path


@pytest.fixture
def engine(filled_store, opened, tmp_path):
    """An engine on a store of its own that holds both documents."""
    shutil.copytree(filled_store, tmp_path / "store")
    with opened(tmp_path / "store") as made:
        yield made


@pytest.fixture
def empty(opened, tmp_path):
    with opened(tmp_path / "empty") as made:
        yield made


def segment_file(engine: Engine, segment_id: str) -> Path:
    return engine.store.path / "segments" / segment_id[:2] / f"{segment_id}.safetensors"


class Interrupting(Uncompressed):
    """Compresses some chunks, then raises."""

    def __init__(self, after: int, error: BaseException) -> None:
        self.left, self.error = after, error

    def make(self, decoder, token_ids, ratios):
        if self.left == 0:
            raise self.error
        self.left -= 1
        return super().make(decoder, token_ids, ratios)


def interrupt(monkeypatch, engine: Engine, after: int, error: BaseException) -> Interrupting:
    compressor = Interrupting(after, error)
    monkeypatch.setattr(engine._setup, "compressor", compressor)
    return compressor


# -- ingest ----------------------------------------------------------------------------------------------------------


def test_ingest_reports_what_it_did(empty):
    seen: list[Progress] = []
    report = empty.ingest(BOTH, progress=seen.append)
    assert (report.added, report.replaced, report.unchanged, report.failed) == (("pumps.md", "cranes.md"), (), (), ())
    infos = empty.documents()
    assert report.segments == sum(info.segments for info in infos) >= 6
    assert report.source_tokens == sum(info.source_tokens for info in infos)
    assert report.slots == sum(info.slots for info in infos) == report.source_tokens  # nothing was compressed away
    assert report.bytes_written == sum(info.bytes for info in infos)
    assert 0 < report.compress_s <= report.seconds
    assert empty.stats()["documents"] == 2
    assert empty.verify() == []
    first, last = seen[0], seen[-1]
    assert (first.document, first.done_segments, first.source_tokens_done) == ("pumps.md", 0, 0)
    assert last.done_segments == last.total_segments_of_document == empty.store.document("cranes.md").segments
    assert (last.source_tokens_done, last.documents_done) == (report.source_tokens, 1)
    assert last.tokens_per_s > 0


def test_an_unchanged_document_loads_no_weights(filled_store, decoder_folder, opened, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the decoder was loaded")

    monkeypatch.setattr(LocalDecoder, "load", refuse)
    with opened(filled_store, decoder=str(decoder_folder)) as engine:
        report = engine.ingest(BOTH)
        assert report.unchanged == ("pumps.md", "cranes.md")
        assert (report.segments, report.compress_s, report.bytes_written) == (0, 0, 0)
        assert {info.version for info in engine.documents()} == {1}


def test_new_labels_are_taken_over_without_compressing(engine, monkeypatch):
    interrupt(monkeypatch, engine, 0, AssertionError("compressed again"))
    report = engine.ingest([PUMPS], metadata={"team": "x"})
    assert (report.replaced, report.segments) == (("pumps.md",), 0)
    assert engine.store.document("pumps.md").metadata == {"year": 2023, "kind": "a", "team": "x"}


def test_another_text_replaces_the_document_and_keeps_what_is_the_same(engine):
    longer = Document("pumps.md", PUMPS.text + "\n\n" + story("valve", 3), title="Pumps", metadata=PUMPS.metadata)
    report = engine.ingest([longer])
    assert report.replaced == ("pumps.md",)
    assert engine.store.document("pumps.md").version == 2
    assert engine.store.document_text("pumps.md") == longer.text
    assert engine.verify() == []
    assert engine.ingest([longer]).unchanged == ("pumps.md",)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StoreFull("no room")], ids=["interrupt", "full"])
def test_a_run_that_was_cut_off_goes_on_at_the_segment(empty, monkeypatch, error):
    whole = len(empty._setup.facts.tokenizer(PUMPS.text)["input_ids"])
    interrupt(monkeypatch, empty, 2, error)
    with pytest.raises(type(error)):
        empty.ingest(BOTH)
    assert empty.documents() == []
    assert {problem.kind for problem in empty.verify()} == {"orphan"}
    monkeypatch.undo()
    report = empty.ingest(BOTH)
    infos = empty.documents()
    assert report.added == ("pumps.md", "cranes.md")
    assert report.segments == sum(info.segments for info in infos) - 2
    assert whole < sum(info.source_tokens for info in infos)
    assert empty.verify() == []


def test_progress_counts_the_bytes_of_files_which_are_read_once(empty, tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text(story("lamp"))
    (folder / "b.txt").write_bytes(b"\x00\x01 no text")
    (folder / "c.jsonl").write_text("".join(json.dumps({"doc_id": n, "text": story(n)}) + "\n" for n in "xy"))
    (folder / "d.txt").write_text(story("tram"))
    total = size_of_files([folder])
    assert total == sum(file.stat().st_size for file in folder.glob("?.*"))
    opened = []
    for module in (read, jsonl):
        monkeypatch.setattr(module, "open_file", lambda path: opened.append(path.name) or open_file(path))
    seen: list[Progress] = []
    empty.ingest([folder], progress=seen.append)
    assert opened == ["a.txt", "b.txt", "c.jsonl", "d.txt"]
    done = [progress.bytes_done for progress in seen]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, total)
    before_d = next(progress.bytes_done for progress in seen if progress.document == "d.txt")
    assert before_d == total - (folder / "d.txt").stat().st_size
    x, y = (next(progress.bytes_done for progress in seen if progress.document == n) for n in "xy")
    assert y - x == len(story("x"))


def test_a_bad_document_is_named_and_the_rest_go_on(empty, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(story("lamp"))
    (tmp_path / "in" / "b.txt").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00")
    bad = [Document("", "text"), Document("blank", " \n"), Document("broken", "a\ud800"), PUMPS, PUMPS]
    bad.append(Document("meta", "text", metadata={"list": [b"1"]}))
    report = empty.ingest([*bad, tmp_path / "in", str(tmp_path / "missing.txt"), CRANES])
    assert report.added == ("pumps.md", "a.txt", "cranes.md")
    assert [failure.source.rsplit("/", 1)[-1] for failure in report.failed] == [
        "", "blank", "broken", "pumps.md", "meta", "b.txt", "missing.txt",
    ]  # fmt: skip
    reasons = [failure.reason for failure in report.failed]
    for reason, words in zip(
        reasons, ["id", "blank", "surrogate", "once in a run", "metadata", "binary", "no such"], strict=True
    ):
        assert words in reason
    assert all(isinstance(failure, Failure) for failure in report.failed)


def test_what_one_document_does_to_the_compressor_is_its_own_failure(empty, monkeypatch):
    from lloco_engine.errors import StoreError

    interrupt(monkeypatch, empty, 0, StoreError("keys of a segment must be finite"))
    assert [failure.source for failure in empty.ingest([PUMPS]).failed] == ["in/pumps.md"]


def test_sources_are_read_one_at_a_time(empty):
    held: list[int] = []

    def documents():
        for number in range(3):
            held.append(len(empty.documents()))
            yield Document(f"d{number}", story(f"thing{number}", 3))

    assert len(empty.ingest(documents()).added) == 3
    assert held == [0, 1, 2]


def test_one_source_alone_is_a_source(empty, tmp_path):
    (tmp_path / "a.txt").write_text("One sentence.")
    assert empty.ingest(str(tmp_path / "a.txt")).added == ("a.txt",)
    assert empty.ingest(PUMPS).added == ("pumps.md",)


def test_metadata_and_tenant_go_to_every_document(empty):
    acme = Document("own", "Some text.", tenant="acme")
    report = empty.ingest([PUMPS, acme], tenant="zeta", metadata={"year": 1})
    assert report.added == ("pumps.md",)
    assert "tenant 'zeta'" in report.failed[0].reason
    assert empty.store.document("pumps.md", "zeta").metadata == {"year": 1, "kind": "a"}
    assert empty.ingest([acme]).added == ("own",)
    assert [info.tenant for info in empty.documents()] == ["acme", "zeta"]
    with pytest.raises(ConfigError, match="'title'"):
        empty.ingest([PUMPS], metadata={"title": "x"})


def test_a_full_disk_leaves_the_store_as_it_was(engine, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreFull):
        engine.ingest([Document("new", story("new"))])
    monkeypatch.undo()
    assert [info.doc_id for info in engine.documents()] == ["cranes.md", "pumps.md"]
    assert engine.verify() == []
    assert engine.ingest([Document("new", story("new"))]).added == ("new",)


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_segment_is_made_again_in_place(engine, damage):
    hit = engine.store.chunks("pumps.md")[1]
    file = segment_file(engine, hit.segment_id)
    before, keys = file.read_bytes(), engine.store.load_segment(hit.segment_id).keys.clone()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(before[:-9] if damage == "cut" else before[:-1] + bytes([before[-1] ^ 1]))
    report = engine.ingest(BOTH)
    assert (report.repaired, report.unchanged, report.segments) == (("pumps.md",), ("cranes.md",), 1)
    assert engine.verify() == []
    assert torch.equal(engine.store.load_segment(hit.segment_id, verify=True).keys, keys)
    assert engine.store.document("pumps.md").version == 1


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE documents SET title = 'another'",
        "UPDATE metadata SET value = 's:another'",
        "UPDATE chunks SET start = start + 1 WHERE ordinal = 1",
        "UPDATE windows SET vector = zeroblob(length(vector))",
        "UPDATE segments SET slots = slots + 1",
    ],
)
def test_what_is_damaged_in_the_catalogue_is_put_right_by_the_next_ingest(engine, statement):
    documents = [Document("one", story("one"), metadata={"year": 2020}), *BOTH]
    engine.ingest(documents)
    connection = sqlite3.connect(engine.store.path / "catalogue.sqlite", isolation_level=None)
    connection.execute(statement)
    connection.close()
    assert engine.verify()
    report = engine.ingest(documents)
    assert "one" in report.repaired and report.segments == 0
    assert engine.verify() == []


def test_repair_and_then_ingest_of_the_stores_own_text(engine):
    hit = engine.store.chunks("pumps.md")[0]
    segment_file(engine, hit.segment_id).write_bytes(b"nonsense")
    engine.close()
    assert Store.repair(engine.store.path)
    with Engine.open(engine.store.path, decoder=engine._setup.decoder, embedder=HashingEmbedder()) as again:
        info = again.store.document("pumps.md")
        text = again.store.document_text("pumps.md")
        document = Document(info.doc_id, text, info.title, info.source, info.metadata, info.tenant)
        assert again.ingest([document]).repaired == ("pumps.md",)
        assert again.verify() == []


def test_delete(engine):
    engine.delete("pumps.md")
    assert [info.doc_id for info in engine.documents()] == ["cranes.md"]
    with pytest.raises(NotInStore):
        engine.delete("pumps.md")
    assert {hit.doc_id for hit in engine.retrieve("Where is pump number 3?", top_k=9)} == {"cranes.md"}


# -- open ------------------------------------------------------------------------------------------------------------


def test_a_store_opens_with_what_it_was_made_with(tmp_path, decoder_folder):
    embedder = HashingEmbedder()
    options = {"compress": CompressConfig("uncompressed", 4), "chunk": SMALL, "store_config": StoreConfig("int8")}
    with Engine.open(tmp_path / "s", decoder=str(decoder_folder), embedder=embedder, **options) as made:
        assert (made.manifest.ratio, made.manifest.dtype, made.manifest.decoder) == (4, "int8", str(decoder_folder))
    with Engine.open(tmp_path / "s", embedder=embedder) as again:
        again.ingest([Document("d", "A short text about pumps.")])
        assert again.ask("What is it about?", generate=SHORT).hits[0].doc_id == "d"


def test_the_decoder_in_a_folder_and_in_hand_is_the_same(filled_store, decoder_folder, opened):
    with opened(filled_store, decoder=str(decoder_folder)) as engine:
        assert len(engine.documents()) == 2


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"embedder": HashingEmbedder(32)}, "embedder_fingerprint"),
        ({"compress": CompressConfig("uncompressed", 2)}, "ratio"),
        ({"compress": CompressConfig("attention_matching", 1)}, "compressor"),
        ({"chunk": ChunkConfig(32, 16, 4)}, "chunk"),
        ({"store_config": StoreConfig("int8")}, "dtype"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_store_made_otherwise_is_refused_by_field(changes, field, filled_store, opened):
    with pytest.raises(StoreMismatch, match=f"^{field} of the store"):
        opened(filled_store, **changes)


def test_another_decoder_is_refused_by_field(filled_store, opened, tmp_path):
    other = save_tiny_decoder(tmp_path / "other", seed=1)
    with pytest.raises(StoreMismatch, match=r"^decoder_fingerprint of the store"):
        opened(filled_store, decoder=str(other))
    assert not (tmp_path / "none").exists()


def test_there_must_be_a_store_to_open_and_a_decoder_to_make_one(tmp_path, opened):
    with pytest.raises(StoreNotFound):
        opened(tmp_path / "none", create=False)
    with pytest.raises(StoreNotFound):
        Engine.open(tmp_path / "none", decoder=str(tmp_path / "no decoder"), create=False)
    with pytest.raises(ModelNotFound):
        opened(tmp_path / "none", decoder=str(tmp_path))
    assert not (tmp_path / "none").exists()


def test_settings_that_do_not_fit_the_decoder_are_refused_before_a_store_is_made(tmp_path, opened):
    with pytest.raises(ConfigError, match="segment_tokens must be at most"):
        opened(tmp_path / "none", chunk=ChunkConfig())  # 1536 tokens, and the tiny window is 1024
    with pytest.raises(ConfigError, match="compressor"):
        opened(tmp_path / "none", compress=CompressConfig("zip"))
    with pytest.raises(ConfigError, match="uncompressed"):
        opened(tmp_path / "none", compress=CompressConfig("uncompressed", 1, {"level": 9}))
    assert not (tmp_path / "none").exists()


# -- ask -------------------------------------------------------------------------------------------------------------


def test_ask_answers_from_the_right_segments_with_a_full_ledger(engine, decoder):
    answer = engine.ask("Where stands crane number 3?", top_k=2, generate=SHORT)
    assert answer.text == decoder.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    assert {hit.doc_id for hit in answer.hits} == {"cranes.md"}
    assert answer.warnings == ()
    best = answer.hits[0]
    assert best.quote(best.windows[0]) in CRANES.text
    usage = answer.usage
    assert usage.prompt_tokens == len(decoder.template.question_ids("Where stands crane number 3?"))
    assert usage.template_tokens == decoder.template_tokens
    assert usage.prompt_slots == usage.source_tokens == sum(hit.source_tokens for hit in answer.hits)
    assert 0 < usage.source_tokens_tiktoken < usage.source_tokens  # bytes and pairs against words
    assert 1 <= usage.completion_tokens <= 8
    assert 0 < usage.retrieve_s < usage.ttft_s
    assert 0 < usage.load_s < usage.ttft_s
    assert usage.peak_memory > 10_000_000


def test_the_memory_is_read_as_the_text_would_be(engine, decoder):
    """One uncompressed segment is what the text in the prompt is, so the answer is the same."""
    hit = engine.retrieve("Where stands crane number 3?", top_k=1)[0]
    asked = engine.ask("Where stands crane number 3?", hits=[hit], generate=SHORT)
    (read,) = decoder.generate([Prompt("Where stands crane number 3?", context=hit.text)], SHORT)
    assert asked.text == read.text


def test_parallel_segments_have_no_order(engine, decoder):
    hits = engine.store.chunks("pumps.md")
    segments = [engine.store.load_segment(hit.segment_id) for hit in hits]
    logits = []
    for order in (range(len(hits)), reversed(range(len(hits)))):
        shuffled = [segments[number] for number in order]
        prefix = assemble(shuffled, room=Room(decoder.template_tokens, 50, 1024)).prefix
        logits.append(first_logits(decoder, prefix))
    assert torch.allclose(*logits, atol=1e-4)
    single = assemble(segments[:1], room=Room(decoder.template_tokens, 50, 1024)).prefix
    assert not torch.allclose(logits[0], first_logits(decoder, single), atol=1e-2)  # the segments do matter


def first_logits(decoder: LocalDecoder, prefix: Prefix) -> torch.Tensor:
    ids = decoder.template.question_ids("Where?")
    with torch.inference_mode():
        cache = decoder.start_cache(1, len(ids), None)
        memory = decoder.memory([prefix])
        hidden = decoder.step([ids], prefix.start - cache.length, cache, memory, None)
        return decoder.runner.logits(hidden[0, -1])


def test_whole_document_filters_neighbours_and_given_hits(engine):
    chunks = engine.store.chunks("pumps.md")
    whole = engine.ask("Sum it up.", whole_document="pumps.md", generate=SHORT)
    assert [hit.ordinal for hit in whole.hits] == list(range(len(chunks)))
    filtered = engine.ask("Where stands crane number 3?", filters={"year": 2023}, generate=SHORT)
    assert {hit.doc_id for hit in filtered.hits} == {"pumps.md"}
    either = engine.ask("Where stands crane number 3?", filters={"year": (2023, 2024)}, top_k=1, generate=SHORT)
    assert {hit.doc_id for hit in either.hits} == {"cranes.md"}
    around = engine.ask("Where stands crane number 5?", top_k=1, neighbours=1, generate=SHORT)
    assert len(around.hits) > 1
    assert [hit.score == 0.0 for hit in around.hits] == [False] + [True] * (len(around.hits) - 1)
    given = engine.ask("Where?", hits=[chunks[1], chunks[0], chunks[1]], generate=SHORT)
    assert given.hits == (chunks[1], chunks[0])  # a segment counts once
    with pytest.raises(NotInStore):
        engine.ask("Where?", whole_document="nothing")


def test_tenants_do_not_see_each_other(engine):
    engine.ingest([Document("secret", story("vault"), tenant="acme")])
    assert all(hit.tenant == "" for hit in engine.retrieve("Where stands vault number 3?", top_k=20))
    own = engine.retrieve("Where stands vault number 3?", tenant="acme")
    assert {hit.doc_id for hit in own} == {"secret"}
    assert engine.ask("Where?", hits=own, tenant="acme", generate=SHORT).hits == tuple(own)
    with pytest.raises(ConfigError, match="'acme'"):
        engine.ask("Where?", hits=own)
    with pytest.raises(NotInStore):
        engine.ask("Where?", whole_document="secret")


def test_a_whole_document_is_read_with_what_search_thinks_of_its_segments(engine):
    answer = engine.ask("Where does the pump number 3 stand?", whole_document="pumps.md", generate=SHORT)
    plain = engine.store.chunks("pumps.md")
    assert [hit.segment_id for hit in answer.hits] == [hit.segment_id for hit in plain]
    found = engine.retrieve("Where does the pump number 3 stand?", filters={"doc_id": "pumps.md"}, top_k=1)
    best = max(answer.hits, key=lambda hit: hit.score)
    assert (best.segment_id, best.score, best.windows) == (found[0].segment_id, found[0].score, found[0].windows)
    assert len({hit.score for hit in answer.hits}) > 1


def test_what_was_retrieved_is_read_with_what_search_thinks_of_it(engine, monkeypatch):
    placed = []
    monkeypatch.setattr(
        context, "assemble", lambda *given, **more: placed.append(assemble(*given, **more)) or placed[-1]
    )
    question = "Where does the pump number 3 stand?"
    hits = engine.retrieve(question, top_k=3, neighbours=1)
    answer = engine.ask(question, top_k=3, neighbours=1, generate=SHORT)
    assert answer.hits == tuple(hits) and {hit.score for hit in hits} > {0.0}, "neighbours were not found"
    worst = min(hit.score for hit in hits if hit.score)
    told = [PrefixConfig.relevance * ((hit.score or worst) - hits[0].score) for hit in hits]
    assert placed[-1].prefix.prior == pytest.approx(tuple(told)) and min(told) < 0
    engine.ask(question, top_k=3, generate=SHORT, prefix=PrefixConfig(relevance=0))
    assert set(placed[-1].prefix.prior) == {0.0}


def test_nothing_found_is_said(empty):
    answer = empty.ask("Where?", generate=SHORT)
    assert answer.hits == ()
    assert "no segment matched" in answer.warnings[0]
    assert (answer.usage.prompt_slots, answer.usage.source_tokens) == (0, 0)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_segment_is_left_out_and_named(engine, damage):
    hits = engine.store.chunks("pumps.md")
    for hit in hits[:-1]:
        file = segment_file(engine, hit.segment_id)
        data = file.read_bytes()
        file.write_bytes(data[:-9] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    answer = engine.ask("Sum it up.", whole_document="pumps.md", generate=SHORT)
    assert [hit.segment_id for hit in answer.hits] == [hits[-1].segment_id]
    assert len(answer.warnings) == len(hits) - 1
    assert "segment 0 of 'pumps.md' was left out" in answer.warnings[0]
    segment_file(engine, hits[-1].segment_id).unlink()
    with pytest.raises(SegmentUnavailable, match=f"none of the {len(hits)} segments"):
        engine.ask("Sum it up.", whole_document="pumps.md", generate=SHORT)
    assert engine.ask("Where stands crane number 3?", top_k=1, generate=SHORT).hits  # the others go on


def test_a_prompt_over_the_window_is_refused_with_the_numbers(engine):
    with pytest.raises(PromptTooLong, match="window of 1024") as caught:
        engine.ask("why " * 1200)
    assert "question and answer" in str(caught.value)
    with pytest.raises(PromptTooLong, match="window of 1024"):
        engine.stream("Where?", generate=GenerateConfig(max_new_tokens=1024))


def test_the_budget_and_the_placement_of_a_question(engine):
    wide = engine.ask("Where?", whole_document="pumps.md", generate=SHORT)
    slots = wide.usage.prompt_slots
    narrow = engine.ask("Where?", whole_document="pumps.md", generate=SHORT, prefix=PrefixConfig(max_slots=slots - 1))
    assert narrow.usage.prompt_slots < slots
    assert narrow.hits == wide.hits[:-1]
    assert f"max_slots is {slots - 1}: the 1 worst" in narrow.warnings[0]
    engine.prefix = PrefixConfig("sequence")
    assert engine.ask("Where?", whole_document="pumps.md", generate=SHORT).hits == wide.hits


def test_a_question_must_be_one_and_an_adapter_loaded(engine):
    with pytest.raises(ConfigError, match="must not be empty"):
        engine.ask("  ")
    with pytest.raises(AdapterError, match="'poems'"):
        engine.stream("Where?", adapter="poems")


# -- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_joins_to_the_answer(engine):
    whole = engine.ask("Where stands crane number 3?", generate=SHORT)
    stream = engine.stream("Where stands crane number 3?", generate=SHORT)
    assert stream.hits == whole.hits
    with pytest.raises(LLoCOError, match="read to the end"):
        _ = stream.answer
    pieces = list(stream)
    assert "".join(pieces) == stream.answer.text == whole.text
    assert stream.answer.token_ids == whole.token_ids
    assert stream.answer is stream.answer
    stream.close()


def test_a_stream_that_is_left_frees_the_decoder(engine):
    with engine.stream("Where?", generate=GenerateConfig(max_new_tokens=200)) as stream:
        next(stream)
    assert in_thread(lambda: engine.ask("Where?", generate=SHORT)).text


def in_thread(work):
    done = []
    thread = threading.Thread(target=lambda: done.append(work()), daemon=True)
    thread.start()
    thread.join(10)
    assert done, "the decoder was not free"
    return done[0]


async def test_the_async_twins_do_the_same(engine, empty):
    question = "Where stands crane number 3?"
    assert (await engine.aask(question, generate=SHORT)).text == engine.ask(question, generate=SHORT).text
    assert await engine.aretrieve(question) == engine.retrieve(question)
    stream = engine.astream(question, generate=SHORT)
    with pytest.raises(LLoCOError, match="read to the end"):
        _ = stream.answer
    assert "".join([piece async for piece in stream]) == stream.answer.text
    assert [piece async for piece in stream] == []
    assert set(await engine.acompare(question, generate=SHORT)) == {"lloco", "in_context", "text_retrieval"}
    assert (await empty.aingest(BOTH)).added == ("pumps.md", "cranes.md")
    await empty.adelete("pumps.md")
    assert [info.doc_id for info in empty.documents()] == ["cranes.md"]
    with pytest.raises(PromptTooLong):
        await engine.aask("why " * 1200)


async def test_async_does_not_block_the_loop(engine, monkeypatch):
    def slow(self, *_, **__):
        time.sleep(0.3)
        raise ConfigError("slow")

    monkeypatch.setattr(ContextBuilder, "search", slow)
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    with pytest.raises(ConfigError, match="slow"):
        await engine.aask("Where?")
    with pytest.raises(ConfigError, match="slow"):
        async for _ in engine.astream("Where?"):
            pass
    ticking.cancel()
    assert ticks > 20


@pytest.mark.parametrize("leave", ["close", "cancel", "drop"])
async def test_a_consumer_that_leaves_stops_the_producer(engine, decoder, monkeypatch, leave):
    steps = []
    step = type(decoder).step

    def slow(self, *arguments, **named):
        steps.append(1)
        time.sleep(0.01)
        return step(self, *arguments, **named)

    monkeypatch.setattr(type(decoder), "step", slow)
    long = GenerateConfig(max_new_tokens=400, temperature=1.0, seed=1)
    monkeypatch.setattr(decoder, "eos", set())
    stream = engine.astream("Where?", generate=long)
    if leave == "cancel":
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.aask("Where?", generate=long), 0.3)
    else:
        await anext(stream)
    if leave == "close":
        await stream.aclose()
        assert [piece async for piece in stream] == []
    del stream
    gc.collect()
    for _ in range(100):
        if not [thread for thread in threading.enumerate() if thread.name == "lloco-answer"]:
            break
        await asyncio.sleep(0.02)
    else:
        pytest.fail("the producer goes on")
    assert 0 < len(steps) < 200


async def test_a_cancelled_ingest_stops_and_can_go_on(empty, monkeypatch):
    began = threading.Event()
    make = Uncompressed.make

    def slow(self, *arguments):
        began.set()
        time.sleep(0.05)
        return make(self, *arguments)

    monkeypatch.setattr(Uncompressed, "make", slow)
    task = asyncio.create_task(empty.aingest(BOTH))
    await asyncio.to_thread(began.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await empty.aingest(BOTH)).added[-1] == "cranes.md"  # waits for the lock, which is let go
    assert empty.verify() == []


# -- what `ask` does, in parts --------------------------------------------------------------------------------------


def test_what_is_prepared_is_what_ask_gives_to_the_decoder(engine, decoder):
    question = "Where stands crane number 3?"
    prepared = engine.prepare(question, top_k=2, generate=SHORT)
    answer = engine.ask(question, top_k=2, generate=SHORT)
    assert prepared.memory.hits == answer.hits and len(answer.hits) == 2
    assert answer.token_ids == tuple(decoder.generate([prepared.prompt], SHORT, prepared.adapter)[0].token_ids)
    assert prepared.seconds >= prepared.retrieve_s > 0


def test_scores_are_those_of_the_tokens_that_ask_would_give(engine, decoder):
    """The slow, obvious way: one pass over prompt and answer, the logits of each token of the answer."""
    question, options = "Where stands crane number 3?", {"top_k": 2, "generate": SHORT}
    (loss, tokens), other = engine.score(question, ["hall 3", "x"], **options)
    prompt = engine.prepare(question, **options).prompt
    ids, gold = decoder.prompt_ids(prompt), [*decoder.tokenizer("hall 3")["input_ids"], decoder.end]
    with torch.inference_mode():
        cache = decoder.start_cache(1, len(ids) + len(gold), None, prefix=prompt.prefix)
        position = decoder.position(prompt) - cache.length
        hidden = decoder.step([ids + gold], position, cache, decoder.memory([prompt.prefix]), None)
        logits = decoder.runner.logits(hidden[0, len(ids) - 1 : -1]).log_softmax(-1)
    assert tokens == len(gold) and loss == pytest.approx(
        -sum(float(logits[n, t]) for n, t in enumerate(gold)), rel=1e-4
    )
    assert other[1] == 2 and other[0] != loss


def test_several_documents_are_read_whole_together(engine):
    names = ["cranes.md", "pumps.md"]
    prepared = engine.prepare("Where stands crane number 3?", whole_document=names, generate=SHORT)
    chunks = [hit for name in names for hit in engine.store.chunks(name)]
    assert [hit.segment_id for hit in prepared.memory.hits] == [hit.segment_id for hit in chunks]
    best = max(prepared.memory.hits, key=lambda hit: hit.score)
    assert best.doc_id == "cranes.md" and max(prepared.memory.prefix.prior) == 0.0
    with pytest.raises(NotInStore):
        engine.ask("Where?", whole_document=[*names, "mills.md"])


def test_a_compressor_that_is_made_already_need_not_be_registered(tmp_path, opened):
    class Half(Uncompressed):
        name = "half"

        def make(self, decoder, token_ids, ratios):
            return super().make(decoder, token_ids[::2], ratios)

    with opened(tmp_path / "store", compressor=Half()) as made:
        made.ingest([CRANES])
        assert made.manifest.compressor == "half"
        assert made.documents()[0].slots < 0.6 * made.documents()[0].source_tokens
    with opened(tmp_path / "store", compressor=Half()) as again:
        assert again.ingest([CRANES]).unchanged == ("cranes.md",)
    with pytest.raises(StoreMismatch, match="half"):
        opened(tmp_path / "store")


# -- compare ---------------------------------------------------------------------------------------------------------


def test_compare_reads_the_same_text_three_ways(engine, decoder):
    answers = engine.compare("Where stands crane number 3?", top_k=1, generate=SHORT)
    ours, full, text = answers["lloco"], answers["in_context"], answers["text_retrieval"]
    asked = len(decoder.template.question_ids("Where stands crane number 3?"))
    tokens = len(decoder.tokenizer(CRANES.text)["input_ids"])
    assert ours.usage.prompt_tokens == asked
    assert full.usage.prompt_tokens == asked + tokens
    assert asked < text.usage.prompt_tokens <= asked + ours.hits[0].source_tokens
    assert text.hits == ours.hits
    assert text.usage.retrieve_s == ours.usage.retrieve_s
    assert full.warnings == text.warnings == ()
    assert full.usage.prompt_slots == text.usage.prompt_slots == 0


def test_compare_gives_the_baselines_what_lloco_has(engine, decoder, tmp_path, monkeypatch):
    asked = []
    stream = LocalDecoder.stream
    monkeypatch.setattr(
        LocalDecoder, "stream", lambda self, prompt, *rest: asked.append((prompt, *rest)) or stream(self, prompt, *rest)
    )
    monkeypatch.setattr(LocalDecoder, "adapters", ("law",))
    monkeypatch.setattr(decoder, "_use", lambda adapter: None)  # answers as the base does
    hinted = GenerateConfig(max_new_tokens=8, hints=("spelling",))
    answers = engine.compare("Where stands crane number 3?", top_k=2, generate=hinted, adapter="law")
    assert [(answer.adapter, answer.hints) for answer in answers.values()] == [("law", ("spelling",))] * 3
    assert [(config, adapter) for _, config, adapter in asked] == [(hinted, "law")] * 3
    plain = engine.compare("Where stands crane number 3?", top_k=2, generate=SHORT)
    assert [(answer.adapter, answer.hints) for answer in plain.values()] == [("none", ())] * 3


def test_text_over_the_window_is_cut_and_said(engine, decoder):
    from lloco_engine.baselines import in_context, text_retrieval, whole

    ids = decoder.template.text_ids("0123456789")
    cut = whole(decoder, ["0123456789"], 5)
    assert (cut.ids, cut.left_out) == (ids[:3] + ids[-2:], len(ids) - 5)
    assert whole(decoder, ["0123456789"], len(ids)).ids == ids
    assert whole(decoder, ["0123456789"], 0).ids == []
    answer = in_context(decoder, [PUMPS.text * 9], "Where?", SHORT)
    assert answer.usage.prompt_tokens + answer.usage.template_tokens + 8 == 1024
    assert "of the middle were left out" in answer.warnings[0]
    many = [hit for document in ("pumps.md", "cranes.md") for hit in engine.store.chunks(document)] * 4
    assert "of the end were left out" in text_retrieval(decoder, many, "Where?", SHORT).warnings[0]
    with pytest.raises(PromptTooLong):
        in_context(decoder, ["text"], "why " * 1200, SHORT)


# -- the embedded models ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_embedded_decoder_answers_from_a_compressed_document(tmp_path, embedded_decoder):
    text = "The lighthouse at Pell was built in 1871. Its keeper is Agnes Thorne, who has one green parrot. " + story(
        "x", 4
    )
    with Engine.open(tmp_path / "store", decoder=embedded_decoder, compress=CompressConfig(ratio=2)) as engine:
        assert engine.ingest([Document("pell", text)]).added == ("pell",)
        answer = engine.ask("Who is the keeper of the lighthouse at Pell?", generate=GenerateConfig(max_new_tokens=24))
        assert "Agnes Thorne" in answer.text
        assert answer.usage.prompt_slots < answer.usage.source_tokens


# -- what integrations stand on --------------------------------------------------------------------------------------


def test_a_text_is_found_as_a_chunk_or_as_a_whole_document(engine):
    chunks = engine.store.chunks("pumps.md")
    assert engine.find_text(f" {chunks[1].text}\n") == [chunks[1]]
    assert engine.find_text(PUMPS.text) == chunks and engine.find_text(PUMPS.text, "other") == []
    assert engine.find_text("nothing of that kind") == []
    assert engine.find_segment(chunks[0].segment_id) == [chunks[0]]
    engine.delete("pumps.md")
    assert engine.find_text(PUMPS.text) == engine.find_segment(chunks[0].segment_id) == []


def test_unusable_segments_are_told_beforehand(engine):
    chunks = engine.store.chunks("pumps.md")
    assert engine.unusable(chunks) == []
    segment_file(engine, chunks[1].segment_id).unlink()
    assert engine.unusable(chunks) == [chunks[1]]


def test_one_run_may_hold_the_same_id_for_two_tenants(empty):
    report = empty.ingest([Document("a", story("lamp"), tenant=tenant) for tenant in ("red", "blue", "red")])
    assert report.added == ("a", "a") and len(report.failed) == 1


def test_raw_text_and_segments_are_read_together(engine, decoder):
    hits = engine.store.chunks("pumps.md")[:1]
    alone = engine.ask("Where?", hits=hits, generate=SHORT)
    both = engine.ask("Where?", hits=hits, context="The kettle is red.", generate=SHORT)
    extra = len(decoder.tokenizer("The kettle is red.", add_special_tokens=False)["input_ids"])
    assert both.usage.prompt_tokens == alone.usage.prompt_tokens + extra
    assert both.usage.prompt_slots == alone.usage.prompt_slots


def test_a_conversation_is_what_the_chat_template_makes_of_it(engine, decoder):
    """With nothing to read and no instruction of the engine's own, a prompt is the plain chat."""
    said = [("user", "Hello."), ("assistant", "Good day."), ("user", "Where is it?")]
    ids = decoder.tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in said], add_generation_prompt=True, tokenize=True
    )["input_ids"]
    history = [Turn(role, text) for role, text in said[:-1]]
    prompt = Prompt("Where is it?", history=tuple(history), verbatim=True)
    assert decoder.template.prefix_ids + decoder.prompt_ids(prompt) == ids
    answer = engine.ask("Where is it?", hits=(), history=history, verbatim=True, generate=SHORT)
    assert answer.usage.prompt_slots == 0 and answer.warnings == ()


def test_segments_stand_before_the_whole_conversation(engine, decoder):
    hits = engine.store.chunks("pumps.md")[:1]
    history = (Turn("user", "Hi"), Turn("user", "there"), Turn("assistant", "Yes?"))
    own = decoder.tokenizer.decode(decoder.prompt_ids(Prompt("Where?", context="Note.", history=history)))
    assert own == "Note.\n\nAnswer the question from the text above.\nQuestion: Hi\n\nthere<|im_end|>\n" + (
        "<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert engine.ask("Where?", hits=hits, history=history, generate=SHORT).usage.prompt_slots == hits[0].slots
