"""End to end with the embedded decoder: through LangChain, the answer is the engine's own for the same hits."""

from __future__ import annotations

import langchain_cases as cases
import pytest
from integration_cases import QUESTION, TEXTS
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import RunnablePassthrough

from lloco_engine import CompressConfig, Document, Engine, GenerateConfig
from lloco_engine.testing import HashingEmbedder
from lloco_integrations.langchain import ChatLLoCO, LLoCOLLM, LLoCORetriever

pytestmark = pytest.mark.usefixtures("no_network")
GENERATE = GenerateConfig(max_new_tokens=16)


@pytest.fixture(scope="module")
def engine(tmp_path_factory, embedded_decoder):
    path = tmp_path_factory.mktemp("langchain") / "store"
    options = {"embedder": HashingEmbedder(), "compress": CompressConfig(ratio=4)}
    with Engine.open(path, decoder=embedded_decoder, **options) as made:
        made.ingest(Document(name, text) for name, text in TEXTS.items())
        yield made


@pytest.fixture(scope="module")
def own(engine) -> str:
    answer = engine.ask(QUESTION, top_k=2, generate=GENERATE).text
    assert "Ilse Kontar" in answer
    return answer


async def test_chains_answer_as_the_engine_does(engine, own):
    retriever = LLoCORetriever(engine=engine, k=2)
    prompt = PromptTemplate.from_template("{context}\n\nQuestion: {question}\nAnswer:")
    start = {"context": retriever | cases.format_docs, "question": RunnablePassthrough()}
    for model in (ChatLLoCO(engine=engine, max_tokens=16), LLoCOLLM(engine=engine, max_tokens=16)):
        chain = start | prompt | model | StrOutputParser()
        assert chain.invoke(QUESTION) == own
        assert "".join([piece async for piece in chain.astream(QUESTION)]) == own


def test_a_retrieval_chain_with_a_prompt_of_its_own_answers_as_the_engine_does(engine, own):
    prompt = ChatPromptTemplate.from_messages([("system", "Use what stands here.\n\n{context}"), ("human", "{input}")])
    chat = ChatLLoCO(engine=engine, prompt=prompt, max_tokens=16)
    chain = create_retrieval_chain(LLoCORetriever(engine=engine, k=2), create_stuff_documents_chain(chat, prompt))
    result = chain.invoke({"input": QUESTION})
    assert result["answer"] == own
    assert result["context"][0].text == TEXTS["velmora"]
