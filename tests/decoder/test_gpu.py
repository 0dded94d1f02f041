"""A CUDA device gives what the CPU gives: losses, segments, answers, whole stores and trained adapters."""

from __future__ import annotations

import copy
import json
import statistics
import time

import pytest
import torch
from decoder_cases import OTHERS, TEXT, place, spiced, tokens, whole
from peft import LoraConfig

from lloco_engine import Document, Engine
from lloco_engine.chunking import Chunker
from lloco_engine.compress import registry
from lloco_engine.config import ChunkConfig, GenerateConfig
from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.finetune.config import preset
from lloco_engine.finetune.run import DataFile, Finetune
from lloco_engine.testing import HashingEmbedder, save_tiny_decoder, tiny_decoder, tiny_tokenizer
from lloco_engine.types import Prefix, Segment

pytestmark = pytest.mark.gpu

DEVICE = "cuda"

QUESTIONS = ["Who is the keeper?", "Who came from the north, and when was it that she came?", "When?"]
ANSWERS = ["Ada Brandt", "She did, in 1874.", "1874"]


def pair(family: str = "llama", **changes) -> tuple[LocalDecoder, LocalDecoder]:
    """The same tiny decoder on the CPU and on the GPU, both in float32."""
    model = spiced(tiny_decoder(family, **changes))
    other = copy.deepcopy(model).to(DEVICE)
    return LocalDecoder(model, tiny_tokenizer(), "tiny"), LocalDecoder(other, tiny_tokenizer(), "tiny")


def losses(decoder: LocalDecoder, prefix: Prefix | None = None, context: str | None = None) -> list[float]:
    given = None if context is None else tokens(decoder, context)
    made = decoder.answer_losses([Prompt(question, prefix, given) for question in QUESTIONS], ANSWERS)
    return [loss / count for loss, count in made]


def moved(segment: Segment) -> Segment:
    """The segment on the CPU, as a store would give it."""
    parts = (segment.keys, segment.values, segment.bias, segment.lengths)
    return Segment(*(part.cpu() for part in parts), segment.source_tokens)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "opt"])
def test_losses_are_those_of_the_cpu(family):
    here, there = pair(family)
    assert losses(there) == pytest.approx(losses(here), rel=1e-3)
    assert losses(there, context=TEXT) == pytest.approx(losses(here, context=TEXT), rel=1e-3)


@pytest.mark.parametrize("placement", ["parallel", "sequence"])
@pytest.mark.parametrize("focus", [0, 1])
def test_segments_of_the_cpu_are_read_alike(placement, focus):
    here, there = pair()
    prefix = place(here, [whole(here), *(whole(here, text) for text in OTHERS)], placement)
    prefix = Prefix(prefix.segments, prefix.offsets, prefix.start, placement, focus=focus)
    assert losses(there, prefix) == pytest.approx(losses(here, prefix), rel=1e-3)


@pytest.mark.parametrize("name", ["attention_matching", "kvzip", "snapkv", "uncompressed"])
def test_segments_made_on_the_gpu_are_as_good(name):
    here, there = pair(max_position_embeddings=4096)
    compressor = registry.get(name)
    made = [moved(compressor.compress(decoder, tokens(decoder, TEXT), [4])[0]) for decoder in (here, there)]
    assert made[1].slots == made[0].slots
    prefixes = [place(here, [segment]) for segment in made]
    assert losses(here, prefixes[1]) == pytest.approx(losses(here, prefixes[0]), rel=0.02)


@pytest.mark.parametrize("template", [None, "lloco"])
def test_a_batch_answers_as_its_rows_do_alone(template):
    decoder = LocalDecoder(spiced(tiny_decoder()).to(DEVICE), tiny_tokenizer(), "tiny", template)
    prefix = place(decoder, [whole(decoder)])
    config = GenerateConfig(max_new_tokens=12)
    for read in (None, prefix):
        prompts = [Prompt(question, read) for question in QUESTIONS]
        together = decoder.generate(prompts, config)
        for prompt, made in zip(prompts, together, strict=True):
            assert decoder.generate([prompt], config)[0].token_ids == made.token_ids
            streamed, pieces = decoder.stream(prompt, config)
            assert "".join(pieces) == streamed.text
            assert streamed.token_ids == made.token_ids


def test_a_prompt_of_a_new_length_takes_no_longer_than_one_seen_before():
    decoder = LocalDecoder(
        spiced(tiny_decoder(num_hidden_layers=6)).to(DEVICE, torch.bfloat16), tiny_tokenizer(), "tiny"
    )
    prefix = place(decoder, [whole(decoder)])

    def seconds(words: int) -> float:
        began = time.perf_counter()
        decoder.answer_losses([Prompt("who " * words, prefix)], ["Ada"])
        return time.perf_counter() - began

    seconds(40)
    first, again = ([seconds(words) for words in range(41, 60)] for _ in range(2))
    assert statistics.median(first) < 5 * statistics.median(again)


def test_an_adapter_adds_what_it_adds_on_the_cpu():
    pairs = pair()
    for decoder in pairs:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            parameters = decoder.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]), "new")
            for name, parameter in sorted(parameters.items()):
                parameter.data.copy_(torch.randn(parameter.shape) * (0.2 if "lora_B" in name else 0.1))
    prompts = [Prompt(question) for question in QUESTIONS]
    here, there = ([loss for loss, _ in decoder.answer_losses(prompts, ANSWERS, "new")] for decoder in pairs)
    assert there == pytest.approx(here, rel=1e-3)
    assert there != pytest.approx([loss for loss, _ in pairs[1].answer_losses(prompts, ANSWERS)], rel=1e-3)


def test_a_store_made_on_the_gpu_is_read_on_the_cpu(tmp_path, tiny_folder):
    store = tmp_path / "store"
    with Engine.open(store, decoder=str(tiny_folder), embedder=HashingEmbedder(), device=DEVICE) as engine:
        engine.ingest([Document("mill", TEXT), Document("tram", OTHERS[0])])
        answer = engine.ask("Who is the keeper of the mill?")
        assert answer.usage.peak_memory > 0
        cited = [hit.doc_id for hit in answer.hits]
    with Engine.open(store, decoder=str(tiny_folder), embedder=HashingEmbedder(), device="cpu", create=False) as engine:
        assert [hit.doc_id for hit in engine.ask("Who is the keeper of the mill?").hits] == cited


def test_the_embedded_decoder_in_bfloat16_is_near_the_cpus_float32():
    here, there = LocalDecoder.load("embedded", device="cpu"), LocalDecoder.load("embedded")
    assert (there.runner.device.type, there.runner.dtype) == (DEVICE, torch.bfloat16)
    text = " ".join([TEXT, *OTHERS])
    found = []
    for decoder in (here, there):
        segment = registry.get("attention_matching").compress(decoder, tokens(decoder, text), [8])[0]
        prefix = place(decoder, [segment])
        found.append([sum(losses(decoder, *given)) for given in ((), (None, text), (prefix,))])
        assert decoder.generate([Prompt(QUESTIONS[0], prefix)])[0].text
    assert found[1] == pytest.approx(found[0], rel=0.03)


def test_an_adapter_is_trained_on_the_gpu_and_goes_on_after_a_kill(tmp_path):
    folder = save_tiny_decoder(tmp_path / "tiny", max_position_embeddings=4096)
    data = tmp_path / "data.jsonl"
    questions = [
        {"question": question, "answers": [answer]} for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    records = [{"doc_id": f"d{n}", "text": f"{n}. {TEXT}", "questions": questions} for n in range(12)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    changes = {"rank": 4, "alpha": 8, "epochs": 6, "learning_rate": 5e-3, "holdout_documents": 2, "evaluate_every": 4}

    def run(stop_at: int | None = None) -> list[dict]:
        def watch(progress) -> None:
            if progress.step == stop_at:
                raise KeyboardInterrupt

        decoder = LocalDecoder.load(str(folder), device=DEVICE)
        compressor, chunker = registry.get("attention_matching"), Chunker(decoder.tokenizer, ChunkConfig(200, 24, 4))
        config = preset("small", **changes)
        made = Finetune(decoder, compressor, chunker, [DataFile(data)], config, group="mills")
        made.run(tmp_path / "out", tmp_path / "work", watch)
        return [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]

    with pytest.raises(KeyboardInterrupt):
        run(stop_at=5)
    held_out = [line["held_out"] for line in run() if "held_out" in line]
    assert held_out[-1] < held_out[0]
