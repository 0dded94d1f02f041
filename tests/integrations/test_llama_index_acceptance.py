"""The acceptance checks of a demanding RAG engineer, for LlamaIndex: one test each, in their order. No sockets."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading

import pytest
from integration_cases import documents, open_engine
from llama_cases import QUESTION, TENANTS, chat_memory, gated, nodes, plain_index, story
from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine
from llama_index.core.evaluation import FaithfulnessEvaluator
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.llms import ChatMessage, MockLLM
from llama_index.core.response_synthesizers import ResponseMode, get_response_synthesizer
from llama_index.core.schema import Document as LlamaDocument
from llama_index.core.storage.docstore import SimpleDocumentStore
from places import ROOT, TESTS

from lloco_engine import AdapterError, Engine, GenerateConfig, PromptTooLong, StoreMismatch
from lloco_engine.adapters.loading import default_folder
from lloco_engine.testing import HashingEmbedder, save_tiny_decoder
from lloco_integrations.handles import HandleFragment, Handles
from lloco_integrations.llama_index import (
    LLoCOCitationQueryEngine,
    LLoCOEmbedding,
    LLoCOLLM,
    LLoCONodePostprocessor,
    LLoCORetriever,
    LLoCOTransform,
    LLoCOVectorStore,
)
from lloco_integrations.session import Session

pytestmark = pytest.mark.usefixtures("no_network", "closed_loop")
SHORT = GenerateConfig(max_new_tokens=8)


@pytest.fixture(scope="module")
def engine(tmp_path_factory, tiny_loaded):
    with open_engine(tmp_path_factory.mktemp("store") / "s", tiny_loaded) as engine:
        engine.ingest([document for tenant in TENANTS for document in documents(tenant)])
        yield engine


@pytest.fixture
def own_engine(tmp_path, tiny_loaded):
    with open_engine(tmp_path / "s", tiny_loaded) as engine:
        yield engine


@pytest.fixture(scope="module")
def index(engine):
    return plain_index(engine)


@pytest.fixture
def llm(engine):
    return LLoCOLLM(engine, tenant="red", max_tokens=8)


@pytest.fixture(autouse=True)
def default_model(monkeypatch, llm):
    """LlamaIndex asks for a default model even where none is used."""
    monkeypatch.setattr(Settings, "_llm", llm)


@pytest.fixture
def post(engine):
    return LLoCONodePostprocessor(engine, tenant="red", on_missing="error")


@pytest.fixture
def asked(monkeypatch):
    """Every prompt that reaches the model: its messages, and what was made of them."""
    seen = []
    real = Session.read

    def read(self, messages, tenant=""):
        ask = real(self, messages, tenant)
        seen.append((" ".join(message.text for message in messages), ask))
        return ask

    monkeypatch.setattr(Session, "read", read)
    return seen


def no_raw_text(prompt: str) -> bool:
    return "stands in hall" not in prompt


def test_01_expected_segments_in_order_and_no_raw_text_in_the_prompt(engine, index, llm, post, asked):
    response = index.as_query_engine(llm=llm, node_postprocessors=[post], similarity_top_k=3).query(QUESTION)
    ((prompt, ask),) = asked
    expected = [engine.find_text(node.text, "red")[0] for node in response.source_nodes]
    assert [hit.segment_id for hit in ask.hits] == [hit.segment_id for hit in expected] and len(expected) == 3
    assert no_raw_text(prompt) and (ask.question, ask.context, ask.verbatim) == (QUESTION, "", False)
    assert str(response) == engine.ask(QUESTION, hits=expected, tenant="red", generate=SHORT).text


@pytest.mark.parametrize("multimodal", [False, True], ids=["text", "blocks"])
@pytest.mark.parametrize("window", [850, None], ids=["small", "large"])
@pytest.mark.parametrize("mode", list(ResponseMode), ids=lambda mode: mode.value)
def test_02_every_response_mode_with_small_and_large_windows_loses_nothing(
    engine, index, post, asked, mode, window, multimodal
):
    llm = LLoCOLLM(engine, tenant="red", max_tokens=8, context_window=window)
    synthesizer = get_response_synthesizer(
        llm=llm, response_mode=mode, prompt_helper=llm.prompt_helper(), multimodal=multimodal
    )
    query = index.as_query_engine(
        llm=llm, node_postprocessors=[post], similarity_top_k=5, response_synthesizer=synthesizer
    ).query
    if mode is ResponseMode.SIMPLE_SUMMARIZE and window and not multimodal:  # LlamaIndex would cut the context
        with pytest.raises(PromptTooLong, match="do not fit a prompt of 850"):
            query(QUESTION)
        return
    response = query(QUESTION)
    read = {hit.segment_id for _, ask in asked for hit in ask.hits}
    if mode in (ResponseMode.NO_TEXT, ResponseMode.CONTEXT_ONLY, ResponseMode.GENERATION):
        assert not read
    else:
        assert read == {engine.find_text(node.text, "red")[0].segment_id for node in response.source_nodes}
        assert len(read) == 5
    assert all(no_raw_text(prompt) for prompt, _ in asked)
    assert all("hall" not in ask.context for _, ask in asked)


def test_03_packing_respects_what_segments_cost(engine, index, post, asked):
    small = LLoCOLLM(engine, tenant="red", max_tokens=8, context_window=850)
    synthesizer = get_response_synthesizer(llm=small, response_mode="compact", prompt_helper=small.prompt_helper())
    index.as_query_engine(
        llm=small, node_postprocessors=[post], similarity_top_k=5, response_synthesizer=synthesizer
    ).query(QUESTION)
    cost = [sum(hit.slots for hit in ask.hits) for _, ask in asked]
    assert len(cost) > 1 and max(cost) < 850
    slots = [hit.slots for hit in asked[0][1].hits]
    handles = Handles.of(engine).mint(asked[0][1].hits)
    assert len(small.token_counter(f"a {handles} b")) == len(small.token_counter("a  b")) + sum(slots) + len(slots) - 1
    tiny = LLoCOLLM(engine, tenant="red", max_tokens=8, context_window=640)
    synthesizer = get_response_synthesizer(llm=tiny, response_mode="compact", prompt_helper=tiny.prompt_helper())
    with pytest.raises(PromptTooLong, match="tokens and slots"):  # one segment alone is too large: it is not cut
        index.as_query_engine(
            llm=tiny, node_postprocessors=[post], similarity_top_k=2, response_synthesizer=synthesizer
        ).query(QUESTION)


def test_04_context_chat_condense_plus_context_citation_and_multimodal_paths(engine, index, llm, post, asked):
    retriever = index.as_retriever(similarity_top_k=2)
    for make in (ContextChatEngine, CondensePlusContextChatEngine):
        chat = make.from_defaults(
            retriever=retriever, llm=llm, node_postprocessors=[post], system_prompt="Be brief.", memory=chat_memory()
        )
        asked.clear()
        first = chat.chat(QUESTION)
        prompt, ask = asked[-1]
        assert len(ask.hits) == 2 and no_raw_text(prompt) and (ask.question, ask.context) == (QUESTION, "Be brief.")
        own = engine.ask(QUESTION, hits=ask.hits, context="Be brief.", tenant="red", generate=SHORT)
        assert str(first) == own.text
        chat.chat("And what of {context_str} there?")  # a past message must not pull the handles in again
        chat.chat("And the crane?")
        prompt, ask = asked[-1]
        assert len(ask.hits) == 2 and no_raw_text(prompt) and len(ask.history) == 4
        assert "LLC:" not in str(ask.history) and ask.question == "And the crane?"
    for multimodal in (False, True):
        asked.clear()
        cited = LLoCOCitationQueryEngine.from_args(
            index, llm=llm, similarity_top_k=2, node_postprocessors=[post], multimodal=multimodal
        ).query(QUESTION)
        prompt, ask = asked[0]
        assert len(ask.hits) == 2 and no_raw_text(prompt) and ask.question.count("(the text above)") == 2
        assert [node.text.splitlines()[0] for node in cited.source_nodes] == ["Source 1:", "Source 2:"]
        assert "stands in hall" in cited.source_nodes[0].text
        asked.clear()
        index.as_query_engine(llm=llm, node_postprocessors=[post], multimodal=multimodal).query(QUESTION)
        assert len(asked[0][1].hits) == 2 and no_raw_text(asked[0][0])


def test_05_sources_and_evaluators_show_text_and_handles_show_nowhere(engine, index, llm, post):
    response = index.as_query_engine(llm=llm, node_postprocessors=[post], similarity_top_k=2).query(QUESTION)
    plain = index.as_retriever(similarity_top_k=2).retrieve(QUESTION)
    for ours, theirs in zip(response.source_nodes, plain, strict=True):
        assert ours.node.text == ours.get_content() == theirs.get_content()
        assert (ours.node.hash, repr(ours.node), ours.score) == (theirs.node.hash, repr(theirs.node), theirs.score)
        assert ours.model_dump_json() == theirs.model_dump_json() and str(ours) == str(theirs)
        assert ours.get_content("embed") == theirs.get_content("embed") and ours.metadata == theirs.metadata
        assert "LLC:" in ours.get_content("llm")
    seen = "".join(
        [str(response), repr(response.source_nodes), str(response.metadata), response.get_formatted_sources()]
    )
    assert "LLC:" not in seen
    result = FaithfulnessEvaluator(llm=MockLLM()).evaluate_response(QUESTION, response)
    assert list(result.contexts) == [node.get_content() for node in plain]


def test_06_forged_expired_foreign_and_fragmented_handles_never_resolve(engine, asked):
    now = [0.0]
    handles = Handles(engine, ttl=60, clock=lambda: now[0])
    llm = LLoCOLLM(engine, tenant="red", max_tokens=4, handles=handles)
    mine, foreign = (handles.mint(engine.store.chunks("pump.md", tenant)) for tenant in TENANTS)
    for text in ("[[LLC:" + "0" * 32 + "]]", foreign, foreign.upper(), mine.replace("LLC", "LLD")[:14]):
        response = llm.complete(f"Read {text} now.")
        assert response.raw["segments"] == [] and response.raw["usage"]["prompt_slots"] == 0
    for part in (mine[:-3], mine[9:], mine.upper()):
        with pytest.raises(HandleFragment):
            llm.complete(f"Read {part} now.")
    assert llm.complete(mine).raw["segments"]
    assert not llm.for_scope("blue").complete(mine).raw["segments"]
    now[0] = 61
    assert not llm.complete(mine).raw["segments"]
    assert handles.counts["expired"] == 1 and handles.counts["wrong_scope"] == 2


async def test_07_fifty_concurrent_questions_over_two_tenants_do_not_cross(engine, asked):
    llm = LLoCOLLM(engine, max_tokens=4)
    post = LLoCONodePostprocessor(engine, on_missing="error")
    engines = {
        tenant: plain_index(engine, tenant).as_query_engine(
            llm=llm.for_scope(tenant), node_postprocessors=[post.for_scope(tenant)], similarity_top_k=2
        )
        for tenant in TENANTS
    }
    jobs = [(TENANTS[n % 2], f"Where is the {('pump', 'crane', 'valve')[n % 3]} {n}?") for n in range(50)]
    responses = await asyncio.gather(*(engines[tenant].aquery(question) for tenant, question in jobs))
    assert len(asked) == 50
    for (tenant, question), response in zip(jobs, responses, strict=True):
        (ask,) = [ask for _, ask in asked if ask.question == question]
        assert ask.tenant == tenant and len(ask.hits) == 2 and {hit.tenant for hit in ask.hits} == {tenant}
        assert [hit.text for hit in ask.hits] == [node.text for node in response.source_nodes]
    for number in (0, 1, 30, 49):
        tenant, question = jobs[number]
        (ask,) = [ask for _, ask in asked if ask.question == question]
        own = engine.ask(question, hits=ask.hits, tenant=tenant, generate=GenerateConfig(max_new_tokens=4))
        assert str(responses[number]) == own.text


async def test_08_streams_yield_before_completion_and_join_to_the_whole(engine, index, post, monkeypatch):
    llm = LLoCOLLM(engine, tenant="red", max_tokens=32)
    options = {"llm": llm, "node_postprocessors": [post], "similarity_top_k": 2}
    whole = str(index.as_query_engine(**options).query(QUESTION))
    gate = threading.Event()
    made = gated(engine, monkeypatch, gate)
    stream = index.as_query_engine(streaming=True, **options).query(QUESTION)
    pieces = [next(stream.response_gen)]
    assert len(made) == 1  # the rest waits for the gate
    gate.set()
    pieces += list(stream.response_gen)
    assert "".join(pieces) == whole and len(made) > 1
    gate.clear()
    made.clear()
    streamed = await index.as_query_engine(streaming=True, **options).aquery(QUESTION)
    source = streamed.async_response_gen()
    pieces = [await asyncio.wait_for(anext(source), 20)]
    assert len(made) == 1
    gate.set()
    pieces += [piece async for piece in source]
    assert "".join(pieces) == whole


async def test_09_async_calls_leave_the_loop_free(engine, llm, monkeypatch):
    messages = [ChatMessage(role="user", content="Hello")]

    async def drain(stream):
        return [piece async for piece in await stream]

    for call in (
        lambda: llm.achat(messages),
        lambda: llm.acomplete("Hello"),
        lambda: drain(llm.astream_chat(messages)),
        lambda: drain(llm.astream_complete("Hello")),
    ):
        gate = threading.Event()
        with monkeypatch.context() as patch:
            gated(engine, patch, gate)
            task = asyncio.create_task(call())
            await asyncio.sleep(0.05)
            assert not task.done()
            gate.set()  # only a free loop comes here
            await task


async def test_10_one_pair_of_events_for_each_call(engine, monkeypatch):
    debug = LlamaDebugHandler(print_trace_on_end=False)
    llm = LLoCOLLM(engine, max_tokens=4, callback_manager=CallbackManager([debug]))
    messages = [ChatMessage(role="user", content="Hello")]
    llm.chat(messages)
    llm.complete("Hello")
    list(llm.stream_chat(messages))
    list(llm.stream_complete("Hello"))
    await llm.achat(messages)
    await llm.acomplete("Hello")
    async for _ in await llm.astream_chat(messages):
        pass
    async for _ in await llm.astream_complete("Hello"):
        pass
    pairs = debug.get_event_pairs(CBEventType.LLM)
    assert len(pairs) == 8 and all(len(pair) == 2 for pair in pairs)


async def test_11_usage_counts_slots_and_adds_up_once(engine, index, post):
    counter = TokenCountingHandler(tokenizer=str.split)
    manager = CallbackManager([counter])
    llm = LLoCOLLM(engine, tenant="red", max_tokens=6, callback_manager=manager)
    hits = engine.store.chunks("pump.md", "red")
    own = engine.ask(QUESTION, hits=hits, tenant="red", generate=GenerateConfig(max_new_tokens=6)).usage
    read = own.template_tokens + own.prompt_tokens + own.prompt_slots
    prompt = "Context information is below.\n---------------------\n{}\n---------------------\nGiven the context "
    prompt += "information and not prior knowledge, answer the query.\nQuery: " + QUESTION + "\nAnswer: "
    messages = [ChatMessage(role="user", content=prompt.format(Handles.of(engine).mint(hits)))]
    responses = [llm.chat(messages), list(llm.stream_chat(messages))[-1], await llm.achat(messages)]
    responses += [[piece async for piece in await llm.astream_chat(messages)][-1], llm.complete(messages[0].content)]
    for response in responses:
        usage = response.raw["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (read, own.completion_tokens)
        assert usage["prompt_slots"] == own.prompt_slots > 0 and usage["total_tokens"] == read + own.completion_tokens
    assert counter.prompt_llm_token_count == 5 * read
    assert counter.completion_llm_token_count == 5 * own.completion_tokens
    assert sum(piece.raw is not None for piece in llm.stream_chat(messages)) == 1


def test_12_upsert_delete_clear_and_a_crash_leave_no_orphan_or_stale_segment(own_engine, monkeypatch):
    engine = own_engine
    store = LLoCOVectorStore(engine, tenant="red")
    pipeline = IngestionPipeline(
        transformations=[LLoCOTransform(engine, tenant="red"), LLoCOEmbedding(engine)],
        vector_store=store,
        docstore=SimpleDocumentStore(),
        docstore_strategy=DocstoreStrategy.UPSERTS_AND_DELETE,
    )
    docs = [LlamaDocument(text=story(topic), id_=topic) for topic in ("pump", "crane", "valve")]
    compressor = engine._setup.compressor
    left = [2]

    class Dying:
        def __getattr__(self, name):
            return getattr(compressor, name)

        def compress(self, *args):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return compressor.compress(*args)

    monkeypatch.setattr(engine._setup, "compressor", Dying())
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(documents=docs)
    monkeypatch.undo()
    assert len(engine.documents("red")) == 2 and engine.verify() == []
    pipeline.run(documents=docs)  # goes on
    assert len(engine.documents("red")) == 3 and engine.verify() == []
    files = len(list(engine.store.path.glob("segments/*/*.safetensors")))
    assert files == 3
    pipeline.run(documents=docs)
    assert [info.version for info in engine.documents("red")] == [1, 1, 1]
    changed = [LlamaDocument(text=story("ladder"), id_="pump"), docs[1]]  # valve is gone
    pipeline.run(documents=changed)
    assert sorted(info.doc_id for info in engine.documents("red")) == ["crane", "pump"]
    assert not engine.find_text(story("pump"), "red") and not engine.find_text(story("valve"), "red")
    assert len(list(engine.store.path.glob("segments/*/*.safetensors"))) == 2 and engine.verify() == []
    index = VectorStoreIndex.from_vector_store(store, embed_model=LLoCOEmbedding(engine))
    index.delete_ref_doc("crane")
    assert not engine.find_text(story("crane"), "red")
    store.clear()
    assert engine.documents() == [] and list(engine.store.path.glob("segments/*/*.safetensors")) == []
    assert engine.verify() == []


FRESH = """
import sys
sys.path.insert(0, {tests!r})
from llama_index.core import VectorStoreIndex
from lloco_engine import Engine
from lloco_engine.testing import HashingEmbedder
from lloco_integrations.llama_index import *
with Engine.open({store!r}, create=False, embedder=HashingEmbedder()) as engine:
    store = LLoCOVectorStore(engine, tenant="red")
    index = VectorStoreIndex.from_vector_store(store, embed_model=LLoCOEmbedding(engine))
    post = LLoCONodePostprocessor(engine, tenant="red", on_missing="error")
    answer = index.as_query_engine(llm=LLoCOLLM(engine, tenant="red", max_tokens=8), node_postprocessors=[post])
    response = answer.query({question!r})
    print(repr([str(response), [node.node_id for node in response.source_nodes]]))
"""


def test_13_a_fresh_process_gives_identical_answers(tmp_path, tiny_folder):
    with open_engine(tmp_path / "s", str(tiny_folder)) as engine:
        store = LLoCOVectorStore(engine, tenant="red")
        index = VectorStoreIndex.from_vector_store(store, embed_model=LLoCOEmbedding(engine))
        index.insert_nodes(nodes())
        post = LLoCONodePostprocessor(engine, tenant="red", on_missing="error")
        ours = index.as_query_engine(llm=LLoCOLLM(engine, tenant="red", max_tokens=8), node_postprocessors=[post])
        response = ours.query(QUESTION)
        expected = repr([str(response), [node.node_id for node in response.source_nodes]])
    code = FRESH.format(tests=str(TESTS), store=str(tmp_path / "s"), question=QUESTION)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip().splitlines()[-1] == expected


def test_14_a_wrong_model_or_adapter_is_refused(engine, tmp_path, tiny_folder):
    with open_engine(tmp_path / "s", str(tiny_folder)) as made:
        made.ingest(documents("red")[:1])
        folder = default_folder()  # of the embedded decoder
        assert folder is not None
        made.adapters.registry.add(folder, "legal", "red")
        with pytest.raises(AdapterError, match="decoder_fingerprint"):
            LLoCOLLM(made, tenant="red", adapter="legal").complete("Hello")
    other = save_tiny_decoder(tmp_path / "other", seed=5, max_position_embeddings=4096)
    with pytest.raises(StoreMismatch, match="decoder_fingerprint"):
        Engine.open(tmp_path / "s", decoder=str(other), embedder=HashingEmbedder())
    with pytest.raises(AdapterError, match="'legal'"):
        LLoCOLLM(engine, tenant="red", adapter="legal").complete("Hello")
    with pytest.raises(AdapterError):
        engine.load_adapter(tmp_path / "nothing", "legal")


@pytest.mark.filterwarnings("ignore:A test tried to use socket")
def test_15_everything_above_runs_without_a_network(engine):
    """LlamaIndex has no standard suite; every test here runs with sockets disabled, and this shows that they are."""
    import socket

    from pytest_socket import SocketBlockedError

    with pytest.raises(SocketBlockedError):
        socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    assert json.loads(LLoCOLLM(engine).to_json())["max_tokens"] == 128
    assert LLoCORetriever(engine, tenant="red").retrieve(QUESTION)
    assert Settings._prompt_helper is None  # no test left a global setting behind
