"""Framework classes on a store of summary embeddings, and adapters on an OPT decoder: nothing asks which kind it is."""

from __future__ import annotations

import pytest
import torch
from summary_cases import save_tiny_autocompressor

from lloco_engine import ChunkConfig, CompressConfig, Document, Engine, GenerateConfig
from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.kinds.summary import SummarySegment
from lloco_engine.models import quiet
from lloco_engine.prefix import Room, assemble
from lloco_engine.testing import HashingEmbedder

pytestmark = pytest.mark.usefixtures("no_network", "closed_loop")

K = 4
QUESTION = "Where does the pump stand?"
TOPICS = ("pump", "crane", "valve")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = save_tiny_autocompressor(
        tmp_path_factory.mktemp("decoder"), summary_length=K, initializer_range=0.1, max_position_embeddings=8192
    )
    with Engine.open(
        tmp_path_factory.mktemp("store") / "s",
        decoder=str(folder),
        embedder=HashingEmbedder(),
        compress=CompressConfig("autocompressor"),
        chunk=ChunkConfig(64, 24, 4),
        device="cpu",
    ) as made:
        made.ingest([Document(f"{topic}.md", _story(topic)) for topic in TOPICS])
        yield made


def _story(topic: str) -> str:
    return " ".join(f"The {topic} number {number} stands in the hall of {topic}." for number in range(6))


@pytest.fixture
def answers(engine, monkeypatch):
    """What the engine answered."""
    seen = []
    stream = engine.stream

    def spied(*arguments, **options):
        made = stream(*arguments, **options)
        finish = made._finish

        def kept():
            seen.append(finish())
            return seen[-1]

        made._finish = kept
        return made

    monkeypatch.setattr(engine, "stream", spied)
    return seen


def check(engine, answers):
    """The last answer read whole chains of summaries."""
    answer = answers[-1]
    read = {hit.segment_id for hit in answer.hits}
    assert answer.usage.prompt_slots == K * len(read) > 0
    for hit in answer.hits:
        assert {earlier.segment_id for earlier in engine.store.earlier(hit)} <= read
    assert any(hit.ordinal for hit in answer.hits)


def test_langchain_reads_summaries(engine, answers):
    from langchain_core.prompts import ChatPromptTemplate

    from lloco_integrations.langchain import ChatLLoCO, LLoCORetriever

    prompt = ChatPromptTemplate.from_messages([("system", "Answer from this:\n\n{context}"), ("human", "{input}")])
    documents = LLoCORetriever(engine=engine, k=3).invoke(QUESTION)
    chat = ChatLLoCO(engine=engine, prompt=prompt, max_tokens=6)
    context = "\n\n".join(document.page_content for document in documents)
    message = chat.invoke(prompt.invoke({"context": context, "input": QUESTION}))
    check(engine, answers)
    hits = engine.retrieve(QUESTION, top_k=3)
    expected = engine.ask(QUESTION, hits=hits, generate=GenerateConfig(max_new_tokens=6))
    assert message.content == expected.text


def test_llama_index_reads_summaries(engine, answers):
    from llama_index.core.query_engine import RetrieverQueryEngine

    from lloco_integrations.llama_index import LLoCOLLM, LLoCORetriever

    llm = LLoCOLLM(engine, max_tokens=6)
    query = RetrieverQueryEngine.from_args(LLoCORetriever(engine, top_k=3), llm=llm)
    response = query.query(QUESTION)
    check(engine, answers)
    hits = engine.retrieve(QUESTION, top_k=3)
    assert str(response) == engine.ask(QUESTION, hits=hits, generate=GenerateConfig(max_new_tokens=6)).text


def test_a_handle_counts_the_slots_of_all_that_its_segment_is_read_after(engine):
    from lloco_integrations.handles import Handles

    first, *_, last = engine.store.chunks("pump.md")
    chain = [*engine.read_before(last), last]
    assert chain[0].segment_id == first.segment_id and len(chain) > 1 and engine.read_before(first) == []
    handles = Handles(engine)
    text = handles.mint([last])
    assert handles.slots(text) == K * len(chain)
    assert handles.slots(text + handles.mint(chain) + text) == K * len(chain)  # each segment once
    assert engine.ask(QUESTION, hits=[last], generate=GenerateConfig(2)).usage.prompt_slots == handles.slots(text)
    signed = Handles(engine, key=b"k" * 16)
    assert signed.slots(signed.mint([last])) == K * len(chain) and signed.slots(signed.mint([first])) == K


def test_an_opt_decoder_takes_adapters(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = str(save_tiny_autocompressor(tmp_path / "opt", "opt", summary_length=K, init_std=0.1))
    targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
    with quiet():
        tuned = get_peft_model(
            AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=8, lora_alpha=16, target_modules=targets)
        )
        generator = torch.Generator().manual_seed(1)
        for name, weight in tuned.named_parameters():
            if "lora_" in name:
                weight.data.copy_(0.2 * torch.randn(weight.shape, generator=generator))
        tuned.save_pretrained(tmp_path / "adapter")
        merged = tuned.merge_and_unload()
    decoder, tokenizer = LocalDecoder.load(folder, device="cpu"), LocalDecoder.load(folder, device="cpu").tokenizer
    expected = LocalDecoder(merged.eval(), tokenizer, "merged", "lloco")
    vectors = torch.randn(5, decoder.shape.embedding, generator=generator)
    prefix = assemble([SummarySegment(vectors, 9)], room=Room(0, 0, 900, rotary=False)).prefix
    prompts = [Prompt("Who?", prefix)]
    (base,) = decoder.answer_losses(prompts, ["Ada Brandt"])
    decoder.load_adapter(tmp_path / "adapter", "law")
    (ours,) = decoder.answer_losses(prompts, ["Ada Brandt"], "law")
    (theirs,) = expected.answer_losses(prompts, ["Ada Brandt"])
    (again,) = decoder.answer_losses(prompts, ["Ada Brandt"])
    assert abs(ours[0] - theirs[0]) < 1e-3 and abs(ours[0] - base[0]) > 1e-2 and abs(again[0] - base[0]) < 1e-4
