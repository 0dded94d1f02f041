"""What a demanding engineer would check before putting LLoCO into a LangChain application, one test a check."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import threading
import time

import langchain_cases as cases
import pytest
from integration_cases import gated
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_classic.chains.combine_documents.map_reduce import MapReduceDocumentsChain
from langchain_classic.chains.question_answering import load_qa_chain
from langchain_core.documents import Document as PlainDocument
from langchain_core.load import dumps
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from places import ROOT

from lloco_engine import AdapterError, Document, Engine, GenerateConfig, PromptTooLong, StoreMismatch
from lloco_engine.adapters.loading import default_folder
from lloco_engine.testing import HashingEmbedder, save_tiny_decoder
from lloco_integrations.langchain import (
    ChatLLoCO,
    HandleFragment,
    Handles,
    LLoCODocument,
    LLoCODocumentCompressor,
    LLoCOLLM,
    LLoCORetriever,
    LLoCOVectorStore,
)

pytestmark = [
    pytest.mark.usefixtures("no_network"),
    pytest.mark.filterwarnings("ignore::langchain_core._api.deprecation.LangChainDeprecationWarning"),
]

QUESTION = "Where does the pump stand?"
TOPICS = ("pump", "crane", "tram", "mill")
TENANTS = ("red", "blue")
PROMPT = ChatPromptTemplate.from_messages([("system", "Answer from this only:\n\n{context}"), ("human", "{input}")])


@pytest.fixture(scope="module")
def decoder():
    return cases.decoder()


@pytest.fixture(scope="module")
def engine(tmp_path_factory, decoder):
    with cases.open_engine(tmp_path_factory.mktemp("acceptance") / "store", decoder) as made:
        made.ingest([cases.fact(topic) for topic in TOPICS])
        for tenant in TENANTS:
            made.ingest([cases.fact(f"{tenant} {topic}", tenant=tenant) for topic in TOPICS])
        yield made


@pytest.fixture
def own_engine(tmp_path, decoder):
    with cases.open_engine(tmp_path / "own", decoder) as made:
        made.ingest([cases.fact(topic) for topic in TOPICS])
        yield made


@pytest.fixture
def spy(engine, monkeypatch) -> cases.Spy:
    return cases.Spy(monkeypatch, engine)


@pytest.fixture
def chat(engine) -> ChatLLoCO:
    return ChatLLoCO(engine=engine, prompt=PROMPT, max_tokens=6)


@pytest.fixture
def retriever(engine) -> LLoCORetriever:
    return LLoCORetriever(engine=engine, k=3)


def chain_of(chat, retriever):
    return create_retrieval_chain(retriever, create_stuff_documents_chain(chat, PROMPT))


def prompt_of(documents, question: str = QUESTION):
    return PROMPT.invoke({"context": cases.format_docs(documents), "input": question})


def test_expected_segments_in_order_and_no_raw_text_in_the_prompt(engine, spy, chat, retriever):
    chain_of(chat, retriever).invoke({"input": QUESTION})
    assert spy.segments == [hit.segment_id for hit in engine.retrieve(QUESTION, top_k=3)]
    assert spy.last[0] == QUESTION
    assert not any(f"The {topic} number" in spy.text for topic in TOPICS)
    assert "[[LLC" not in spy.text


@pytest.mark.parametrize("kind", ["stuff", "map_reduce", "refine"])
def test_every_way_of_combining_documents_loses_nothing_silently(engine, spy, retriever, kind):
    documents = retriever.invoke(QUESTION)
    model = LLoCOLLM(engine=engine, max_tokens=4)
    chain = load_qa_chain(model, chain_type=kind)
    if isinstance(chain, MapReduceDocumentsChain):
        chain.reduce_documents_chain.token_max = 8000  # the tiny tokenizer counts bytes
    chain.invoke({"input_documents": documents, "question": QUESTION})
    read = [hit.segment_id for _, options in spy.asked for hit in options["hits"]]
    assert read == [hit.segment_id for hit in engine.retrieve(QUESTION, top_k=3)]
    with pytest.raises(PromptTooLong):  # a prompt that does not fit is refused, not cut
        chain.invoke({"input_documents": documents, "question": "word " * 9000})


def test_packing_respects_the_true_cost_of_segments(engine, retriever):
    documents = retriever.invoke(QUESTION)
    slots = [hit.slots for hit in engine.retrieve(QUESTION, top_k=3)]
    model = LLoCOLLM(engine=engine)
    assert [model.get_num_tokens(document.page_content) for document in documents] == slots
    chain = load_qa_chain(model, chain_type="stuff")
    asked = chain.prompt_length(documents, question=QUESTION)
    assert asked - chain.prompt_length([], question=QUESTION) == sum(slots) + 2 * len(engine.token_ids("\n\n"))


def test_conversation_and_structured_paths_read_memory(engine, spy, chat, retriever):
    documents = retriever.invoke(QUESTION)
    handles = [document.page_content for document in documents]
    expected = [hit.segment_id for hit in engine.retrieve(QUESTION, top_k=3)]
    for messages in (
        [SystemMessage(handles[0]), HumanMessage(f"{handles[1]} {handles[2]} {QUESTION}")],
        [HumanMessage("\n".join(handles)), HumanMessage(QUESTION)],
        [HumanMessage(QUESTION), AIMessage("", tool_calls=[]), ToolMessage("\n\n".join(handles), tool_call_id="1")],
        [SystemMessage(handles), HumanMessage([{"type": "text", "text": QUESTION}])],
    ):
        chat.invoke(messages)
        assert spy.segments == expected, messages


def test_sources_and_evaluators_see_real_text(engine, chat, retriever):
    context = chain_of(chat, retriever).invoke({"input": QUESTION})["context"]
    hits = engine.retrieve(QUESTION, top_k=3)
    assert [document.text for document in context] == [hit.text for hit in hits]
    for document, hit in zip(context, hits, strict=True):
        whole = engine.store.document_text(document.metadata["lloco_doc_id"])
        assert whole[slice(*document.metadata["lloco_span"])] == document.text
        assert (document.metadata["title"], document.metadata["source"]) == (hit.title, hit.source)
        assert document.metadata["lloco_score"] == hit.score


def test_no_raw_text_in_what_is_printed_and_no_handle_in_what_is_answered(engine, spy, chat, retriever):
    result = chain_of(chat, retriever).invoke({"input": QUESTION})
    (document, *_) = result["context"]
    for shown in (str(document), repr(document), document.model_dump_json(), dumps(document), str(document.metadata)):
        assert document.text not in shown
    message = chat.invoke(prompt_of(result["context"]))
    for said in (result["answer"], message.text, json.dumps(message.response_metadata), repr(message)):
        assert "[[LLC" not in said
        assert document.text not in said
    assert LLoCODocument.model_validate(document.model_dump()).page_content == document.page_content


def test_forged_expired_foreign_and_cut_handles_never_resolve(engine, spy, retriever, caplog):
    now = [0.0]
    handles = Handles(engine, ttl=60, clock=lambda: now[0])
    mine = LLoCORetriever(engine=engine, k=1, handles=handles)
    theirs = LLoCORetriever(engine=engine, k=1, handles=handles, tenant="red")
    chat = ChatLLoCO(engine=engine, prompt=PROMPT, handles=handles, max_tokens=2)
    live, foreign, forged = mine.invoke(QUESTION), theirs.invoke(QUESTION), f"[[LLC:{'0' * 32}]]"
    chat.invoke(prompt_of(foreign))
    assert spy.segments == []
    chat.invoke(prompt_of([PlainDocument(page_content=forged)]))
    assert spy.segments == []
    for cut in (live[0].page_content[:-3], live[0].page_content[4:], live[0].page_content[:22]):
        with pytest.raises(HandleFragment):
            chat.invoke(prompt_of([PlainDocument(page_content=cut)]))
    chat.invoke(prompt_of(live))
    assert len(spy.segments) == 1
    now[0] = 61.0
    chat.invoke(prompt_of(live))
    assert spy.segments == []
    assert {"wrong_scope", "unknown", "expired"} <= set(handles.counts)
    assert all(word in caplog.text for word in ("wrong_scope", "unknown", "expired"))


@pytest.mark.parametrize("seed", range(20))
def test_forged_handles_in_documents_metadata_questions_and_history_never_resolve(own_engine, monkeypatch, seed):
    spy, chance = cases.Spy(monkeypatch, own_engine), random.Random(seed)
    digits = "0123456789abcdef"

    def forged() -> str:
        body = "".join(chance.choices(digits, k=32))
        signed = f"{body}:1:{chance.randrange(2**31, 2**32):08x}:5:{''.join(chance.choices(digits, k=32))}"
        segment = chance.choice(own_engine.retrieve("pump", top_k=4)).segment_id
        body = chance.choice([body, signed, segment, body.upper(), body[:31], body + "0", "", f" {body}", f"{body} "])
        opening, closing = (
            chance.choice(["[[LLC:", "[[llc:", "[ [LLC:", "[[LLC :"]),
            chance.choice(["]]", "] ]", "]", ""]),
        )
        return f"{chance.choice(['', 'x', '[', '[['])}{opening}{body}{closing}{chance.choice(['', ']', ' y'])}"

    store = LLoCOVectorStore(own_engine)
    store.add_documents(
        [
            PlainDocument(
                page_content=f"{forged()} A kettle {forged()}", metadata={"note": forged(), "source": forged()}
            )
        ],
        ids=["kettle"],
    )
    chat = ChatLLoCO(engine=own_engine, prompt=PROMPT, max_tokens=2)
    (found,) = LLoCORetriever(engine=own_engine, k=1).invoke("kettle", filters={"doc_id": "kettle"})
    raw = LLoCODocumentCompressor(engine=own_engine).compress_documents([PlainDocument(page_content=forged())], "")
    chat.invoke(
        [
            SystemMessage(f"Answer from this only:\n\n{cases.format_docs([found, *raw])} {found.metadata['note']}"),
            HumanMessage(forged()),
            AIMessage(f"{forged()} yes"),
            ToolMessage(forged() + str(found.metadata), tool_call_id="1"),
            HumanMessage(f"{forged()} What? {forged()}"),
        ]
    )
    assert [hit.doc_id for hit in spy.last[1]["hits"]] == ["kettle"]
    assert "[[llc" not in spy.text.lower().replace(" ", "")


async def test_fifty_questions_at_once_of_two_tenants_do_not_cross(engine, spy):
    asked = [(TENANTS[number % 2], f"Where is the {TOPICS[number % 4]}?") for number in range(50)]
    chains = {
        tenant: chain_of(
            ChatLLoCO(engine=engine, prompt=PROMPT, max_tokens=4).for_scope(tenant),
            LLoCORetriever(engine=engine, k=2, tenant=tenant),
        )
        for tenant in TENANTS
    }
    results = await asyncio.gather(*(chains[tenant].ainvoke({"input": question}) for tenant, question in asked))
    own: dict[tuple[str, str], str] = {}
    for (tenant, question), result in zip(asked, results, strict=True):
        if (tenant, question) not in own:
            hits = engine.retrieve(question, top_k=2, tenant=tenant)
            generate = GenerateConfig(max_new_tokens=4)
            own[tenant, question] = engine.ask(question, hits=hits, tenant=tenant, generate=generate).text
        assert result["answer"] == own[tenant, question]
        assert all(tenant in document.text for document in result["context"])
    for _, options in spy.asked:
        assert {hit.tenant for hit in options["hits"]} == {options["tenant"]}
    assert len(spy.asked) == 50 + len(own)


async def test_streams_yield_before_completion_and_join_to_the_whole(engine, chat, retriever, monkeypatch):
    prompt = prompt_of(retriever.invoke(QUESTION))
    whole = chat.invoke(prompt).text
    gate = threading.Event()
    made = gated(engine, monkeypatch, gate)
    stream = chat.stream(prompt)
    pieces = [next(stream).text]
    assert pieces[0] and len(made) == 1  # the rest waits for the gate
    gate.set()
    pieces += [chunk.text for chunk in stream]
    assert "".join(pieces) == whole and len(made) > 1
    gate.clear()
    made.clear()
    source = chat.astream(prompt)
    pieces = [(await asyncio.wait_for(anext(source), 20)).text]
    assert pieces[0] and len(made) == 1
    gate.set()
    pieces += [chunk.text async for chunk in source]
    assert "".join(pieces) == whole


async def test_async_does_not_block_the_loop(engine, chat, retriever, monkeypatch):
    step = engine.decoder.step

    def slow(*args, **kwargs):
        time.sleep(0.1)
        return step(*args, **kwargs)

    monkeypatch.setattr(engine.decoder, "step", slow)
    longest, last, done = 0.0, time.perf_counter(), False

    async def watch():
        nonlocal longest, last
        while not done:
            await asyncio.sleep(0.005)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    watching = asyncio.create_task(watch())
    began = time.perf_counter()
    await chain_of(chat, retriever).ainvoke({"input": QUESTION})
    took, done = time.perf_counter() - began, True
    await watching
    assert took > 0.6
    assert longest < took / 2  # a call that blocks would hold the loop for all of it


async def test_one_pair_of_events_for_each_call(chat, retriever):
    from langchain_core.callbacks import BaseCallbackHandler

    class Events(BaseCallbackHandler):
        def __init__(self):
            self.seen = []

        def on_chat_model_start(self, *_, **__):
            self.seen.append("start")

        def on_llm_end(self, *_, **__):
            self.seen.append("end")

    events, chain = Events(), chain_of(chat, retriever)
    asked = {"input": QUESTION}, {"callbacks": [events]}
    chain.invoke(*asked)
    await chain.ainvoke(*asked)
    assert list(chain.stream(*asked))
    assert [piece async for piece in chain.astream(*asked)]
    assert events.seen == ["start", "end"] * 4


def test_usage_counts_slots_and_adds_up_once(engine, chat, retriever):
    from langchain_core.callbacks import get_usage_metadata_callback

    with get_usage_metadata_callback() as counted:
        chain_of(chat, retriever).invoke({"input": QUESTION})
    slots = sum(hit.slots for hit in engine.retrieve(QUESTION, top_k=3))
    usage = counted.usage_metadata["tiny"]
    text = len(engine.decoder.template.question_ids(QUESTION))
    template = engine.decoder.template_tokens
    assert usage["input_tokens"] == slots + text + template
    assert usage["input_token_details"]["cache_read"] == slots + template
    with get_usage_metadata_callback() as streamed:
        list(chain_of(chat, retriever).stream({"input": QUESTION}))
    assert streamed.usage_metadata["tiny"] == usage


def test_upsert_delete_clear_and_a_crash_leave_no_orphan_or_stale_segment(own_engine, monkeypatch):
    store, retriever = LLoCOVectorStore(own_engine), LLoCORetriever(engine=own_engine, k=9)
    before = retriever.invoke(QUESTION)
    store.add_texts(["The pump is new."], ids=["pump.md"])
    assert [one.text for one in retriever.invoke(QUESTION, filters={"doc_id": "pump.md"})] == ["The pump is new."]
    store.delete(["crane.md"])
    assert own_engine.verify() == []
    spy = cases.Spy(monkeypatch, own_engine)
    ChatLLoCO(engine=own_engine, prompt=PROMPT, max_tokens=2).invoke(prompt_of(before))
    assert {hit.doc_id for hit in spy.last[1]["hits"]} == {"tram.md", "mill.md"}
    compressor, left = own_engine._setup.compressor, [1]

    class Crashing(type(compressor)):
        def make(self, *args):
            if not left:
                raise KeyboardInterrupt
            left.pop()
            return super().make(*args)

    monkeypatch.setattr(own_engine._setup, "compressor", Crashing())
    with pytest.raises(KeyboardInterrupt):
        store.add_texts([cases.story("kettle", 8)], ids=["kettle"])
    assert store.get_by_ids(["kettle"]) == []
    assert {one.kind for one in own_engine.verify()} <= {"orphan"}  # which the same text, once added, uses
    monkeypatch.setattr(own_engine._setup, "compressor", compressor)
    store.add_texts([cases.story("kettle", 8)], ids=["kettle"])
    assert own_engine.verify() == []
    store.delete()
    assert (own_engine.documents(), own_engine.verify(), retriever.invoke(QUESTION)) == ([], [], [])


_FRESH = """
import sys
from lloco_engine import Engine
from lloco_engine.testing import HashingEmbedder
from lloco_integrations.langchain import ChatLLoCO, LLoCORetriever
with Engine.open(sys.argv[1], embedder=HashingEmbedder(), create=False) as engine:
    handles = "".join(one.page_content for one in LLoCORetriever(engine=engine, k=2).invoke(sys.argv[2]))
    print(ChatLLoCO(engine=engine, max_tokens=8).invoke(handles + " " + sys.argv[2]).text.encode().hex())
"""


def test_a_fresh_process_answers_the_same(tmp_path):
    folder = save_tiny_decoder(tmp_path / "decoder")
    with cases.open_engine(tmp_path / "store", str(folder)) as engine:
        engine.ingest([cases.fact(topic) for topic in TOPICS])
        handles = "".join(one.page_content for one in LLoCORetriever(engine=engine, k=2).invoke(QUESTION))
        here = ChatLLoCO(engine=engine, max_tokens=8).invoke(f"{handles} {QUESTION}").text
    command = [sys.executable, "-c", _FRESH, str(tmp_path / "store"), QUESTION]
    there = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert bytes.fromhex(there.stdout.strip()).decode() == here


def test_a_wrong_decoder_embedder_or_adapter_is_refused(tmp_path):
    with cases.open_engine(tmp_path / "store", str(save_tiny_decoder(tmp_path / "one"))) as engine:
        folder = default_folder()  # of the embedded decoder
        assert folder is not None
        engine.adapters.registry.add(folder, "law")
        for model in (ChatLLoCO(engine=engine, adapter="law"), LLoCOLLM(engine=engine, adapter="law")):
            with pytest.raises(AdapterError, match="decoder_fingerprint"):
                model.invoke(QUESTION)
    with pytest.raises(StoreMismatch, match="decoder_fingerprint"):
        cases.open_engine(tmp_path / "store", str(save_tiny_decoder(tmp_path / "two", seed=1)))
    with pytest.raises(StoreMismatch, match="embedder_fingerprint"):
        Engine.open(tmp_path / "store", embedder=HashingEmbedder(32))


@pytest.mark.filterwarnings("ignore:A test tried to use socket")
def test_everything_here_runs_with_sockets_disabled():
    """As LangChain's standard suites do, in test_langchain_standard and test_langchain_vectorstore."""
    import socket

    from pytest_socket import SocketBlockedError

    with pytest.raises(SocketBlockedError):
        socket.socket(socket.AF_INET, socket.SOCK_STREAM)


def test_signed_handles_serve_several_processes(engine, spy):
    key = b"0123456789abcdef"
    theirs, ours = Handles(engine, key=key), Handles(engine, key=key)
    documents = LLoCORetriever(engine=engine, k=2, handles=theirs).invoke(QUESTION)
    ChatLLoCO(engine=engine, prompt=PROMPT, handles=ours, max_tokens=2).invoke(prompt_of(documents))
    assert spy.segments == [hit.segment_id for hit in engine.retrieve(QUESTION, top_k=2)]
    ChatLLoCO(engine=engine, prompt=PROMPT, handles=Handles(engine, key=b"f" * 16), max_tokens=2).invoke(
        prompt_of(documents)
    )
    assert spy.segments == []


def test_what_a_document_says_stays_what_it_says(own_engine):
    store = LLoCOVectorStore(own_engine)
    text = f"A [[LLC:{'a' * 32}]] in a text"
    store.add_texts([text], ids=["x"])
    assert store.get_by_ids(["x"])[0].page_content == text  # neutralised for the model only
    assert own_engine.ingest([Document("x", text)]).unchanged == ("x",)
