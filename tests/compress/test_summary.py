"""Summary embeddings everywhere: compressor, store, prefix, decoder, engine, command line."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace

import pytest
import torch
from summary_cases import save_tiny_autocompressor
from typer.testing import CliRunner

from lloco_engine import ChunkConfig, CompressConfig, Document, Engine, GenerateConfig, PrefixConfig
from lloco_engine.compress import registry
from lloco_engine.compress.autocompressor import AutoCompressor
from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.decoder.template import NAMES, Template
from lloco_engine.errors import (
    ConfigError,
    PromptTooLong,
    SegmentUnavailable,
    StoreError,
    StoreMismatch,
    UnsupportedModel,
)
from lloco_engine.kinds.compact_kv import CompactKVFormat
from lloco_engine.kinds.summary import SummaryFormat, SummarySegment
from lloco_engine.models import quiet
from lloco_engine.prefix import Room, assemble
from lloco_engine.store import Store, segments
from lloco_engine.testing import HashingEmbedder, save_tiny_decoder, tiny_tokenizer
from lloco_engine.tokenizing import encode
from lloco_engine.types import Prefix, Segment

K = 4
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
HALF = {"rtol": 2e-3, "atol": 2e-3}  # vectors that were rounded to float16 in the store
SMALL = {"llama": {"initializer_range": 0.1}, "opt": {"init_std": 0.1}}
PARTS = [f"Part {n}. " + sentence * 3 for n, sentence in enumerate(
    ("The mill has three wheels. ", "Its keeper is Ada Brandt. ", "She came from the north. ", "She never left. ")
)]  # fmt: skip
TEXT = "\n\n".join(PARTS)
SHORT = "The mill has three wheels."  # one segment
FIVE = GenerateConfig(max_new_tokens=5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints in the published layout by family and whether they accumulate."""
    return {
        (family, accumulate): str(
            save_tiny_autocompressor(
                tmp_path_factory.mktemp(family), family, summary_length=K, accumulate=accumulate, **SMALL[family]
            )
        )
        for family in ("llama", "opt")
        for accumulate in (True, False)
    }


def open_engine(path, folder, *, settings=None, compressor="autocompressor", tokens=64, **more) -> Engine:
    return Engine.open(
        path,
        decoder=folder,
        embedder=HashingEmbedder(),
        compress=CompressConfig(compressor, settings=settings or {}),
        chunk=ChunkConfig(tokens, 16, 4),
        device="cpu",
        **more,
    )


@pytest.fixture(params=[("llama", True), ("llama", False), ("opt", True)], ids=str)
def case(request, folders, tmp_path):
    """An engine with one document of several segments, its checkpoint, and whether that accumulates."""
    folder = folders[request.param]
    with open_engine(tmp_path / "store", folder) as engine:
        engine.ingest([Document("mill", TEXT)])
        yield engine, AutoCompressor.from_pretrained(folder, device="cpu"), request.param[1]


def chunk_ids(engine: Engine, doc_id: str = "mill") -> list[list[int]]:
    return [encode(engine.decoder.tokenizer, hit.text) for hit in engine.store.chunks(doc_id)]


# -- what is stored, and what is read -------------------------------------------------------------------------------


def test_a_document_is_stored_as_the_published_model_compresses_it(case):
    engine, model, accumulate = case
    pieces = chunk_ids(engine)
    assert len(pieces) >= 3
    ids, lengths = [token for piece in pieces for token in piece], [len(piece) for piece in pieces]
    stored = [engine.store.load_segment(hit.segment_id) for hit in engine.store.chunks("mill")]
    assert all(isinstance(segment, SummarySegment) and segment.slots == K for segment in stored)
    vectors = torch.cat([segment.vectors for segment in stored]).float()
    expected = model.compress_token_ids(ids, lengths)
    torch.testing.assert_close(vectors if accumulate else vectors[-K:], expected, **HALF)
    assert engine.manifest.memory == "summary" and engine.manifest.summary_dim == stored[0].vectors.shape[1]


def test_a_question_is_answered_as_the_published_model_answers_it(case):
    engine, model, _ = case
    answer = engine.ask("Who keeps the mill?", whole_document="mill", generate=FIVE)
    stored = [engine.store.load_segment(hit.segment_id).vectors for hit in engine.store.chunks("mill")]
    vectors = torch.cat(stored).float()
    prompt = Template.suited(engine.decoder.tokenizer, engine.decoder.runner.model.config).question_ids(
        "Who keeps the mill?"
    )
    expected = model.generate(prompt, vectors, 5)
    assert list(answer.token_ids) == [token for token in expected if token not in engine.decoder.eos]
    assert answer.usage.prompt_slots == len(vectors) and answer.usage.template_tokens == 0
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.source_tokens == sum(map(len, chunk_ids(engine)))


def test_retrieving_a_segment_brings_what_it_is_read_after(case):
    engine, _, accumulate = case
    last = engine.store.chunks("mill")[-1]
    earlier = engine.store.earlier(last)
    assert [hit.ordinal for hit in earlier] == list(range(last.ordinal)) and all(hit.score == 0 for hit in earlier)
    answer = engine.ask("Where is she?", hits=[last], generate=FIVE)
    read = {hit.ordinal for hit in answer.hits}
    assert read == (set(range(last.ordinal + 1)) if accumulate else {last.ordinal})
    assert answer.hits[0].segment_id == last.segment_id  # what was found comes before what came with it
    assert answer.usage.prompt_slots == K * len(read)
    if accumulate:
        whole = engine.ask("Where is she?", whole_document="mill", generate=FIVE)
        assert whole.token_ids == answer.token_ids


def test_independent_segments_are_made_and_read_alone(folders, tmp_path):
    folder = folders["llama", True]
    with open_engine(tmp_path / "s", folder, settings={"chain": 1}) as engine:
        engine.ingest([Document("mill", TEXT)])
        model = AutoCompressor.from_pretrained(folder, device="cpu")
        for hit, ids in zip(engine.store.chunks("mill"), chunk_ids(engine), strict=True):
            assert engine.store.earlier(hit) == []
            vectors = engine.store.load_segment(hit.segment_id).vectors.float()
            torch.testing.assert_close(vectors, model.compress_token_ids(ids), **HALF)
        last = engine.store.chunks("mill")[-1]
        assert engine.ask("Where?", hits=[last], generate=FIVE).usage.prompt_slots == K
    with Engine.open(tmp_path / "s", embedder=HashingEmbedder(), device="cpu") as again:  # as it was made
        assert again.manifest.compressor_settings == {"chain": 1}


def test_a_chain_begins_anew_at_its_limit_and_where_the_window_is_full(folders):
    decoder = LocalDecoder.load(folders["llama", True], device="cpu")  # a window of 1024
    starts = registry.get("autocompressor", chain=2).chain_starts(decoder, [10] * 5)
    assert starts == [0, 0, 2, 2, 4]
    starts = registry.get("autocompressor").chain_starts(decoder, [1012] * 3 + [10] * 2)
    assert starts == [0, 0, 0, 0, 0]  # 3 summaries of 4 vectors, 1012 tokens and 4 summary tokens would be 1028
    starts = registry.get("autocompressor").chain_starts(decoder, [1012] * 5)
    assert starts == [0, 0, 0, 3, 3]
    with pytest.raises(ConfigError, match="chain must be a number"):
        registry.get("autocompressor", chain=-1)


def test_segment_ids_stand_for_the_whole_chain(folders, tmp_path):
    with open_engine(tmp_path / "s", folders["llama", True]) as engine:
        changed = TEXT.replace("Ada", "Eva")
        engine.ingest([Document("a", TEXT), Document("b", TEXT), Document("c", changed)])
        a, b, c = ([hit.segment_id for hit in engine.store.chunks(name)] for name in "abc")
        assert a == b and len(set(a)) == len(a)
        first = next(
            n for n, (x, y) in enumerate(zip(chunk_ids(engine, "a"), chunk_ids(engine, "c"), strict=True)) if x != y
        )
        assert a[:first] == c[:first] and not set(a[first:]) & set(c[first:])
        assert engine.stats()["segments"] == len(set(a) | set(c))


def test_deleting_and_replacing_keep_chains_whole(folders, tmp_path):
    with open_engine(tmp_path / "s", folders["llama", True]) as engine:
        engine.ingest([Document("a", TEXT), Document("b", TEXT + "\n\nA coda. " * 9)])
        shared = {hit.segment_id for hit in engine.store.chunks("a")} & {
            hit.segment_id for hit in engine.store.chunks("b")
        }
        engine.delete("a")
        assert _chains(engine) and engine.verify() == []
        engine.ingest([Document("b", "An overture. " * 9 + "\n\n" + TEXT)])  # every segment has another past now
        assert _chains(engine) and engine.verify() == []
        assert not shared & {hit.segment_id for hit in engine.store.chunks("b")}
        last = engine.store.chunks("b")[-1]
        assert len(engine.ask("Where?", hits=[last], generate=FIVE).hits) == last.ordinal + 1
        engine.delete("b")
        assert engine.stats()["segments"] == 0 and engine.verify() == []


def _chains(engine: Engine) -> bool:
    """Whether every segment's predecessor is in the catalogue, as its foreign key demands."""
    connection = sqlite3.connect(engine.store.path / "catalogue.sqlite")
    try:
        rows = connection.execute("SELECT segment_id, previous FROM segments").fetchall()
        faults = connection.execute("PRAGMA foreign_key_check").fetchall()
    finally:
        connection.close()
    known = {segment for segment, _ in rows}
    return not faults and any(previous for _, previous in rows) and all(p is None or p in known for _, p in rows)


def test_a_damaged_segment_takes_those_after_it_out_and_is_made_again(case):
    engine, _, accumulate = case
    hits = engine.store.chunks("mill")
    path = segment_path(engine, hits[1])
    whole = engine.store.load_segment(hits[1].segment_id).vectors.clone()
    path.write_bytes(path.read_bytes()[:-3])
    gone = {hit.ordinal for hit in engine.unusable(hits)}
    assert gone == (set(range(1, len(hits))) if accumulate else {1})
    answer = engine.ask("Who?", whole_document="mill", generate=FIVE)
    assert {hit.ordinal for hit in answer.hits} == set(range(len(hits))) - gone
    assert len(answer.warnings) == len(gone)
    if accumulate:
        with pytest.raises(SegmentUnavailable, match="read after segment 1"):
            engine.ask("Who?", hits=[hits[-1]], generate=FIVE)
    assert engine.ingest([Document("mill", TEXT)]).repaired == ("mill",)
    assert torch.equal(engine.store.load_segment(hits[1].segment_id).vectors, whole)
    assert engine.unusable(hits) == []


def segment_path(engine: Engine, hit):
    return engine.store.path / "segments" / hit.segment_id[:2] / f"{hit.segment_id}.safetensors"


def test_an_ingest_that_was_cut_off_goes_on_to_the_same_segments(folders, tmp_path):
    class Stopped(Exception):
        pass

    def stop(progress):
        if progress.done_segments == 2:
            raise Stopped

    with open_engine(tmp_path / "one", folders["llama", True]) as one:
        with pytest.raises(Stopped):
            one.ingest([Document("mill", TEXT)], progress=stop)
        report = one.ingest([Document("mill", TEXT)])
        with open_engine(tmp_path / "other", folders["llama", True]) as other:
            whole = other.ingest([Document("mill", TEXT)])
            assert 0 < report.segments == whole.segments - 2
            for hit in other.store.chunks("mill"):
                mine, theirs = (engine.store.load_segment(hit.segment_id).vectors for engine in (one, other))
                assert torch.equal(mine, theirs)


def test_few_bits_are_close(folders, tmp_path):
    from lloco_engine import StoreConfig

    made = {}
    for dtype in ("float16", "int8", "int4"):
        with open_engine(tmp_path / dtype, folders["llama", True], store_config=StoreConfig(dtype=dtype)) as engine:
            engine.ingest([Document("mill", SHORT)])
            (hit,) = engine.store.chunks("mill")
            made[dtype] = engine.store.load_segment(hit.segment_id, verify=True).vectors.float()
    spread = made["float16"].abs().amax(0, keepdim=True)
    assert ((made["int8"] - made["float16"]).abs() <= spread / 127 + 1e-3).all()
    assert ((made["int4"] - made["float16"]).abs() <= spread / 15 + 2e-3).all()
    assert not torch.equal(made["int4"], made["int8"])


# -- one kind refuses the other -------------------------------------------------------------------------------------


def test_a_store_of_one_kind_refuses_the_other_by_name(folders, tmp_path):
    folder = folders["llama", True]
    with open_engine(tmp_path / "summary", folder) as engine:
        engine.ingest([Document("mill", PARTS[0])])
        kv = Segment(torch.zeros(4, 8), torch.zeros(4, 8), torch.zeros(4), torch.ones(2, 2, dtype=torch.int64), 4)
        with (
            engine.store.writer() as writer,
            pytest.raises(StoreError, match="summary embeddings, and this one is compact"),
        ):
            writer.save_segment("0" * 32, kv)
    with pytest.raises(StoreMismatch, match=r"memory of the store .* is 'summary', not 'compact_kv'"):
        open_engine(tmp_path / "summary", folder, compressor="attention_matching")
    with open_engine(tmp_path / "kv", folder, compressor="uncompressed") as engine:
        other = SummarySegment(torch.zeros(4, 32), 9)
        with engine.store.writer() as writer, pytest.raises(StoreError, match="compact KV, and this one is summary"):
            writer.save_segment("0" * 32, other)
    with pytest.raises(StoreMismatch, match=r"memory of the store .* is 'compact_kv', not 'summary'"):
        open_engine(tmp_path / "kv", folder)
    plain = str(save_tiny_decoder(tmp_path / "plain"))
    with pytest.raises(StoreMismatch, match=r"memory of the store .* is 'compact_kv', not 'summary'"):
        open_engine(tmp_path / "kv", plain)  # although this decoder has no summary tokens either
    with pytest.raises(ConfigError, match="summary_length"):
        open_engine(tmp_path / "new", plain)
    assert not (tmp_path / "new" / "manifest.json").exists()


def test_a_file_of_one_kind_is_not_read_as_the_other(tmp_path):
    summary, kv = SummaryFormat(32, "float16"), CompactKVFormat(2, 2, 8, "float16")
    data, _ = segments.encode(SummarySegment(torch.ones(K, 32), 9), "0" * 32, summary)
    (tmp_path / "one").write_bytes(data)
    assert segments.read(tmp_path / "one", "0" * 32, summary).source_tokens == 9
    with pytest.raises(SegmentUnavailable, match="compact KV"):
        segments.read(tmp_path / "one", "0" * 32, kv)
    for bad in (torch.zeros(0, 32), torch.zeros(K, 31), torch.full((K, 32), torch.inf)):
        with pytest.raises(StoreError):
            segments.encode(SummarySegment(bad, 9), "0" * 32, summary)


def test_the_ratio_is_the_models(folders, tmp_path):
    with open_engine(tmp_path / "s", folders["llama", True]) as engine:
        assert engine.manifest.ratio == 64 / K
    with pytest.raises(ConfigError, match="ratio must be left out"):
        Engine.open(
            tmp_path / "t",
            decoder=folders["llama", True],
            embedder=HashingEmbedder(),
            compress=CompressConfig("autocompressor", ratio=9),
            chunk=ChunkConfig(64, 16, 4),
        )


# -- the prefix -----------------------------------------------------------------------------------------------------


def summary(slots: int = K, source_tokens: int = 60) -> SummarySegment:
    return SummarySegment(torch.randn(slots, 32, generator=torch.Generator().manual_seed(slots)), source_tokens)


def test_summaries_are_placed_whole_chains_at_a_time():
    four = [summary() for _ in range(4)]
    room = Room(10, 20, 100)
    prefix = assemble(four, room=room).prefix
    assert (prefix.start, prefix.slots, prefix.source_tokens, prefix.offsets) == (16, 16, 240, (0,) * 4)
    assert torch.equal(prefix.embeddings, torch.cat([one.vectors for one in four])) and prefix.compact == ()
    assert assemble(four, room=replace(room, rotary=False)).prefix.start == 0
    # the first wanted one is read after the third and the fourth, the second after none
    needs = [[2, 3], []]
    assert assemble(four, PrefixConfig(max_slots=15), room=room, needs=needs).kept == (2, 3, 0)
    assert assemble(four, PrefixConfig(max_slots=16), room=room, needs=needs).kept == (2, 3, 0, 1)
    cut = assemble(four, PrefixConfig(max_slots=9), room=room, needs=[[], [2, 3]])
    assert (cut.kept, cut.dropped) == ((0,), (1,))  # what the second needs is not read without it
    with pytest.raises(ConfigError, match="has 12 slots, not 11"):
        assemble(four, PrefixConfig(max_slots=11), room=room, needs=needs)


def test_summaries_beyond_the_window_are_left_out_worst_first():
    four = [summary() for _ in range(4)]
    made = assemble(four, room=Room(10, 20, 42))
    assert (made.kept, made.dropped, made.prefix.start) == ((0, 1, 2), (3,), 12)
    with pytest.raises(PromptTooLong, match="shorter chains"):
        assemble(four, room=Room(10, 20, 41), needs=[[1, 2]])
    with pytest.raises(PromptTooLong, match="window of 25"):
        assemble(four, room=Room(10, 20, 25, rotary=False))
    kv = Segment(torch.zeros(4, 8), torch.zeros(4, 8), torch.zeros(4), torch.ones(2, 2, dtype=torch.int64), 4)
    with pytest.raises(ConfigError, match="one kind"):
        assemble([kv, four[0]], room=Room(1, 1, 99))


def test_the_engine_says_what_the_window_left_out(folders, tmp_path):
    with open_engine(tmp_path / "s", folders["llama", True], prefix=PrefixConfig(max_slots=2 * K)) as engine:
        engine.ingest([Document("a", PARTS[0]), Document("b", PARTS[1]), Document("c", PARTS[2])])
        hits = [engine.store.chunks(name)[0] for name in "abc"]
        answer = engine.ask("Who?", hits=hits, generate=FIVE)
        assert [hit.doc_id for hit in answer.hits] == ["a", "b"]
        assert "the 1 worst of 3 segments were left out" in answer.warnings[0]


# -- the decoder ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "opt"])
def decoder(request, folders):
    return LocalDecoder.load(folders[request.param, True], device="cpu")


def prefix_of(decoder: LocalDecoder, *slots: int) -> Prefix:
    return assemble([summary(count) for count in slots], room=Room(0, 0, 900, decoder.shape.rotary)).prefix


def test_a_batch_answers_and_scores_as_one_by_one(decoder):
    shared, other = prefix_of(decoder, 4, 3), prefix_of(decoder, 9)
    prompts = [
        Prompt("Who?", shared),
        Prompt("And where is she now?", None),
        Prompt("Why?", other),
        Prompt("Whose?", shared),
    ]
    together = decoder.generate(prompts, FIVE)
    losses = decoder.answer_losses(prompts, ["Ada", "North", "So", "Hers, all of it"])
    for prompt, made, loss, answer in zip(
        prompts, together, losses, ["Ada", "North", "So", "Hers, all of it"], strict=True
    ):
        generation, pieces = decoder.stream(prompt, FIVE)
        for _ in pieces:
            pass
        assert made.token_ids == generation.token_ids
        (alone,) = decoder.answer_losses([prompt], [answer])
        assert loss[1] == alone[1] and abs(loss[0] - alone[0]) < 1e-3


def test_a_chat_templates_opening_follows_the_summaries(folders):
    decoder = LocalDecoder.load(folders["llama", True], device="cpu", template="chat")
    assert decoder.template.prefix_ids
    prefix = prefix_of(decoder, 5)
    prompt = Prompt("Who?", prefix)
    ids = decoder.prompt_ids(prompt)
    assert ids == decoder.template.prefix_ids + decoder.template.question_ids("Who?")
    model = AutoCompressor.from_pretrained(folders["llama", True], device="cpu")
    expected = model.generate(ids, prefix.embeddings, 5)
    (made,) = decoder.generate([prompt], FIVE)
    assert made.token_ids == [token for token in expected if token not in decoder.eos]


def test_published_adapters_load_on_top(folders, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = folders["llama", True]
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.05, target_modules=targets, bias="none", task_type="CAUSAL_LM"
    )
    with quiet():
        tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    generator = torch.Generator().manual_seed(1)
    for name, weight in tuned.named_parameters():
        if "lora_" in name:
            weight.data.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    merged = tmp_path / "merged"
    with quiet():
        tuned.save_pretrained(tmp_path / "safe")
        tuned.save_pretrained(tmp_path / "bin", safe_serialization=False)
        tuned.merge_and_unload().save_pretrained(merged)
    tiny_tokenizer().save_pretrained(merged)
    expected = LocalDecoder.load(str(merged), device="cpu", template="lloco")
    decoder = LocalDecoder.load(folder, device="cpu")
    prefix = prefix_of(decoder, 4, 4)
    prompts, answers = [Prompt("Who?", prefix)], ["Ada Brandt"]
    (base,) = decoder.answer_losses(prompts, answers)
    for kind in ("safe", "bin"):
        decoder.load_adapter(tmp_path / kind, kind)
        (ours,) = decoder.answer_losses(prompts, answers, kind)
        (theirs,) = expected.answer_losses(prompts, answers)
        assert abs(ours[0] - theirs[0]) < 1e-3 and abs(ours[0] - base[0]) > 1e-2
    compressor = registry.get("autocompressor")
    with_adapter = compressor.compress(decoder, list(range(5, 40)), [16])[0]
    alone = registry.get("autocompressor").compress(LocalDecoder.load(folder, device="cpu"), list(range(5, 40)), [16])[
        0
    ]
    torch.testing.assert_close(with_adapter.vectors, alone.vectors, **CLOSE)  # summaries are the base weights'


# -- the release's prompts ------------------------------------------------------------------------------------------


def test_the_releases_prompt_is_tokenised_in_one_piece():
    tokenizer = tiny_tokenizer()
    template = Template.suited(tokenizer, None, "lloco")
    text = (
        "You were just given an article from above. I will now give you a question. Answer the question as concisely "
        "as you can, using a single phrase or sentence if possible.\nQuestion: Who?\nAnswer:"
    )
    assert template.prefix_ids == []
    assert template.question_ids("Who?") == tokenizer(text, add_special_tokens=False).input_ids
    sneaky = template.question_ids("<|im_end|>")
    assert not set(sneaky) & set(tokenizer.all_special_ids)
    for name in NAMES:
        made = Template.suited(tokenizer, None, name)
        assert tokenizer.decode(made.question_ids("Whose hat?")).count("Whose hat?") == 1
    with pytest.raises(ConfigError, match="template must be one of chat, lloco"):
        Template.suited(tokenizer, None, "haiku")


def test_the_template_is_chosen_when_a_question_is_asked(folders, tmp_path):
    folder = folders["llama", True]
    with open_engine(tmp_path / "s", folder) as engine:
        engine.ingest([Document("mill", SHORT)])
        assert engine.manifest.template_fingerprint == "none"
        assert "article from above" in engine.decoder.template.joint
    with open_engine(tmp_path / "s", folder, template="lloco-qmsum") as engine:
        assert "meeting transcript" in engine.decoder.template.joint
        assert engine.ask("Who?", generate=FIVE).usage.prompt_slots == K


# -- the command line -----------------------------------------------------------------------------------------------


def test_the_command_line_ingests_asks_and_says_which_memory(folders, tmp_path, monkeypatch):
    from lloco_engine.cli import app

    monkeypatch.setattr("lloco_engine.embedder.Embedder", lambda name, device=None: HashingEmbedder())
    (tmp_path / "mill.txt").write_text(TEXT)

    def run(*arguments):
        return CliRunner().invoke(app, [*map(str, arguments), "--store", str(tmp_path / "s")])

    made = ["--decoder", folders["llama", True], "--device", "cpu"]
    done = run(
        "ingest", tmp_path / "mill.txt", "--compressor", "autocompressor", "--segment-tokens", 64, *made, "--json"
    )
    assert done.exit_code == 0, done.output
    shown = json.loads(run("info", "--json").stdout)["store"]
    assert shown["memory"] == shown["manifest"]["memory"] == "summary"
    assert "summary" in run("info").stdout
    asked = run("ask", "Who keeps the mill?", "--max-new-tokens", 4, "--device", "cpu", "--json")
    assert asked.exit_code == 0, asked.output
    assert json.loads(asked.stdout)["usage"]["prompt_slots"] >= K
    compared = run("compare", "Who?", "--max-new-tokens", 2, "--template", "lloco-nqa", "--device", "cpu", "--json")
    assert set(json.loads(compared.stdout)) == {"lloco", "in_context", "text_retrieval"}
    refused = run("ask", "Who?", "--compressor", "attention_matching", "--device", "cpu")
    assert refused.exit_code == 1 and "memory of the store" in refused.stderr and "'summary'" in refused.stderr
    refused = run("ingest", tmp_path / "mill.txt", "--set", "chain=1", *made)
    assert refused.exit_code == 1 and "compressor_settings" in refused.stderr


def test_an_opt_decoders_keys_cannot_be_moved(folders, tmp_path):
    with open_engine(tmp_path / "kv", folders["opt", True], compressor="uncompressed") as engine:
        engine.ingest([Document("mill", TEXT)])
        assert engine.ask("Who?", generate=FIVE).usage.prompt_slots > 0
        with pytest.raises((ConfigError, UnsupportedModel), match="parallel"):
            engine.ask("Who?", prefix=PrefixConfig(placement="sequence"), whole_document="mill", generate=FIVE)


def test_a_store_from_before_chains_opens(tmp_path):
    from store_cases import document, make_store, set_back

    make_store(tmp_path / "s", document("old", 60)).close()
    set_back(tmp_path / "s", 2)
    with Store.open(tmp_path / "s") as store:
        hits = store.chunks("old")
        assert store.earlier(hits[-1]) == [] and store.load_segment(hits[0].segment_id).slots
        with store.writer() as writer:
            writer.delete_document("old")
        assert store.verify() == []


@pytest.mark.parametrize("key", [("llama", True), ("llama", False), ("opt", True)], ids=str)
def test_eval_reads_summaries_like_a_store(folders, tmp_path, key):
    from lloco_engine.eval.run import EvalConfig, run

    question = {"id": "q", "question": "Who keeps the mill?", "answers": ["Ada Brandt"]}
    record = {"doc_id": "mill", "title": "", "text": TEXT, "source": "", "questions": [question]}
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    methods = ("none", "full", "kv", "kv_retrieved")
    config = EvalConfig(
        str(tmp_path / "data.jsonl"), methods=methods, top_k=1, decoder=folders[key], device="cpu", answers=False,
        compressor="autocompressor", segment_tokens=64,
    )  # fmt: skip
    decoder = LocalDecoder.load(folders[key], device="cpu")
    result = run(config, decoder=decoder, embedder=HashingEmbedder(), cache=tmp_path / "cache")
    rows = {row["method"]: row for row in result["results"]}
    assert set(rows) == set(methods) and rows["kv"]["ratio"] == 64 / K
    with open_engine(tmp_path / "store", folders[key]) as engine:
        engine.ingest([Document("mill", TEXT)])
        hits = engine.store.chunks("mill")
        stored = [engine.store.load_segment(hit.segment_id) for hit in hits]
    prefix = assemble(stored, room=Room(0, 0, 900, decoder.shape.rotary)).prefix
    (loss,) = decoder.answer_losses([Prompt(question["question"], prefix)], ["Ada Brandt"])
    assert rows["kv"]["loss"] == pytest.approx(loss[0] / loss[1], abs=1e-3)
    assert rows["kv"]["prompt_slots"] == K * len(hits)
    assert 0 < rows["kv_retrieved"]["prompt_slots"] <= K * len(hits)
