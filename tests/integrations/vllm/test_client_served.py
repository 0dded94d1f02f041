"""An engine whose decoder is a real vLLM server, started by the command that `lloco vllm-args` prints.

``LLOCO_VLLM_URL`` names a server of the store that runs already, with the key in ``LLOCO_VLLM_KEY_FILE``.
"""

from __future__ import annotations

import json
import os
import urllib.request
from dataclasses import replace

import pytest
from vllm_server_cases import has_vllm, served_as_printed

from lloco_engine import DecoderUnavailable, Engine
from lloco_engine.demo import questions
from lloco_engine.serve.running import serving

URL = os.environ.get("LLOCO_VLLM_URL", "")
pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not (URL or has_vllm()), reason="needs vLLM: make vllm-test")]

TWELVE = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def address(store, key_file, tmp_path_factory):
    """A server's address."""
    if URL:
        yield URL
        return
    with served_as_printed(store, key_file, tmp_path_factory.mktemp("server")) as server:
        yield server.url


@pytest.fixture
def key(monkeypatch, key_file):
    monkeypatch.setenv("LLOCO_VLLM_KEY_FILE", str(key_file))


@pytest.fixture
def engine(store, address, key):
    with Engine.open(store, decoder=f"vllm:{address}") as engine:
        yield engine


@pytest.fixture(scope="module")
def local(store):
    with Engine.open(store) as engine:
        yield engine


@pytest.mark.parametrize("adapter", ["auto", "none"])
def test_answers_are_those_of_the_decoder_in_this_process(engine, local, adapter):
    for number, one in enumerate(questions()[:4]):
        more = {"top_k": (1, 2, 4, 4)[number], "focus": (2, 0, 2, 0)[number], "adapter": adapter, **TWELVE}
        ours, theirs = (each.ask(one.question, **more) for each in (local, engine))
        assert (theirs.token_ids, theirs.text, theirs.finish) == (ours.token_ids, ours.text, ours.finish)
        assert (theirs.hits, theirs.adapter) == (ours.hits, ours.adapter)
        assert theirs.usage.prompt_tokens == ours.usage.prompt_tokens and theirs.usage.ttft_s > 0
    plain = [each.ask(questions()[0].question, hits=(), adapter=adapter, **TWELVE) for each in (local, engine)]
    assert plain[0].token_ids == plain[1].token_ids


def test_frameworks_and_a_served_store_answer_in_front_of_it(engine, local, closed_loop):
    from langchain_core.prompts import PromptTemplate
    from llama_index.core.query_engine import RetrieverQueryEngine

    from lloco_integrations import langchain, llama_index

    question = questions()[0].question
    wanted = local.ask(question, **TWELVE)
    with serving(engine) as url:
        body = {"model": "lloco", "messages": [{"role": "user", "content": question}], "max_tokens": 12}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert json.loads(answer.read())["choices"][0]["message"]["content"] == wanted.text

    def chain(one: Engine) -> str:
        found = langchain.LLoCORetriever(engine=one, k=2).invoke(question)
        made = PromptTemplate.from_template("{context}\n\n{question}") | langchain.LLoCOLLM(engine=one, max_tokens=12)
        return made.invoke({"context": "\n\n".join(each.page_content for each in found), "question": question})

    def query(one: Engine) -> str:
        retriever, llm = llama_index.LLoCORetriever(one, top_k=2), llama_index.LLoCOLLM(one, max_tokens=12)
        return str(RetrieverQueryEngine.from_args(retriever, llm=llm).query(question))

    assert chain(engine) == chain(local) != ""
    assert query(engine) == query(local) != ""


def test_an_old_request_and_another_key_are_refused_and_the_server_stays(engine, local, monkeypatch, store, address):
    from lloco_integrations.vllm import client

    question = questions()[1].question
    with monkeypatch.context() as patched:
        patched.setattr(client, "LIFETIME", -5)
        with pytest.raises(DecoderUnavailable):
            engine.ask(question, **TWELVE)
    with monkeypatch.context() as patched:
        patched.delenv("LLOCO_VLLM_KEY_FILE")
        patched.setenv("LLOCO_VLLM_KEY", "another" * 8)
        with Engine.open(store, decoder=f"vllm:{address}") as other, pytest.raises(DecoderUnavailable):
            other.ask(question, **TWELVE)
    hits = [replace(hit) for hit in local.retrieve(question, top_k=2)]
    ours, theirs = (each.ask(question, hits=hits, **TWELVE) for each in (local, engine))
    assert ours.token_ids == theirs.token_ids
