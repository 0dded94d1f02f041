"""Chains from LangChain's own documentation, with LLoCO's classes in their places."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Annotated, TypedDict

import langchain_cases as cases
import pytest
from langchain_classic.chains import create_history_aware_retriever, create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_classic.retrievers.document_compressors import CrossEncoderReranker, DocumentCompressorPipeline
from langchain_classic.retrievers.document_compressors.cross_encoder import BaseCrossEncoder
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage, trim_messages
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_core.tools import create_retriever_tool
from langchain_core.vectorstores import InMemoryVectorStore

from lloco_engine import GenerateConfig, SegmentUnavailable
from lloco_integrations.langchain import (
    ChatLLoCO,
    EngineEmbeddings,
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
SHORT = GenerateConfig(max_new_tokens=6)
SYSTEM = (
    "You are an assistant for question-answering tasks. Use the following pieces of retrieved context to answer the "
    "question. If you don't know the answer, say that you don't know. Use three sentences maximum and keep the answer "
    "concise.\n\n{context}"
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with cases.open_engine(tmp_path_factory.mktemp("chains") / "store", cases.decoder()) as made:
        made.ingest([cases.fact(topic) for topic in TOPICS])
        yield made


@pytest.fixture
def spy(engine, monkeypatch) -> cases.Spy:
    return cases.Spy(monkeypatch, engine)


@pytest.fixture
def chat(engine) -> ChatLLoCO:
    return ChatLLoCO(engine=engine, max_tokens=6)


@pytest.fixture
def retriever(engine) -> LLoCORetriever:
    return LLoCORetriever(engine=engine, k=2)


@pytest.fixture
def expected(engine) -> list[str]:
    return [hit.segment_id for hit in engine.retrieve(QUESTION, top_k=2)]


def own_answer(engine, question: str = QUESTION, k: int = 2) -> str:
    return engine.ask(question, hits=engine.retrieve(question, top_k=k), generate=SHORT).text


def holds_no_document(text: str) -> bool:
    return not any(f"The {topic} number" in text for topic in TOPICS)


# -- LCEL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ChatLLoCO, LLoCOLLM])
async def test_lcel_with_format_docs(engine, spy, retriever, expected, kind):
    prompt = PromptTemplate.from_template(
        "You are an assistant for question-answering tasks. Use the following pieces of retrieved context to answer "
        "the question. If you don't know the answer, just say that you don't know. Use three sentences maximum and "
        "keep the answer concise.\nQuestion: {question} \nContext: {context} \nAnswer:"
    )
    start = {"context": retriever | cases.format_docs, "question": RunnablePassthrough()}
    chain = start | prompt | kind(engine=engine, max_tokens=6) | StrOutputParser()
    answers = [chain.invoke(QUESTION), "".join(chain.stream(QUESTION)), await chain.ainvoke(QUESTION)]
    answers += ["".join([piece async for piece in chain.astream(QUESTION)]), *chain.batch([QUESTION])]
    assert set(answers) == {own_answer(engine)}
    for question, options in spy.asked[:5]:
        assert question == QUESTION
        assert [hit.segment_id for hit in options["hits"]] == expected
    assert holds_no_document(spy.text)


# -- chains of langchain_classic -------------------------------------------------------------------------------------


def retrieval_chain(chat, retriever, system: str = SYSTEM, **options):
    prompt = ChatPromptTemplate.from_messages([("system", system), ("human", "{input}")])
    return create_retrieval_chain(retriever, create_stuff_documents_chain(chat, prompt, **options))


async def test_create_retrieval_chain(engine, spy, chat, retriever, expected):
    chain = retrieval_chain(chat, retriever)
    result = chain.invoke({"input": QUESTION})
    assert result["answer"] == own_answer(engine)
    assert [document.text for document in result["context"]] == [hit.text for hit in engine.retrieve(QUESTION, top_k=2)]
    assert spy.asked[0][1]["hits"] and [hit.segment_id for hit in spy.asked[0][1]["hits"]] == expected
    streamed = [chunk["answer"] for chunk in chain.stream({"input": QUESTION}) if "answer" in chunk]
    assert "".join(streamed) == result["answer"]
    assert (await chain.ainvoke({"input": QUESTION}))["answer"] == result["answer"]


def test_create_stuff_documents_chain_keeps_an_unknown_prompts_words(spy, chat, retriever, expected):
    prompt = ChatPromptTemplate.from_template("Write a haiku about:\n\n{context}")
    chain = create_stuff_documents_chain(chat, prompt, document_separator="\n---\n")
    chain.invoke({"context": retriever.invoke(QUESTION)})
    question, options = spy.last
    assert spy.segments == expected
    assert options["verbatim"] and question.startswith("Write a haiku about:\n\n(the text above)")
    assert holds_no_document(spy.text)


def test_annotated_documents_go_through_a_document_prompt(engine, spy, chat, expected):
    retriever = LLoCORetriever(engine=engine, k=2, annotate=True)
    chain = retrieval_chain(chat, retriever, document_prompt=PromptTemplate.from_template("{lloco_handle}"))
    result = chain.invoke({"input": QUESTION})
    assert result["context"][0].page_content == cases.story("pump")
    assert spy.segments == expected
    assert holds_no_document(spy.text)


def test_create_history_aware_retriever(engine, spy, chat, retriever, expected):
    again = ChatPromptTemplate.from_messages(
        [MessagesPlaceholder("chat_history"), ("human", "{input}"), ("human", "Make a search query of this.")]
    )
    aware = create_history_aware_retriever(chat, retriever, again)
    assert aware.invoke({"input": QUESTION})[0].metadata["lloco_segments"] == expected[:1]  # no history: as it is
    history = [HumanMessage("Hello"), AIMessage("Hi")]
    assert len(aware.invoke({"input": QUESTION, "chat_history": history})) == 2
    assert spy.last[0].endswith("Make a search query of this.")
    assert [turn.text for turn in spy.last[1]["history"]] == ["Hello", "Hi"]


# -- other vector stores ---------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(engine) -> InMemoryVectorStore:
    """A vector store of another make, with the same chunks and one that the engine does not know."""
    made = InMemoryVectorStore(EngineEmbeddings(engine))
    known = [Document(page_content=cases.story(topic), metadata={"n": n}) for n, topic in enumerate(TOPICS)]
    made.add_documents([*known, Document(page_content="The pump house is empty [[LLC:", metadata={"n": 9})])
    return made


def test_contextual_compression_retriever(engine, spy, chat, foreign):
    compressor = LLoCODocumentCompressor(engine=engine)
    retriever = ContextualCompressionRetriever(
        base_retriever=foreign.as_retriever(search_kwargs={"k": 5}), base_compressor=compressor
    )
    documents = retriever.invoke(QUESTION)
    known = [document for document in documents if isinstance(document, LLoCODocument)]
    (unknown,) = (document for document in documents if not isinstance(document, LLoCODocument))
    assert len(known) == 4
    assert {document.metadata["n"] for document in known} == {0, 1, 2, 3}
    assert unknown.page_content == "The pump house is empty (LLC:"
    retrieval_chain(chat, retriever).invoke({"input": QUESTION})
    assert len(spy.segments) == 4
    assert (spy.last[0], spy.last[1]["context"]) == (QUESTION, "The pump house is empty (LLC:")
    claimed = Document(page_content="Some text.", metadata={"lloco_handle": f"[[LLC:{'a' * 32}]]"})
    with pytest.raises(SegmentUnavailable, match="every chunk must have a segment"):
        LLoCODocumentCompressor(engine=engine, on_missing="error").compress_documents([claimed], QUESTION)
    again = compressor.compress_documents(documents, QUESTION)
    assert again == [*documents]


async def test_a_text_that_is_not_known_follows_on_missing(engine):
    unknown = Document(page_content="A text of no store.", metadata={"a": 1})
    with pytest.raises(SegmentUnavailable, match="every chunk must have a segment"):
        LLoCODocumentCompressor(engine=engine, on_missing="error").compress_documents([unknown], QUESTION)
    compressor = LLoCODocumentCompressor(engine=engine, on_missing="compress", tenant="else")
    (made,) = await compressor.acompress_documents([unknown], QUESTION)
    assert (made.text, made.metadata["a"], made.page_content[:6]) == ("A text of no store.", 1, "[[LLC:")
    assert [info.tenant for info in engine.documents("else")] == ["else"]


class WordsInCommon(BaseCrossEncoder):
    """A reranker without a model, which must see real text."""

    def score(self, text_pairs):
        assert all(text.startswith("The ") for _, text in text_pairs)
        return [len(set(question.split()) & set(text.split())) for question, text in text_pairs]


async def test_a_pipeline_ranks_real_text_and_ends_in_handles(engine, spy, chat, foreign):
    pipeline = DocumentCompressorPipeline(
        transformers=[
            CrossEncoderReranker(model=WordsInCommon(), top_n=2),
            LLoCODocumentCompressor(engine=engine),
        ]
    )
    retriever = ContextualCompressionRetriever(
        base_retriever=foreign.as_retriever(search_kwargs={"k": 5}), base_compressor=pipeline
    )
    documents = await retriever.ainvoke("crane number hall")
    assert len(documents) == 2
    assert documents[0].text == cases.story("crane")
    retrieval_chain(chat, retriever).invoke({"input": "crane number hall"})
    assert spy.last[1]["hits"][0].doc_id == "crane.md"


async def test_a_vector_store_as_a_retriever(engine, spy, chat, expected):
    store = LLoCOVectorStore(engine)
    for options in (
        {"search_kwargs": {"k": 2}},
        {"search_type": "similarity_score_threshold", "search_kwargs": {"k": 2, "score_threshold": 0.01}},
        {"search_type": "mmr", "search_kwargs": {"k": 2, "fetch_k": 2, "lambda_mult": 1.0}},
    ):
        retriever = store.as_retriever(**options)
        retrieval_chain(chat, retriever).invoke({"input": QUESTION})
        assert spy.segments == expected
        found = await retriever.ainvoke(QUESTION)
        assert [document.metadata["lloco_segments"] for document in found] == [[one] for one in expected]
    annotated = store.as_retriever(annotate=True, search_kwargs={"k": 1}).invoke(QUESTION)
    assert annotated[0].page_content == cases.story("pump")
    assert annotated[0].metadata["lloco_handle"].startswith("[[LLC:")


async def test_a_retriever_filters_and_adds_neighbours(tmp_path):
    with cases.open_engine(tmp_path / "store", cases.decoder()) as engine:
        long = cases.fact("pump", year=1, kind="a")
        engine.ingest([replace(long, text=cases.story("pump", 6)), cases.fact("crane", year=2, kind="a")])
        retriever = LLoCORetriever(engine=engine, k=1, filters={"kind": "a"})
        assert retriever.invoke("pump crane", filters={"year": 2})[0].metadata["year"] == 2
        assert (await retriever.ainvoke("pump crane", filters={"year": [1]}))[0].metadata["year"] == 1
        assert retriever.invoke("pump crane", filters={"kind": "b"}) == []
        around = LLoCORetriever(engine=engine, k=1, neighbours=1, filters={"year": 1}).invoke("pump number 3")
        assert len(around) == 3
        assert [document.metadata["lloco_score"] for document in around[1:]] == [0.0, 0.0]


# -- memory and agents -----------------------------------------------------------------------------------------------


def test_runnable_with_message_history(engine, spy, chat, retriever):
    prompt = ChatPromptTemplate.from_messages(
        [("system", SYSTEM), MessagesPlaceholder("history"), ("human", "{input}")]
    )
    found = RunnableLambda(lambda values: values["input"]) | retriever | cases.format_docs
    kept = InMemoryChatMessageHistory()
    chain = RunnableWithMessageHistory(
        RunnablePassthrough.assign(context=found) | prompt | chat,
        lambda session_id: kept,
        input_messages_key="input",
        history_messages_key="history",
    )
    config = {"configurable": {"session_id": "1"}}
    first = chain.invoke({"input": QUESTION}, config)
    chain.invoke({"input": "Where is the crane?"}, config)
    assert first.text == own_answer(engine)
    assert [turn.text for turn in spy.asked[1][1]["history"]] == [QUESTION, first.text]
    assert spy.asked[1][1]["hits"][0].doc_id == "crane.md"
    assert "[[LLC" not in "".join(message.text for message in kept.messages)


def tool_of(retriever, **options):
    return create_retriever_tool(retriever, "search", "Searches the documents.", **options)


class State(TypedDict):
    messages: Annotated[list, operator.add]


def call(query: str = QUESTION) -> dict:
    return {"name": "search", "args": {"query": query}, "id": "call-1", "type": "tool_call"}


def test_a_retriever_tools_handles_are_read_for_its_question_only(spy, chat, retriever, expected):
    message = tool_of(retriever, response_format="content_and_artifact").invoke(call())
    assert isinstance(message, ToolMessage)
    assert holds_no_document(str(message.content))
    conversation = [HumanMessage(QUESTION), AIMessage("", tool_calls=[call()]), message]
    answer = chat.invoke(conversation)
    assert (spy.last[0], spy.segments) == (QUESTION, expected)
    chat.invoke([*conversation, answer, HumanMessage("And now?")])  # what is kept of it resolves no more
    assert spy.segments == []
    assert "[[LLC" not in spy.text
    chat.invoke([HumanMessage("hello"), *conversation[1:], answer, HumanMessage(f"You said {answer.text}")])
    assert spy.segments == []


async def test_a_langgraph_agent_with_a_retriever_tool(engine, spy, chat, retriever, expected):
    graph = pytest.importorskip("langgraph.graph")
    nodes = pytest.importorskip("langgraph.prebuilt")
    saver = pytest.importorskip("langgraph.checkpoint.memory")

    def think(state: State) -> dict:
        if isinstance(state["messages"][-1], HumanMessage):
            return {"messages": [AIMessage("", tool_calls=[call(state["messages"][-1].text)])]}
        return {"messages": [chat.invoke(state["messages"])]}

    def route(state: State) -> str:
        return "tools" if getattr(state["messages"][-1], "tool_calls", None) else graph.END

    built = graph.StateGraph(State)
    built.add_node("think", think)
    built.add_node("tools", nodes.ToolNode([tool_of(retriever)]))
    built.add_edge(graph.START, "think")
    built.add_conditional_edges("think", route)
    built.add_edge("tools", "think")
    agent = built.compile(checkpointer=saver.InMemorySaver())
    config = {"configurable": {"thread_id": "1"}}
    first = agent.invoke({"messages": [HumanMessage(QUESTION)]}, config)
    assert spy.segments == expected
    assert first["messages"][-1].text == own_answer(engine)
    second = await agent.ainvoke({"messages": [HumanMessage("Where is the crane?")]}, config)
    assert len(second["messages"]) == 8
    assert spy.last[1]["hits"][0].doc_id == "crane.md"
    assert len(spy.segments) == 2  # of the second search only


# -- trimming --------------------------------------------------------------------------------------------------------


def test_trim_messages_counts_slots_and_cannot_cut_a_handle_unseen(engine, spy, chat, retriever):
    handle = retriever.invoke(QUESTION, k=1)[0].page_content
    slots = engine.retrieve(QUESTION, top_k=1)[0].slots
    said = [SystemMessage(f"Read this: {handle}"), HumanMessage("Old " * 9), AIMessage("So."), HumanMessage(QUESTION)]
    whole = chat.get_num_tokens_from_messages(said)
    assert whole > slots
    options = {"token_counter": chat, "include_system": True, "strategy": "last", "start_on": "human"}
    kept = trim_messages(said, max_tokens=whole - 5, **options)
    assert kept == [said[0], said[3]]
    chat.invoke(kept)
    assert len(spy.segments) == 1
    # a segment larger than what is allowed is left out whole
    assert said[0] not in trim_messages(said, max_tokens=slots, **options | {"include_system": False})
    # allow_partial cuts text where it likes. What is left of a handle is refused, never read as text.
    cut = trim_messages(
        [HumanMessage(f"{handle} {QUESTION}")],
        max_tokens=30,
        token_counter=lambda messages: sum(len(message.text) for message in messages),
        strategy="first",
        allow_partial=True,
        text_splitter=list,
    )
    assert cut[0].text == handle[:30]
    with pytest.raises(ValueError, match="a handle must reach the model whole"):
        chat.invoke(cut)
