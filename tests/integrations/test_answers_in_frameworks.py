"""What an answer stands on, as the classes of LangChain and LlamaIndex say it and are told it."""

from __future__ import annotations

import pytest
from integration_cases import TENANTS, documents, open_engine, story
from langchain_classic.chains.history_aware_retriever import create_history_aware_retriever
from langchain_classic.retrievers import EnsembleRetriever
from langchain_classic.retrievers.multi_query import MultiQueryRetriever
from langchain_core.documents import Document as LangDocument
from langchain_core.language_models import FakeListLLM
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from llama_cases import chat_memory
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.chat_engine import CondensePlusContextChatEngine
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode

from lloco_engine import Document, StoreLocked
from lloco_engine.decoder.local import LocalDecoder
from lloco_engine.relevance import NOTHING
from lloco_engine.testing import tiny_decoder, tiny_tokenizer
from lloco_integrations import langchain as lc
from lloco_integrations import llama_index as li
from lloco_integrations.handles import Handles
from lloco_integrations.prompt_parser import Message
from lloco_integrations.session import Session

QUESTION = "Where does the pump 2 of red stand?"
NEVER = "Explain photosynthesis."


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    decoder = LocalDecoder(tiny_decoder(max_position_embeddings=8192), tiny_tokenizer(), "tiny")
    with open_engine(tmp_path_factory.mktemp("answers") / "store", decoder) as made:
        for tenant in TENANTS:
            made.ingest(documents(tenant))
        yield made


def prompt(engine, *topics: str, handles: Handles | None = None) -> str:
    hits = [engine.store.chunks(f"{topic}.md", "red")[0] for topic in topics]
    return (handles or Handles.of(engine)).mint(hits) + "\n\nQuestion: Where?\nAnswer:"


# -- handles that stand for nothing ----------------------------------------------------------------------------------


@pytest.fixture
def lossy(engine) -> str:
    """A prompt of four handles: one good, two of other processes, one cut."""
    old = Handles(engine)
    text = Handles(engine, key=b"k" * 32).mint([engine.store.chunks("kettle.md", "red")[0]])
    return "\n\n".join([prompt(engine, "crane", handles=old), text, "[[LLC:abcdef01", prompt(engine, "pump")])


def test_every_langchain_answer_says_how_many_were_lost(engine, lossy):
    chat = lc.ChatLLoCO(engine=engine, tenant="red", max_tokens=4)
    message = chat.invoke(lossy)
    (warning,) = message.response_metadata["lloco"]["warnings"]
    assert warning.startswith("3 of 4 handles") and "(1 cut, 2 unknown)" in warning
    *_, last = chat.stream(lossy)
    assert last.response_metadata["lloco"]["warnings"] == [warning]
    llm = lc.LLoCOLLM(engine=engine, tenant="red", max_tokens=4)
    assert llm.generate([lossy]).generations[0][0].generation_info["lloco"]["warnings"] == [warning]
    assert chat.invoke(prompt(engine, "pump")).response_metadata["lloco"]["warnings"] == []


@pytest.mark.asyncio
async def test_every_llama_index_answer_says_how_many_were_lost(engine, lossy):
    llm = li.LLoCOLLM(engine, tenant="red", max_tokens=4)
    asked = [ChatMessage(role=MessageRole.USER, content=lossy)]
    answers = [llm.complete(lossy), llm.chat(asked), await llm.acomplete(lossy), await llm.achat(asked)]
    answers += [[*llm.stream_complete(lossy)][-1], [*llm.stream_chat(asked)][-1]]
    for answer in answers:
        (warning,) = answer.raw["warnings"]
        assert warning.startswith("3 of 4 handles") and answer.additional_kwargs["warnings"] == [warning]
        assert answer.raw["doc_ids"] == ["pump.md"]


def test_an_expired_handle_is_told_from_an_unknown_one(engine):
    now = [0.0]
    handles = Handles(engine, ttl=10, clock=lambda: now[0])
    text = prompt(engine, "pump", "crane", handles=handles)
    now[0] = 11.0
    resolved = handles.resolve([text, "[[LLC:" + "0" * 32 + "]]"], "red")
    assert resolved.lost == {"expired": 2, "unknown": 1} and not resolved.hits


def test_a_document_that_went_is_named_and_never_stops_an_answer(engine):
    for handles in (Handles(engine), Handles(engine, key=b"k" * 32)):
        engine.ingest([Document("gone.md", story("gone"), tenant="red")])
        text = prompt(engine, "gone", "pump", handles=handles)
        engine.delete("gone.md", "red")
        answer = lc.ChatLLoCO(engine=engine, tenant="red", handles=handles, max_tokens=4).invoke(text)
        about = answer.response_metadata["lloco"]
        assert [source["doc_id"] for source in about["sources"]] == ["pump.md"]
        assert about["warnings"][0].startswith("1 retrieved segments are of documents that were replaced or deleted")


# -- one chunk, one identity -----------------------------------------------------------------------------------------


def test_a_signed_handle_is_of_the_document_it_was_minted_for(engine):
    engine.ingest([Document("twin.md", story("pump"), source="twin", tenant="red")])
    handles = Handles(engine, key=b"k" * 32)
    (twin,) = engine.retrieve(QUESTION, top_k=1, filters={"doc_id": "twin.md"}, tenant="red")
    (read,) = handles.resolve([handles.mint([twin])], "red").hits
    assert read.doc_id == "twin.md" and read.score == pytest.approx(twin.score, abs=1e-3)
    (other,) = engine.retrieve(QUESTION, top_k=1, filters={"doc_id": "pump.md"}, tenant="red")
    (both,) = handles.resolve([handles.mint([twin, other])], "red").hits
    assert (both.doc_id, both.also_in) == ("twin.md", ("pump.md",)), "read once, both are named"
    node = TextNode(text=story("pump"), metadata={"file": "twin"})
    (shown,) = li.LLoCONodePostprocessor(engine, tenant="red").postprocess_nodes([NodeWithScore(node=node)])
    raw = li.LLoCOLLM(engine, tenant="red", max_tokens=4).complete(shown.node.get_content(MetadataMode.LLM)).raw
    assert raw["doc_ids"] == ["twin.md"]
    engine.delete("twin.md", "red")


def test_a_question_gets_the_same_handle_for_a_chunk_while_it_lives(engine):
    now = [0.0]
    for key in (None, b"k" * 32):
        handles = Handles(engine, ttl=10, key=key, clock=lambda: now[0])
        pump, crane = (engine.store.chunks(f"{topic}.md", "red")[0] for topic in ("pump", "crane"))
        first = handles.mint([pump, crane], "q")
        assert handles.mint([pump, crane], "q") == first != handles.mint([crane, pump], "q")
        now[0] += 4
        assert handles.mint([pump, crane], "q") == first
        now[0] += 2
        assert handles.mint([pump, crane], "q") != first and len(handles.resolve([first], "red").hits) == 2
        again = handles.mint([pump], "q")
        handles.revoke("red")
        assert handles.mint([pump], "q") != again
    handles = Handles(engine)
    assert len({handles.mint([pump], "q"), handles.mint([pump], "r"), handles.mint([pump]), handles.mint([pump])}) == 4


@pytest.mark.parametrize("annotate", [False, True])
def test_langchains_fusions_see_a_chunk_once(engine, annotate):
    def retriever(**more):
        return lc.LLoCORetriever(engine=engine, tenant="red", annotate=annotate, **more)

    fused = EnsembleRetriever(retrievers=[retriever(k=3), retriever(k=4, lexical=0.1)]).invoke(QUESTION)
    assert len({document.id for document in fused}) == len(fused) >= 4
    llm = FakeListLLM(responses=["pump 2 in its hall\nhall of the pump\nthe red pump"])
    many = MultiQueryRetriever.from_llm(retriever=retriever(k=3), llm=llm).invoke(QUESTION)
    assert len({document.id for document in many}) == len(many) < 12
    by_key = EnsembleRetriever(retrievers=[retriever(), retriever()], id_key="lloco_segments")
    assert annotate or len(by_key.invoke(QUESTION)) == 4
    assert len({*retriever().invoke(QUESTION), *retriever().invoke("the pump")}) <= 6, "they can be hashed"


def test_documents_compare_by_chunk_and_keep_their_text_but_in_json(engine):
    retriever = lc.LLoCORetriever(engine=engine, tenant="red", k=2)
    first, other = retriever.invoke(QUESTION)
    again = next(one for one in retriever.invoke("the pump 2") if one.id == first.id)
    assert first == again and first != other and first.id == "pump.md#0" and hash(first) == hash(again)
    assert first != LangDocument(page_content=first.page_content, metadata=first.metadata, id=first.id)
    assert story("pump") not in first.model_dump_json() + repr(first) + str(first.model_dump(mode="json"))
    kept = JsonPlusSerializer(allowed_msgpack_modules=[(type(first).__module__, "LLoCODocument")])
    assert kept.loads_typed(kept.dumps_typed(first)).text == first.model_dump()["text"] == story("pump")


def test_llama_indexs_fusion_sees_a_chunk_once(engine):
    llm = MockLLM()
    retriever = li.LLoCORetriever(engine, top_k=3, tenant="red")
    fusion = QueryFusionRetriever([retriever], llm=llm, num_queries=1, use_async=False, similarity_top_k=9)
    questions = [QUESTION, "the pump 2 of red", "pump"]
    results = {(question, 0): retriever.retrieve(question) for question in questions}
    nodes = fusion._reciprocal_rerank_fusion(results)
    assert len({scored.node.ref_doc_id for scored in nodes}) == len(nodes) < 9
    one, two = (retriever.retrieve(question)[0].node for question in questions[:2])
    assert one.ref_doc_id == two.ref_doc_id and one.hash == two.hash


# -- scores, floors, settings ----------------------------------------------------------------------------------------


def test_scores_are_cut_everywhere(engine):
    every = engine.retrieve(QUESTION, top_k=6, tenant="red")
    least = (every[0].score + every[1].score) / 2
    assert len(lc.LLoCORetriever(engine=engine, tenant="red", min_score=least).invoke(QUESTION)) == 1
    assert len(lc.LLoCORetriever(engine=engine, tenant="red").invoke(QUESTION, min_score=least)) == 1
    store = lc.LLoCOVectorStore(engine, tenant="red")
    assert len(store.as_retriever(search_kwargs={"min_score": least}).invoke(QUESTION)) == 1
    found = lc.LLoCORetriever(engine=engine, tenant="red", annotate=True).invoke(QUESTION)
    compressor = lc.LLoCODocumentCompressor(engine=engine, tenant="red", min_score=least)
    assert [each.metadata["lloco_doc_id"] for each in compressor.compress_documents(found, QUESTION)] == ["pump.md"]
    nodes = li.LLoCORetriever(engine, tenant="red", min_score=least).retrieve(QUESTION)
    assert [node.node.ref_doc_id for node in nodes] == ["pump.md"]
    nodes = li.LLoCORetriever(engine, tenant="red").retrieve(QUESTION)
    post = li.LLoCONodePostprocessor(engine, tenant="red", min_score=least)
    assert len(post.postprocess_nodes(nodes)) == 1 and len(nodes) == 4
    assert len(post.postprocess_nodes([NodeWithScore(node=TextNode(text="x"))])) == 1, "one without a score stays"


def test_an_irrelevant_answer_warns_or_refuses(engine, monkeypatch):
    retriever = lc.LLoCORetriever(engine=engine, tenant="red", floor=0.3)
    found = retriever.invoke(NEVER)
    assert "no document seems to answer" in found[0].metadata["lloco_warning"]
    assert "lloco_warning" not in retriever.invoke(QUESTION)[0].metadata
    text = "\n\n".join(document.page_content for document in found) + f"\n\nQuestion: {NEVER}\nAnswer:"
    told = lc.ChatLLoCO(engine=engine, tenant="red", floor=0.3, max_tokens=4).invoke(text).response_metadata["lloco"]
    assert "no document seems to answer" in told["warnings"][0] and told["sources"]
    nodes = li.LLoCORetriever(engine, tenant="red", floor=0.3)
    queries = RetrieverQueryEngine.from_args(nodes, llm=li.LLoCOLLM(engine, tenant="red", floor=0.3, max_tokens=4))
    assert all("no document seems" in known["lloco_warning"] for known in queries.query(NEVER).metadata.values())
    monkeypatch.setattr(type(engine.decoder), "stream", None)
    refusing = li.LLoCOLLM(engine, tenant="red", floor=0.3, when_nothing="refuse")
    engine_of_index = RetrieverQueryEngine.from_args(nodes, llm=refusing)
    assert str(engine_of_index.query(NEVER)) == NOTHING


def test_hints_are_off_unless_they_are_named_and_an_answer_says_which_were_on(engine):
    found = Handles.of(engine).mint(engine.retrieve("Where does the pump stand?", top_k=1, tenant="red"))
    text, both = f"{found}\n\nQuestion: Where does the pump stand?", ["spelling", "pointing"]
    chat, llm = (kind(engine=engine, tenant="red", max_tokens=2) for kind in (lc.ChatLLoCO, lc.LLoCOLLM))
    index = li.LLoCOLLM(engine, tenant="red", max_tokens=2)

    def told(result):
        return result.generations[0][0].generation_info["lloco"]["hints"]

    assert chat.invoke(text).response_metadata["lloco"]["hints"] == told(llm.generate([text])) == []
    assert index.complete(text).raw["hints"] == []
    assert chat.invoke(text, hints=both).response_metadata["lloco"]["hints"] == both
    assert told(llm.generate([text], hints="spelling,pointing")) == both
    assert index.complete(text, hints=("pointing",)).raw["hints"] == ["pointing"]
    named = {"hints": tuple(both), "spelling": 0, "max_tokens": 2, "tenant": "red"}
    assert lc.ChatLLoCO(engine=engine, **named).invoke(text).response_metadata["lloco"]["hints"] == ["pointing"]
    assert li.LLoCOLLM(engine, **named).complete(text).raw["hints"] == ["pointing"]


@pytest.mark.asyncio
async def test_a_locked_store_is_tried_again_in_every_way_of_asking(engine, monkeypatch):
    monkeypatch.setattr("lloco_integrations.session.time.sleep", lambda _: None)
    real, left = engine.stream, [0]

    def locked(*args, **options):
        if left[0]:
            left[0] -= 1
            raise StoreLocked("another process writes")
        return real(*args, **options)

    monkeypatch.setattr(engine, "stream", locked)
    text = prompt(engine, "pump")
    chat = lc.ChatLLoCO(engine=engine, tenant="red", max_tokens=2)
    llm = li.LLoCOLLM(engine, tenant="red", max_tokens=2)
    session = Session(engine, retries=1)
    left[0] = 2
    assert (await chat.ainvoke(text)).content is not None and left == [0]
    left[0] = 2
    assert chat.invoke(text).content is not None and left == [0]
    left[0] = 2
    assert (await llm.acomplete(text)).text is not None and left == [0]
    left[0] = 2
    with pytest.raises(StoreLocked):
        session.start(session.read([Message("user", text)], "red"))


# -- conversations ---------------------------------------------------------------------------------------------------

SAID = [HumanMessage("Where is the ladder of red?"), AIMessage("In hall 3.")]


@pytest.fixture
def searched(engine, monkeypatch) -> list[str]:
    """The texts that the store is searched for."""
    texts: list[str] = []
    real = engine.store.search
    monkeypatch.setattr(engine.store, "search", lambda *a, **o: texts.append(o["question"]) or real(*a, **o))
    return texts


def test_a_langchain_follow_up_is_searched_with_what_was_said(engine, searched):
    retriever = lc.LLoCORetriever(engine=engine, tenant="red", k=1)
    (document,) = retriever.invoke("And number 4?", history=SAID)
    assert document.metadata["lloco_doc_id"] == "ladder.md"
    assert searched == ["Where is the ladder of red?\nAnd number 4?", "And number 4?"]
    store = lc.LLoCOVectorStore(engine, tenant="red").as_retriever(search_kwargs={"k": 1})
    assert store.invoke("And number 4?", history=SAID) == [document]


def test_a_condensed_question_is_searched_once(engine, searched):
    told = ChatPromptTemplate.from_messages([MessagesPlaceholder("chat_history"), ("human", "{input}")])
    condense = FakeListLLM(responses=["Where is the ladder 4 of red?"])
    aware = create_history_aware_retriever(condense, lc.LLoCORetriever(engine=engine, tenant="red"), told)
    assert aware.invoke({"input": "And number 4?", "chat_history": SAID})
    assert searched == ["Where is the ladder 4 of red?"]
    searched.clear()
    retriever, llm = li.LLoCORetriever(engine, tenant="red"), li.LLoCOLLM(engine, tenant="red", max_tokens=2)
    chat = CondensePlusContextChatEngine.from_defaults(retriever=retriever, llm=llm, memory=chat_memory())
    history = [ChatMessage(role="user", content=SAID[0].content), ChatMessage(role="assistant", content="In hall 3.")]
    chat.chat("And number 4?", chat_history=history)
    assert len(searched) == 1 and "ladder" not in searched[0], "what the condenser said, and nothing else"


def test_a_llama_index_follow_up_is_searched_with_what_was_said(engine, searched):
    history = [ChatMessage(role="user", content=SAID[0].content), ChatMessage(role="assistant", content="In hall 3.")]
    (scored,) = li.LLoCORetriever(engine, top_k=1, tenant="red").with_history(history).retrieve("And number 4?")
    assert scored.node.ref_doc_id == "ladder.md"
    assert searched == ["Where is the ladder of red?\nAnd number 4?", "And number 4?"]
    searched.clear()
    llm = li.LLoCOLLM(engine, tenant="red", max_tokens=2)
    chat = li.LLoCOContextChatEngine.from_defaults(
        retriever=li.LLoCORetriever(engine, tenant="red"),
        llm=llm,
        memory=chat_memory(),
    )
    chat.chat(SAID[0].content)
    chat.chat("And number 4?")
    assert searched[0] == SAID[0].content and searched[1:] == [f"{SAID[0].content}\nAnd number 4?", "And number 4?"]
