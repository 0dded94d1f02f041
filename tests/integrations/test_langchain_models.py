"""The chat model and the language model: one contract for both, then what each has of its own."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import langchain_cases as cases
import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler, get_usage_metadata_callback
from langchain_core.documents import Document as PlainDocument
from langchain_core.globals import set_llm_cache
from langchain_core.messages import AIMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate

from lloco_engine import AdapterError, ConfigError, Document, GenerateConfig, SegmentUnavailable, StoreLocked
from lloco_integrations.langchain import ChatLLoCO, HandleFragment, Handles, LLoCOLLM, LLoCORetriever, handle_block

pytestmark = pytest.mark.usefixtures("no_network")

QUESTION = "Where does the pump stand?"
SHORT = GenerateConfig(max_new_tokens=10)


@pytest.fixture(scope="module")
def decoder():
    return cases.decoder()


@pytest.fixture(scope="module")
def engine(tmp_path_factory, decoder):
    with cases.open_engine(tmp_path_factory.mktemp("models") / "store", decoder) as made:
        made.ingest([cases.fact(topic) for topic in ("pump", "crane", "tram")])
        made.ingest([cases.fact(topic, tenant="acme") for topic in ("pump", "mill")])
        yield made


@pytest.fixture
def own_engine(tmp_path, decoder):
    with cases.open_engine(tmp_path / "own", decoder) as made:
        made.ingest([cases.fact("pump")])
        yield made


@pytest.fixture
def retriever(engine) -> LLoCORetriever:
    return LLoCORetriever(engine=engine, k=2)


@pytest.fixture(params=[ChatLLoCO, LLoCOLLM])
def model(request, engine):
    return request.param(engine=engine, max_tokens=10)


@pytest.fixture
def cache():
    made = InMemoryCache()
    set_llm_cache(made)
    yield made
    set_llm_cache(None)


def text(answer) -> str:
    return answer if isinstance(answer, str) else answer.text


def prompt_of(documents, question: str = QUESTION) -> str:
    return f"{cases.format_docs(documents)}\n\nQuestion: {question}\nAnswer:"


def info_of(model, prompt, **options) -> dict:
    """What the answer to a prompt says of itself."""
    (generation,) = model.generate_prompt([model._convert_input(prompt)], **options).generations[0]
    message = getattr(generation, "message", None)
    return message.response_metadata if message is not None else generation.generation_info


class Events(BaseCallbackHandler):
    def __init__(self) -> None:
        self.seen: list[str] = []
        self.tokens: list[str] = []

    def on_chat_model_start(self, *_, **__):
        self.seen.append("start")

    def on_llm_start(self, *_, **__):
        self.seen.append("start")

    def on_llm_new_token(self, token, **_):
        self.tokens.append(token)

    def on_llm_end(self, *_, **__):
        self.seen.append("end")

    def on_llm_error(self, *_, **__):
        self.seen.append("error")


# -- one contract for both -------------------------------------------------------------------------------------------


def test_the_answer_is_the_engines_own_for_the_same_hits(engine, model, retriever):
    hits = engine.retrieve(QUESTION, top_k=2)
    own = engine.ask(QUESTION, hits=hits, generate=SHORT)
    documents = retriever.invoke(QUESTION)
    assert text(model.invoke(prompt_of(documents))) == own.text
    assert own.text != engine.ask(QUESTION, hits=[], generate=SHORT).text
    info = info_of(model, prompt_of(documents))
    assert [source["segment"] for source in info["lloco"]["sources"]] == [hit.segment_id for hit in hits]
    assert info["lloco"]["prompt_slots"] == own.usage.prompt_slots == sum(hit.slots for hit in hits)
    assert (info["model_name"], info["finish_reason"]) == ("tiny", own.finish)


def test_sources_resolve_to_verbatim_spans(engine, model, retriever):
    sources = info_of(model, prompt_of(retriever.invoke(QUESTION)))["lloco"]["sources"]
    assert sources
    for source in sources:
        whole = engine.store.document_text(source["doc_id"])
        start, end = source["span"]
        assert all(start <= left < right <= end for left, right in source["windows"])
        assert whole[slice(*source["windows"][0])].strip() in cases.story(source["title"], 3)


def test_pieces_come_before_the_end_and_join_to_the_whole(model, retriever, monkeypatch):
    prompt = prompt_of(retriever.invoke(QUESTION))
    whole = text(model.invoke(prompt))
    pieces = [text(piece) for piece in model.stream(prompt)]
    assert "".join(pieces) == whole
    assert len([piece for piece in pieces if piece]) > 2


async def test_async_pieces_join_to_the_whole_and_the_loop_stays_free(model, retriever):
    prompt = prompt_of(await retriever.ainvoke(QUESTION))
    ticks, done = 0, asyncio.Event()

    async def tick():
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    pieces = [text(piece) async for piece in model.astream(prompt)]
    whole = await model.ainvoke(prompt)
    done.set()
    await ticking
    assert "".join(pieces) == text(whole) == text(model.invoke(prompt))
    assert ticks > 20


def test_a_stream_resolves_its_handles_when_it_is_made(engine):
    handles = Handles(engine, clock=(times := iter([0.0, 1.0])).__next__, ttl=10)
    prompt = prompt_of(LLoCORetriever(engine=engine, k=1, handles=handles).invoke(QUESTION))
    model = LLoCOLLM(engine=engine, handles=handles, max_tokens=4)
    stream = model._stream(prompt)  # the clock is read here, and never again
    assert next(times, None) is None
    assert "".join(chunk.text for chunk in stream)
    assert handles.counts["resolved"] == 1


async def test_batches_answer_as_one_by_one(model, retriever):
    prompts = [prompt_of(retriever.invoke(question), question) for question in (QUESTION, "Where is the crane?", "Hm?")]
    single = [text(model.invoke(prompt)) for prompt in prompts]
    assert [text(answer) for answer in model.batch(prompts)] == single
    assert [text(answer) for answer in await model.abatch(prompts)] == single
    assert len(set(single)) > 1


async def test_one_pair_of_events_for_a_call(model, retriever):
    prompt = prompt_of(retriever.invoke(QUESTION))
    calls = [
        lambda c: model.invoke(prompt, c),
        lambda c: list(model.stream(prompt, c)),
        lambda c: model.batch([prompt], c),
    ]
    for call in calls:
        call({"callbacks": [events := Events()]})
        assert events.seen == ["start", "end"]
    await model.ainvoke(prompt, {"callbacks": [events := Events()]})
    assert events.seen == ["start", "end"]
    events = Events()
    streamed = [text(piece) async for piece in model.astream(prompt, {"callbacks": [events]})]
    assert events.seen == ["start", "end"]
    assert "".join(events.tokens) == "".join(streamed)
    with pytest.raises(ValueError, match="not 'tools'"):
        model.invoke(prompt, {"callbacks": [events := Events()]}, tools=[])
    assert events.seen == ["start", "error"]


def test_options_of_a_call_and_of_the_model(engine, model):
    long = text(model.invoke("Hi", max_tokens=30))
    assert len(long) > len(text(model.invoke("Hi")))
    stop = long[3:5]
    assert text(model.invoke("Hi", max_tokens=30, stop=[stop])) == long[: long.index(stop)]
    hot = model.bind(temperature=2.0, seed=1)
    assert text(hot.invoke("Hi")) == text(model.model_copy(update={"temperature": 2.0, "seed": 1}).invoke("Hi"))
    assert text(hot.invoke("Hi")) != text(model.bind(temperature=2.0, seed=2).invoke("Hi"))
    assert text(model.invoke("Hi", model="tiny"))
    with pytest.raises(ValueError, match="made with, 'tiny', not 'gpt'"):
        model.invoke("Hi", model="gpt")
    with pytest.raises(ValueError, match="temperature must not be negative"):
        type(model)(engine=engine, temperature=-1)
    with pytest.raises(ValueError, match="not 'colour'"):
        model.invoke("Hi", colour="red")
    made = model._settings(None, {"min_tokens": 3, "no_repeat_ngram": 2, "beams": 4})["generate"]
    found = (made.min_new_tokens, made.no_repeat_ngram, made.beams, made.max_new_tokens)
    assert found == (3, 2, 4, model.max_tokens)
    with pytest.raises(ConfigError, match="min_new_tokens must be from 0 to max_new_tokens"):
        model.invoke("Hi", min_tokens=10**6)
    for asked in (model.bind(adapter="law"), model.model_copy(update={"adapter": "law"})):
        with pytest.raises(AdapterError, match="'law' is none of them"):
            asked.invoke("Hi")
    named = model.with_config({"run_name": "mine", "tags": ["x"]})
    assert text(named.invoke("Hi")) == text(model.invoke("Hi"))


def test_a_model_takes_what_chat_models_take_and_shows_no_secret(engine):
    for kind in (ChatLLoCO, LLoCOLLM):
        made = kind(
            engine=engine,
            api_key="s3cret",
            temperature=0,
            max_tokens=5,
            timeout=9,
            stop=["x"],
            max_retries=1,
            streaming=True,
        )
        assert "s3cret" not in repr(made) + str(made.asdict())
        assert made._get_ls_params(model="other")["ls_model_name"] == "other"
        assert made._get_ls_params(stop=["y"])["ls_stop"] == ["y"]


def test_making_a_model_loads_nothing_and_is_fast(tmp_path):
    from lloco_engine.testing import HashingEmbedder, save_tiny_decoder

    folder = save_tiny_decoder(tmp_path / "decoder")
    with cases.open_engine(tmp_path / "store", str(folder), embedder=HashingEmbedder()) as engine:
        began = time.perf_counter()
        made = [kind(engine=engine) for _ in range(1000) for kind in (ChatLLoCO, LLoCOLLM)]
        assert time.perf_counter() - began < 5
        assert made[0].get_num_tokens("some text") > 0
        assert engine._resources._decoder is None


async def test_an_answer_that_takes_too_long_is_given_up(model, engine, monkeypatch):
    stream = engine.decoder.step

    def slow(*args, **kwargs):
        time.sleep(0.05)
        return stream(*args, **kwargs)

    monkeypatch.setattr(engine.decoder, "step", slow)
    for call in (lambda: model.invoke("Hi", timeout=0.1), lambda: list(model.stream("Hi", timeout=0.1))):
        with pytest.raises(TimeoutError, match=r"must be complete in 0\.1 seconds"):
            call()
    with pytest.raises(TimeoutError, match=r"must be complete in 0\.1 seconds"):
        await model.ainvoke("Hi", timeout=0.1)


def test_a_busy_store_is_tried_again(model, engine, monkeypatch):
    failures = [StoreLocked("busy"), StoreLocked("busy")]
    stream = engine.stream

    def busy(*args, **kwargs):
        if failures:
            raise failures.pop()
        return stream(*args, **kwargs)

    monkeypatch.setattr(engine, "stream", busy)
    assert text(model.invoke("Hi"))
    failures += [StoreLocked("busy")] * 3
    with pytest.raises(StoreLocked):
        model.model_copy(update={"max_retries": 0}).invoke("Hi")


def test_a_tenant_is_bound_on_the_model(model, retriever, engine, monkeypatch, caplog):
    spy = cases.Spy(monkeypatch, engine)
    mine, other = prompt_of(retriever.invoke(QUESTION)), model.for_scope("acme")
    other.invoke(mine)
    assert spy.segments == []
    assert "worth nothing (wrong_scope)" in caplog.text
    theirs = prompt_of(LLoCORetriever(engine=engine, tenant="acme", k=1).invoke(QUESTION))
    other.invoke(theirs)
    assert [hit.tenant for hit in spy.last[1]["hits"]] == ["acme"]
    model.invoke(theirs)
    assert spy.segments == []
    with pytest.raises(ValueError, match="not 'tenant'"):
        model.invoke(theirs, tenant="acme")


def test_tokens_are_counted_offline_and_handles_count_their_slots(model, engine, retriever):
    documents = retriever.invoke(QUESTION)
    slots = sum(hit.slots for hit in engine.retrieve(QUESTION, top_k=2))
    assert model.get_num_tokens("A pump.") == len(engine.token_ids("A pump."))
    assert model.get_num_tokens(cases.format_docs(documents)) == slots + len(engine.token_ids("\n\n"))
    assert model.get_num_tokens(documents[0].page_content * 2) == model.get_num_tokens(documents[0].page_content)
    assert type(model)(engine=engine, custom_get_token_ids=lambda text: [1, 2]).get_num_tokens("x") == 2


def test_a_part_of_a_handle_raises(model, retriever):
    handle = retriever.invoke(QUESTION)[0].page_content
    with pytest.raises(HandleFragment, match="must reach the model whole"):
        model.invoke(f"{handle[:20]} {QUESTION}")


@pytest.mark.parametrize("kind", [ChatLLoCO, LLoCOLLM])
def test_a_segment_that_is_gone_follows_on_missing(own_engine, kind, monkeypatch):
    retriever = LLoCORetriever(engine=own_engine, k=1)
    before = prompt_of(retriever.invoke(QUESTION))
    own_engine.ingest([Document("pump.md", "The pump was sold.")])
    spy = cases.Spy(monkeypatch, own_engine)
    kind(engine=own_engine, max_tokens=3).invoke(before)
    assert (spy.segments, spy.last[1]["context"]) == ([], cases.story("pump"))
    with pytest.raises(SegmentUnavailable, match="replaced or deleted since"):
        kind(engine=own_engine, on_missing="error").invoke(before)


# -- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ChatLLoCO, LLoCOLLM])
async def test_the_global_cache_keys_on_segments_and_their_versions(own_engine, kind, cache, monkeypatch):
    spy = cases.Spy(monkeypatch, own_engine)
    model, retriever = kind(engine=own_engine, max_tokens=6), LLoCORetriever(engine=own_engine, k=1)

    def ask(**options):
        return text(model.invoke(prompt_of(retriever.invoke(QUESTION)), **options))

    first = ask()
    assert (ask(), len(spy.asked)) == (first, 1)  # new handles, the same segment
    assert (text(await model.ainvoke(prompt_of(retriever.invoke(QUESTION)))), len(spy.asked)) == (first, 1)
    ask(max_tokens=2)
    assert len(spy.asked) == 2
    own_engine.ingest([Document("pump.md", "The pump was sold to a mill.")])
    ask()
    assert len(spy.asked) == 3
    own_engine.ingest([Document("pump.md", cases.story("pump"))])  # the first text again, as another version
    ask()
    assert len(spy.asked) == 4
    model.invoke(prompt_of(retriever.invoke(QUESTION), "Who sold it?"))
    model.for_scope("acme").invoke(prompt_of([]))
    model.invoke(prompt_of([]))
    assert len(spy.asked) == 7
    assert cases.story("pump") not in str(cache._cache.keys())


def test_a_prompt_that_looks_like_another_ones_key_does_not_get_its_answer(own_engine, cache, monkeypatch):
    spy = cases.Spy(monkeypatch, own_engine)
    model, retriever = LLoCOLLM(engine=own_engine, max_tokens=4), LLoCORetriever(engine=own_engine, k=1)
    model.invoke(prompt_of(retriever.invoke(QUESTION)))
    ((key, _),) = cache._cache
    model.invoke(key)
    assert len(spy.asked) == 2
    assert spy.segments == []


# -- the chat model --------------------------------------------------------------------------------------------------


def test_usage_adds_up_once(engine, retriever):
    chat = ChatLLoCO(engine=engine, max_tokens=8)
    prompt = prompt_of(retriever.invoke(QUESTION))
    own = engine.ask(QUESTION, hits=engine.retrieve(QUESTION, top_k=2), generate=GenerateConfig(max_new_tokens=8)).usage
    with get_usage_metadata_callback() as counted:
        message = chat.invoke(prompt)
        chunks = list(chat.stream(prompt))
    usage = message.usage_metadata
    assert usage["input_tokens"] == own.template_tokens + own.prompt_tokens + own.prompt_slots
    assert usage["output_tokens"] == own.completion_tokens
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["input_token_details"] == {"cache_read": own.template_tokens + own.prompt_slots}
    assert [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata] == [usage]
    assert counted.usage_metadata["tiny"]["total_tokens"] == 2 * usage["total_tokens"]
    chat.invoke(prompt, {"callbacks": [events := Events()]}, stream=True)
    assert "".join(events.tokens) == message.text


def test_the_language_models_usage_adds_up_once(engine, retriever):
    model = LLoCOLLM(engine=engine, max_tokens=8)
    prompts = [prompt_of(retriever.invoke(QUESTION)), "Hi"]
    result = model.generate(prompts)
    single = [generation[0].generation_info["token_usage"] for generation in result.generations]
    summed = {name: sum(one[name] for one in single) for name in single[0]}
    assert result.llm_output == {"token_usage": summed, "model_name": "tiny"}


def test_blocks_name_memory_without_text(engine, retriever, monkeypatch):
    spy = cases.Spy(monkeypatch, engine)
    documents = retriever.invoke(QUESTION)
    annotated = LLoCORetriever(engine=engine, k=2, annotate=True).invoke(QUESTION)
    expected = [hit.segment_id for hit in engine.retrieve(QUESTION, top_k=2)]
    for these in (documents, annotated):
        blocks = [handle_block(one) for one in these]
        ChatLLoCO(engine=engine, max_tokens=3).invoke([HumanMessage([*blocks, {"type": "text", "text": QUESTION}])])
        assert spy.segments == expected
        assert cases.story("pump") not in spy.text
    with pytest.raises(ValueError, match="this one holds text"):
        handle_block(PlainDocument(page_content="plain"))
    with pytest.raises(ValueError, match="block of type 'image'"):
        ChatLLoCO(engine=engine).invoke([HumanMessage([{"type": "image", "url": "http://x/y.png"}])])


def test_a_conversation_becomes_turns_and_old_handles_are_inert(engine, retriever, monkeypatch):
    spy = cases.Spy(monkeypatch, engine)
    old, new, said = (retriever.invoke(topic, k=1)[0].page_content for topic in ("crane", "pump", "tram"))
    ChatLLoCO(engine=engine, max_tokens=3).invoke(
        [
            SystemMessage("Be brief."),
            HumanMessage(f"{old} Where is the crane?"),
            AIMessage(f"In the hall. {said}"),
            ToolMessage(old, tool_call_id="1"),
            HumanMessage(new),
            ChatMessage(role="human", content="And the pump?"),
        ]
    )
    assert [hit.doc_id for hit in spy.last[1]["hits"]] == ["pump.md"]
    assert [turn.role for turn in spy.last[1]["history"]] == ["user", "assistant"]
    assert "[[LLC" not in spy.text
    assert "Be brief." in spy.last[1]["context"]
    assert spy.last[0].endswith("And the pump?")


@pytest.mark.parametrize(
    "messages", [[], [AIMessage("Hello")], [HumanMessage("Hi"), AIMessage("Hello")], [HumanMessage(" ")]]
)
def test_there_must_be_something_to_answer(engine, messages):
    with pytest.raises(ValueError, match="last message must be a text to answer"):
        ChatLLoCO(engine=engine).invoke(messages)


def test_a_chains_own_prompt_can_be_named(engine, retriever, monkeypatch):
    spy = cases.Spy(monkeypatch, engine)
    documents = {"context": cases.format_docs(retriever.invoke(QUESTION)), "input": QUESTION}
    chat = ChatPromptTemplate.from_messages(
        [("system", "Only from this:\n{context}\nNothing else."), ("human", "{input}")]
    )
    plain = PromptTemplate.from_template("Read {context} and say: {question}?")
    ChatLLoCO(engine=engine, prompt=chat, max_tokens=3).invoke(chat.invoke(documents))
    assert (spy.last[0], spy.last[1]["context"], spy.last[1]["verbatim"]) == (QUESTION, "", False)
    ChatLLoCO(engine=engine, max_tokens=3).invoke(chat.invoke(documents))
    assert (spy.last[0], spy.last[1]["context"]) == (QUESTION, "Only from this:\n(the text above)\nNothing else.")
    asked = plain.invoke({"context": documents["context"], "question": "Where"})
    LLoCOLLM(engine=engine, prompt=plain, max_tokens=3).invoke(asked)
    assert (spy.last[0], spy.last[1]["verbatim"]) == ("Where", False)
    LLoCOLLM(engine=engine, max_tokens=3).invoke(asked)
    assert (spy.last[0], spy.last[1]["verbatim"]) == ("Read (the text above) and say: Where?", True)
    for bad, why in [
        (PromptTemplate.from_template("{a}"), "must have a slot"),
        (PromptTemplate.from_template("{{question}} {{context}}", template_format="mustache"), "not in mustache"),
    ]:
        with pytest.raises(ValueError, match=why):
            LLoCOLLM(engine=engine, prompt=bad)


def test_models_are_shared_by_threads(engine, retriever):
    chat = ChatLLoCO(engine=engine, max_tokens=4)
    questions = [f"Where is the {topic}?" for topic in ("pump", "crane", "tram")] * 4
    single = [chat.invoke(prompt_of(retriever.invoke(question), question)).text for question in questions]

    def ask(question: str) -> str:
        return chat.invoke(prompt_of(retriever.invoke(question), question)).text

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, questions)) == single
