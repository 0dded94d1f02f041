"""End to end with the embedded decoder: through LlamaIndex, the answer is the engine's own for the same hits."""

from __future__ import annotations

import pytest
from integration_cases import QUESTION, TEXTS
from llama_cases import chat_memory
from llama_index.core import VectorStoreIndex
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import TextNode

from lloco_engine import CompressConfig, Document, Engine, GenerateConfig
from lloco_engine.testing import HashingEmbedder
from lloco_integrations.llama_index import LLoCOEmbedding, LLoCOLLM, LLoCONodePostprocessor, LLoCORetriever

pytestmark = pytest.mark.usefixtures("no_network", "closed_loop")
GENERATE = GenerateConfig(max_new_tokens=24)


@pytest.fixture(scope="module")
def engine(tmp_path_factory, embedded_decoder):
    path = tmp_path_factory.mktemp("embedded") / "store"
    options = {"embedder": HashingEmbedder(), "compress": CompressConfig(ratio=2)}
    with Engine.open(path, decoder=embedded_decoder, **options) as engine:
        engine.ingest(Document(name, text) for name, text in TEXTS.items())
        yield engine


def test_query_engines_answer_as_the_engine_does(engine):
    llm = LLoCOLLM(engine, max_tokens=24)
    assert "Ilse Kont" in engine.ask(QUESTION, top_k=1, generate=GENERATE).text
    own = engine.ask(QUESTION, top_k=2, generate=GENERATE)
    ours = RetrieverQueryEngine.from_args(LLoCORetriever(engine, top_k=2), llm=llm).query(QUESTION)
    assert str(ours) == own.text
    nodes = [TextNode(text=text) for text in TEXTS.values()]
    theirs = VectorStoreIndex(nodes, embed_model=LLoCOEmbedding(engine)).as_query_engine(
        llm=llm, similarity_top_k=2, node_postprocessors=[LLoCONodePostprocessor(engine, on_missing="error")]
    )
    response = theirs.query(QUESTION)
    hits = [engine.find_text(node.text)[0] for node in response.source_nodes]
    assert str(response) == engine.ask(QUESTION, hits=hits, generate=GENERATE).text
    streamed = RetrieverQueryEngine.from_args(LLoCORetriever(engine, top_k=2), llm=llm, streaming=True).query(QUESTION)
    assert "".join(streamed.response_gen) == own.text


async def test_a_chat_engine_answers_the_first_question_as_the_engine_does_and_goes_on(engine):
    llm = LLoCOLLM(engine, max_tokens=24)
    chat = ContextChatEngine.from_defaults(LLoCORetriever(engine, top_k=1), llm=llm, memory=chat_memory())
    first = await chat.achat(QUESTION)
    assert str(first) == engine.ask(QUESTION, top_k=1, generate=GENERATE).text
    second = await chat.achat("Harrow-9: production drum of phosphor bronze?")
    assert str(second) and [node.node.ref_doc_id for node in second.source_nodes] == ["harrow"]
