"""What people already have, pointed at the address: LangChain's and LlamaIndex's own classes for the OpenAI API."""

from __future__ import annotations

import httpx
import pytest
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from serve_cases import QUESTION

from lloco_engine.types import Turn


@pytest.fixture(scope="module")
def v1(address):
    return f"{address}/v1"


@pytest.fixture
def closed():
    """The connections of a client, which nobody else would close."""
    with httpx.Client(timeout=60) as made:
        yield made


def test_langchains_chat_model_in_a_chain(v1, engine, closed):
    model = ChatOpenAI(base_url=v1, api_key="none", model="lloco", max_tokens=8, extra_body={"top_k": 2}, max_retries=0,
                       http_client=closed)  # fmt: skip
    prompt = ChatPromptTemplate.from_messages([("system", "Be brief."), ("human", "{question}")])
    own = engine.ask(QUESTION, context="Be brief.", top_k=2, max_new_tokens=8)
    chain = prompt | model | StrOutputParser()
    assert chain.invoke({"question": QUESTION}) == own.text == "".join(chain.stream({"question": QUESTION}))
    told = (prompt | model).invoke({"question": QUESTION})
    assert told.usage_metadata["output_tokens"] == own.usage.completion_tokens
    assert told.usage_metadata["input_token_details"]["cache_read"] == own.usage.prompt_slots


async def test_langchains_chat_model_async(v1, engine):
    own = engine.ask(QUESTION, max_new_tokens=8).text
    async with httpx.AsyncClient(timeout=60) as client:
        model = ChatOpenAI(base_url=v1, api_key="none", model="lloco", max_tokens=8, max_retries=0,
                           http_async_client=client)  # fmt: skip
        assert (await model.ainvoke(QUESTION)).content == own
        assert "".join([chunk.text async for chunk in model.astream(QUESTION)]) == own


def test_langchains_embeddings(v1, engine, closed):
    vectors = OpenAIEmbeddings(base_url=v1, api_key="none", model="lloco-embeddings", check_embedding_ctx_length=False,
                               http_client=closed)  # fmt: skip
    own = engine.embedder.encode(["The pump."])[0]
    assert vectors.embed_query("The pump.") == pytest.approx(own.tolist())


def test_llama_indexes_openai_like(v1, engine, closed):
    model = OpenAILike(model="lloco", api_base=v1, api_key="none", is_chat_model=True, max_tokens=8, temperature=0.0,
                       max_retries=0, http_client=closed)  # fmt: skip
    turns = (Turn("user", "Who repaired the crane?"), Turn("assistant", "Anna Vogt."))
    said = [ChatMessage(role=turn.role, content=turn.text) for turn in turns]
    said.append(ChatMessage(role="user", content="And in which year?"))
    own = engine.ask("And in which year?", history=turns, max_new_tokens=8).text
    assert model.chat(said).message.content == own
    assert "".join(piece.delta or "" for piece in model.stream_chat(said)) == own
    assert model.complete(QUESTION).text == engine.ask(QUESTION, max_new_tokens=8).text
