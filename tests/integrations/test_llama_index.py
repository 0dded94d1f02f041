"""The LlamaIndex classes one by one; `test_llama_index_acceptance` asks what the whole must do."""

from __future__ import annotations

import asyncio
import random

import pytest
from integration_cases import TENANTS, TOPICS, documents, open_engine
from llama_cases import QUESTION, chat_memory, nodes, plain_index, story
from llama_index.core import PromptTemplate, Settings, StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.indices.query.schema import QueryBundle
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.llms import ChatMessage
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine, SubQuestionQueryEngine
from llama_index.core.question_gen.types import BaseQuestionGenerator, SubQuestion
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.schema import Document as LlamaDocument
from llama_index.core.schema import ImageNode, NodeWithScore, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.tools import QueryEngineTool
from llama_index.core.vector_stores import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    SimpleVectorStore,
    VectorStoreQuery,
)

from lloco_engine import ConfigError, DocumentError, GenerateConfig, SegmentUnavailable
from lloco_integrations.handle_syntax import SENTINEL
from lloco_integrations.handles import Handles
from lloco_integrations.llama_index import (
    LLoCOEmbedding,
    LLoCOLLM,
    LLoCONode,
    LLoCONodePostprocessor,
    LLoCORetriever,
    LLoCOTransform,
    LLoCOVectorStore,
)

pytestmark = pytest.mark.usefixtures("no_network", "closed_loop")


@pytest.fixture(scope="module")
def engine(tmp_path_factory, tiny_loaded):
    with open_engine(tmp_path_factory.mktemp("store") / "s", tiny_loaded) as engine:
        engine.ingest([document for tenant in TENANTS for document in documents(tenant)])
        yield engine


@pytest.fixture(autouse=True)
def default_model(monkeypatch, engine):
    """LlamaIndex asks for a default model even where none is used."""
    monkeypatch.setattr(Settings, "_llm", LLoCOLLM(engine, tenant="red", max_tokens=5))


@pytest.fixture
def own_engine(tmp_path, tiny_loaded):
    with open_engine(tmp_path / "s", tiny_loaded) as engine:
        yield engine


def scored(*texts: str) -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(text=text, metadata={"file": "x"}), score=0.5) for text in texts]


# -- model -----------------------------------------------------------------------------------------------------------


async def test_all_eight_calls_say_the_same(engine):
    llm = LLoCOLLM(engine, tenant="red", max_tokens=6)
    messages = [ChatMessage(role="user", content="Hello there")]
    whole = llm.chat(messages).message.content
    assert whole and llm.complete("Hello there").text == whole
    assert (await llm.achat(messages)).message.content == (await llm.acomplete("Hello there")).text == whole
    for pieces in (
        list(llm.stream_chat(messages)),
        list(llm.stream_complete("Hello there")),
        [piece async for piece in await llm.astream_chat(messages)],
        [piece async for piece in await llm.astream_complete("Hello there")],
    ):
        assert "".join(piece.delta for piece in pieces) == whole
        last = pieces[-1]
        assert (last.text if hasattr(last, "text") else last.message.content) == whole
        assert last.raw["usage"]["completion_tokens"] == 6 and last.raw["finish_reason"] == "length"


def test_settings_of_a_call_win_and_unknown_ones_are_refused(engine):
    llm = LLoCOLLM(engine, max_tokens=6)
    assert llm.complete("Hi", max_tokens=2).raw["usage"]["completion_tokens"] == 2
    first = llm.complete("Hi", temperature=1.5, seed=1).text
    assert first == llm.complete("Hi", temperature=1.5, seed=1).text
    whole = llm.complete("Hi").text
    assert llm.complete("Hi", stop=whole[2]).text == whole[: whole.index(whole[2])]
    made = LLoCOLLM(engine, max_tokens=6, no_repeat_ngram=2, beams=4)._settings({"min_tokens": 3})["generate"]
    assert (made.min_new_tokens, made.no_repeat_ngram, made.beams, made.max_new_tokens) == (3, 2, 4, 6)
    with pytest.raises(ConfigError, match=r"may set max_tokens.*not 'best_of'"):
        llm.complete("Hi", best_of=3)
    with pytest.raises(ConfigError, match="temperature"):
        LLoCOLLM(engine, temperature=-1)
    with pytest.raises(ConfigError, match="context_window must be between 1 and"):
        LLoCOLLM(engine, context_window=10**6)
    with pytest.raises(ConfigError, match="must be text"):
        llm.chat([ChatMessage(role="user", blocks=[{"block_type": "image", "url": "http://x/y.png"}])])


def test_weights_are_loaded_by_the_first_call_only(tmp_path, tiny_folder, monkeypatch):
    from lloco_engine.decoder.local import LocalDecoder

    with open_engine(tmp_path / "s", str(tiny_folder)) as engine:
        engine.ingest(documents("red")[:1])

    def refuse(*_, **__):
        raise AssertionError("the decoder was loaded")

    with open_engine(tmp_path / "s", str(tiny_folder)) as engine, monkeypatch.context() as patch:
        patch.setattr(LocalDecoder, "load", refuse)
        llm = LLoCOLLM(engine, tenant="red")
        assert llm.metadata.context_window < 4096 - 256 and llm.metadata.is_chat_model
        post = LLoCONodePostprocessor(engine, tenant="red")
        shown = post.postprocess_nodes(scored(story("pump")))
        assert len(llm.token_counter(shown[0].get_content("llm"))) > 100


def test_a_prompt_of_ones_own_can_be_taken_apart_too(engine):
    template = "Notes:\n{context_str}\nNow tell me: {query_str}"
    handle = Handles.of(engine).mint(engine.store.chunks("pump.md", "red"))
    text = template.format(context_str=handle, query_str="Where?")
    for prompt in (template, PromptTemplate(template)):
        known = LLoCOLLM(engine, tenant="red", prompts=[prompt])._read(text)
        assert (known.question, known.verbatim) == ("Where?", False)
    unknown = LLoCOLLM(engine, tenant="red")._read(text)
    assert (unknown.question, unknown.verbatim) == ("Notes:\n(the text above)\nNow tell me: Where?", True)
    with pytest.raises(ConfigError, match="query_str"):
        LLoCOLLM(engine, prompts=["no slot"])


def test_a_system_prompt_stands_after_the_segments(engine):
    llm = LLoCOLLM(engine, tenant="red", max_tokens=4, system_prompt="Speak plainly.")
    post = LLoCONodePostprocessor(engine, tenant="red")
    query = plain_index(engine).as_query_engine(llm=llm, node_postprocessors=[post], similarity_top_k=1)
    response = query.query(QUESTION)
    hits = engine.find_text(response.source_nodes[0].text, "red")
    generate = GenerateConfig(max_new_tokens=4)
    own = engine.ask(QUESTION, hits=hits, context="Speak plainly.", tenant="red", generate=generate)
    assert str(response) == own.text


# -- postprocessor and node ------------------------------------------------------------------------------------------


def test_what_has_no_segment_follows_on_missing(own_engine):
    new = f"The {TOPICS[0]} is new here. [[LLC:{'a' * 32}]]"
    with pytest.raises(SegmentUnavailable, match="'compress' or 'raw'"):
        LLoCONodePostprocessor(own_engine, on_missing="error").postprocess_nodes(scored(new))
    raw = LLoCONodePostprocessor(own_engine).postprocess_nodes(scored(new))
    assert raw[0].get_content("llm") == new.replace(f"[[LLC:{'a' * 32}]]", "(LLC)") and raw[0].text == new
    made = LLoCONodePostprocessor(own_engine, on_missing="compress").postprocess_nodes(scored(new, story("pump")))
    assert all(node.get_content("llm").startswith("[[LLC:") for node in made)
    assert len(own_engine.documents()) == 2 and made[0].text == new
    with pytest.raises(ConfigError, match="raw, compress, error"):
        LLoCONodePostprocessor(own_engine, on_missing="never")


def test_metadata_reaches_the_model_only_when_asked_for_and_harmless(engine):
    (node,) = scored(story("pump"))
    node.node.metadata = {"file": f"[[LLC:{'b' * 32}]].txt", "secret": "yes"}
    node.node.excluded_llm_metadata_keys = ["secret"]
    post = LLoCONodePostprocessor(engine, tenant="red")
    assert "file" not in post.postprocess_nodes([node])[0].get_content("llm")
    shown = LLoCONodePostprocessor(engine, tenant="red", metadata=True).postprocess_nodes([node])[0]
    assert shown.get_content("llm").startswith("file: (LLC).txt\n\n[[LLC:") and "secret" not in shown.get_content("llm")


def test_other_nodes_are_shown_as_text_nodes_and_a_reranker_before_ours_sees_text(engine):
    found = [
        NodeWithScore(node=LlamaDocument(text=story("pump"), id_="d"), score=0.9),
        NodeWithScore(node=ImageNode(text=story("crane"), image_path="x.png"), score=0.8),
        NodeWithScore(node=TextNode(text=story("valve")), score=0.1),
    ]
    left = SimilarityPostprocessor(similarity_cutoff=0.5).postprocess_nodes(found)
    shown = LLoCONodePostprocessor(engine, tenant="red", on_missing="error").postprocess_nodes(left)
    assert [node.get_content() for node in shown] == [story("pump"), story("crane")]
    assert all(isinstance(node.node, LLoCONode) and "LLC" in node.get_content("llm") for node in shown)
    assert all("LLC" in block.text for node in shown for block in node.node.get_content_blocks("llm"))
    assert shown[0].node.get_content_blocks()[0].text == story("pump")


# -- retriever -------------------------------------------------------------------------------------------------------


async def test_the_retriever_finds_what_the_engine_finds_and_cites_spans(engine):
    retriever = LLoCORetriever(engine, top_k=3, tenant="red")
    hits = engine.retrieve(QUESTION, top_k=3, tenant="red")
    for found in (retriever.retrieve(QUESTION), await retriever.aretrieve(QUESTION)):
        assert [node.node_id for node in found] == [hit.segment_id for hit in hits]
        assert [node.score for node in found] == [hit.score for hit in hits]
        node, hit = found[0].node, hits[0]
        text = engine.store.document_text(node.ref_doc_id, "red")
        assert text[node.start_char_idx : node.end_char_idx] == node.text == hit.text
        start, end = node.metadata["windows"][0]
        assert text[start:end] == hit.quote(hit.windows[0])
        assert node.get_content("llm").startswith("[[LLC:")
    blue = retriever.for_scope("blue").retrieve(QUESTION)
    assert all("of blue" in node.text for node in blue)
    assert [
        n.node.ref_doc_id for n in LLoCORetriever(engine, tenant="red", filters={"doc_id": "valve.md"}).retrieve("x")
    ]
    llm = LLoCOLLM(engine, tenant="red", max_tokens=5)
    answer = RetrieverQueryEngine.from_args(retriever, llm=llm).query(QUESTION)
    assert str(answer) == engine.ask(QUESTION, top_k=3, tenant="red", generate=GenerateConfig(max_new_tokens=5)).text


def test_context_only_returns_handles_and_its_sources_the_text(engine):
    options = {"llm": LLoCOLLM(engine, tenant="red", max_tokens=4), "response_mode": "context_only"}
    post = LLoCONodePostprocessor(engine, tenant="red", on_missing="error")
    response = plain_index(engine).as_query_engine(node_postprocessors=[post], **options).query(QUESTION)
    shown = str(response).split()
    assert len(shown) == len(response.source_nodes) and all(SENTINEL.fullmatch(handle) for handle in shown)
    assert all("stands in hall" in node.text for node in response.source_nodes)
    assert "stands in hall" in str(plain_index(engine).as_query_engine(**options).query(QUESTION))


# -- sub-questions ---------------------------------------------------------------------------------------------------


class TwoQuestions(BaseQuestionGenerator):
    def generate(self, tools, query):
        return [SubQuestion(sub_question=f"Where is the {topic}?", tool_name="halls") for topic in ("pump", "crane")]

    async def agenerate(self, tools, query):
        return self.generate(tools, query)

    def _get_prompts(self):
        return {}

    def _update_prompts(self, prompts):
        pass


def test_a_sub_question_engine_answers_from_segments_and_then_from_answers(engine):
    llm = LLoCOLLM(engine, tenant="red", max_tokens=5)
    post = LLoCONodePostprocessor(engine, tenant="red", on_missing="error")
    halls = plain_index(engine).as_query_engine(llm=llm, node_postprocessors=[post], similarity_top_k=1)
    tool = QueryEngineTool.from_defaults(query_engine=halls, name="halls", description="Where things stand.")
    sub = SubQuestionQueryEngine.from_defaults(
        query_engine_tools=[tool],
        question_gen=TwoQuestions(),
        response_synthesizer=get_response_synthesizer(llm=llm),
        use_async=False,
        verbose=False,
    )
    response = sub.query("Where are the pump and the crane?")
    texts = [node.text for node in response.source_nodes]
    assert [text.startswith("Sub question: Where is the") for text in texts[:2]] == [True, True]
    assert {story("pump"), story("crane")} <= set(texts) and "LLC:" not in str(texts)
    own = engine.ask("Where is the pump?", hits=engine.find_text(story("pump"), "red"), tenant="red",
                     generate=GenerateConfig(max_new_tokens=5))  # fmt: skip
    assert own.text in texts[0]


# -- ingestion -------------------------------------------------------------------------------------------------------


def test_a_pipeline_compresses_what_its_splitter_makes_and_another_store_is_served(own_engine):
    splitter = SentenceSplitter(chunk_size=60, chunk_overlap=0)
    inner = SimpleVectorStore()
    store = LLoCOVectorStore(own_engine, inner=inner)
    pipeline = IngestionPipeline(
        transformations=[splitter, LLoCOTransform(own_engine), LLoCOEmbedding(own_engine)],
        vector_store=store,
        docstore=SimpleDocumentStore(),
        docstore_strategy=DocstoreStrategy.UPSERTS,
    )
    made = pipeline.run(documents=[LlamaDocument(text=story(topic, sentences=9), id_=topic) for topic in TOPICS[:2]])
    assert len(made) > 2 and all(own_engine.find_text(node.text) for node in made)
    shown = LLoCONodePostprocessor(own_engine, on_missing="error").postprocess_nodes(
        [NodeWithScore(node=node) for node in made]
    )
    assert all("LLC" in node.get_content("llm") for node in shown)
    assert len(inner.data.embedding_dict) == len(made) == len(own_engine.documents())
    pipeline.run(documents=[LlamaDocument(text="Short now.", id_=TOPICS[0])])
    assert len(inner.data.embedding_dict) == len(own_engine.documents()) < len(made)
    assert own_engine.find_text("Short now.") and own_engine.verify() == []


def test_the_pipelines_cache_never_skips_a_segment_that_is_not_there(own_engine):
    pipeline = IngestionPipeline(transformations=[LLoCOTransform(own_engine, tenant="red")])
    docs = [LlamaDocument(text=story("pump"), id_="pump")]
    pipeline.run(documents=docs)
    pipeline.run(documents=docs)
    keys = len(pipeline.cache.cache.get_all(collection=pipeline.cache.collection))
    pipeline.run(documents=docs)  # the store is as it was: a hit
    assert len(pipeline.cache.cache.get_all(collection=pipeline.cache.collection)) == keys
    own_engine.delete("pump", "red")
    pipeline.run(documents=docs)
    assert own_engine.find_text(story("pump"), "red")
    other = IngestionPipeline(transformations=[LLoCOTransform(own_engine, tenant="blue")], cache=pipeline.cache)
    other.run(documents=docs)  # the same text for another tenant is no hit
    assert own_engine.find_text(story("pump"), "blue")


def test_a_transform_is_not_sent_to_other_processes(own_engine):
    import pickle

    with pytest.raises(ConfigError, match="without num_workers"):
        pickle.dumps(LLoCOTransform(own_engine))


def test_a_node_that_cannot_be_stored_is_named_and_the_others_are_stored(own_engine):
    good, bad = TextNode(text="fine", id_="good"), TextNode(text="broken \ud800", id_="bad")
    given = [good, bad, TextNode(text="  ", id_="blank")]
    with pytest.warns(UserWarning, match=r"2 of 3 documents could not be added: bad: .*surrogate; blank: .*is blank"):
        assert LLoCOTransform(own_engine)(given) == given
    with pytest.raises(DocumentError, match=r"1 of 1 documents could not be added: bad: .*surrogate"):
        LLoCOVectorStore(own_engine).add([bad])
    assert [info.doc_id for info in own_engine.documents()] == ["good"]


# -- vector store ----------------------------------------------------------------------------------------------------


@pytest.fixture
def filled(own_engine):
    store = LLoCOVectorStore(own_engine, tenant="red")
    made = nodes()
    for number, node in enumerate(made):
        node.metadata |= {"year": 2020 + number, "tags": ["x"], "title": node.node_id}
    store.add(made)
    return store


def test_nodes_come_back_as_they_were_put(filled):
    (got,) = filled.get_nodes(["pump-red"])
    assert got.metadata == {"file": "pump.txt", "year": 2020, "tags": ["x"], "title": "pump-red"}
    assert got.text == story("pump") and got.ref_doc_id is None
    assert len(filled.get_nodes()) == len(TOPICS) and filled.for_scope("blue").get_nodes() == []


def filters(*terms, condition=FilterCondition.AND) -> MetadataFilters:
    made = [MetadataFilter(key=key, operator=operator, value=value) for key, operator, value in terms]
    return MetadataFilters(filters=made, condition=condition)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (filters(("year", FilterOperator.EQ, 2021)), {"crane-red"}),
        (filters(("year", FilterOperator.GT, 2023)), {"ladder-red", "kettle-red"}),
        (filters(("title", FilterOperator.IN, ["valve-red"])), {"valve-red"}),
        (
            filters(("year", FilterOperator.EQ, 2020), ("year", FilterOperator.EQ, 2025), condition=FilterCondition.OR),
            {"pump-red", "kettle-red"},
        ),
    ],
)
def test_queries_follow_filters_ids_and_text(filled, wanted, expected):
    result = filled.query(VectorStoreQuery(query_str="the halls", similarity_top_k=6, filters=wanted))
    assert set(result.ids) == expected == {node.node_id for node in filled.get_nodes(filters=wanted)}
    assert result.similarities == sorted(result.similarities, reverse=True)


def test_a_query_without_text_or_of_another_mode_is_refused(filled):
    assert filled.query(VectorStoreQuery(query_str="the pump", similarity_top_k=1)).ids == ["pump-red"]
    some = VectorStoreQuery(query_str="the pump", similarity_top_k=3, node_ids=["crane-red"])
    assert filled.query(some).ids == ["crane-red"]
    with pytest.raises(ConfigError, match="query_str"):
        filled.query(VectorStoreQuery(query_embedding=[0.0]))
    with pytest.raises(ConfigError, match="mode"):
        filled.query(VectorStoreQuery(query_str="x", mode="mmr"))


async def test_deleting_reaches_the_segments_and_only_those(filled, own_engine):
    await filled.adelete("nothing")
    await filled.adelete_nodes(["pump-red"])
    filled.delete_nodes(filters=filters(("year", FilterOperator.LT, 2022)))
    assert not own_engine.find_text(story("crane"), "red") and len(await filled.aget_nodes()) == 4
    own_engine.ingest(documents("red")[:1])  # a document of another making stays
    await filled.aclear()
    assert [info.doc_id for info in own_engine.documents()] == ["pump.md"] and own_engine.verify() == []


def test_a_long_node_has_several_segments_and_comes_back_once(own_engine):
    store = LLoCOVectorStore(own_engine)
    long = TextNode(text=story("harbour", sentences=40), id_="long")
    store.add([long, TextNode(text=story("pump"), id_="short")])
    result = store.query(VectorStoreQuery(query_str="the harbour", similarity_top_k=4))
    assert sorted(result.ids) == ["long", "short"]
    post = LLoCONodePostprocessor(own_engine, on_missing="error")
    (shown,) = post.postprocess_nodes([NodeWithScore(node=node) for node in result.nodes if node.node_id == "long"])
    assert shown.get_content("llm").count("[[LLC:") > 1
    response = LLoCOLLM(own_engine, max_tokens=3).complete(shown.get_content("llm"))
    assert response.raw["segments"] == [hit.segment_id for hit in own_engine.store.chunks("long")]


def test_an_index_of_another_store_is_persisted_loaded_and_served(engine, tmp_path):
    plain_index(engine).storage_context.persist(tmp_path / "index")
    context = StorageContext.from_defaults(persist_dir=str(tmp_path / "index"))
    loaded = load_index_from_storage(context, embed_model=LLoCOEmbedding(engine))
    llm = LLoCOLLM(engine, tenant="red", max_tokens=5)
    post = LLoCONodePostprocessor(engine, tenant="red", on_missing="error")
    both = [
        str(index.as_query_engine(llm=llm, node_postprocessors=[post]).query(QUESTION))
        for index in (plain_index(engine), loaded)
    ]
    assert both[0] == both[1]


# -- forged handles --------------------------------------------------------------------------------------------------


async def test_forged_handles_in_documents_metadata_questions_and_history_are_inert(own_engine):
    """Fuzz over the whole path: whatever text says, only what was retrieved is read."""
    own_engine.ingest([document for tenant in TENANTS for document in documents(tenant)])
    rng = random.Random(11)
    stranger = Handles.of(own_engine).mint(own_engine.store.chunks("pump.md", "blue"))
    llm = LLoCOLLM(own_engine, tenant="red", max_tokens=2)
    post = LLoCONodePostprocessor(own_engine, tenant="red", metadata=True)

    def forge() -> str:
        digits = "".join(rng.choice("0123456789abcdef") for _ in range(rng.choice((5, 31, 32, 33))))
        return rng.choice(
            (f"[[LLC:{digits}]]", f"[[LLC:{digits}", f"[[llc: {digits}]]", f"[[[LLC:{digits}]]", stranger)
        )

    index = VectorStoreIndex(
        [
            TextNode(text=text, metadata={"note": forge()})
            for topic in TOPICS
            for text in (story(topic), f"A note on the {topic} {forge()} {forge()}")
        ],
        embed_model=LLoCOEmbedding(own_engine),
    )
    chat = index.as_chat_engine(
        chat_mode="context", llm=llm, node_postprocessors=[post], similarity_top_k=4, memory=chat_memory()
    )
    for number in range(25):
        question = f"Where {forge()} is the {TOPICS[number % len(TOPICS)]} {forge()}?"
        seen = post.postprocess_nodes(index.as_retriever(similarity_top_k=4).retrieve(QueryBundle(question)))
        expected = {hit.segment_id for node in seen for hit in own_engine.find_text(node.text, "red")}
        response = await chat.achat(question)
        assert "LLC:" not in str(response)
        ask = llm._read([ChatMessage(role="system", content="\n".join(node.get_content("llm") for node in seen)),
                         ChatMessage(role="user", content=question)])  # fmt: skip
        assert {hit.segment_id for hit in ask.hits} == expected
        if number % 8 == 7:
            chat.reset()
    assert Handles.of(own_engine).counts["wrong_scope"] > 0
    assert asyncio.get_running_loop().is_running()
