"""Chat by the official client: the engine's own answers, plain and streamed, with what they stand on."""

from __future__ import annotations

import asyncio
import json
import threading

import openai
import pytest
from openai import AsyncOpenAI
from serve_cases import CRANES, QUESTION, user

from lloco_engine.serve.asking import chat_request
from lloco_engine.serve.errors import APIError
from lloco_engine.serve.schema import ChatRequest
from lloco_engine.types import Turn


def ask(client, messages=None, **more):
    return client.chat.completions.create(model="lloco", messages=messages or user(QUESTION), **more)


def test_models_are_the_base_and_the_adapters(client):
    assert [model.id for model in client.models.list()] == ["lloco", "lloco:none", "lloco-embeddings"]
    assert client.models.retrieve("lloco").owned_by == "lloco"
    with pytest.raises(openai.NotFoundError, match="there is lloco, lloco:none"):
        client.models.retrieve("gpt-4")


def test_a_group_with_an_adapter_is_a_model(client, engine, monkeypatch):
    monkeypatch.setattr(engine.adapters.registry, "groups", lambda tenant: ["law"] if tenant == "" else [])
    assert "lloco:law" in [model.id for model in client.models.list()]
    body = ChatRequest(model="lloco:law", messages=user(QUESTION))
    assert chat_request(engine, body, "", 1000).adapter == "law"
    with pytest.raises(APIError, match="a model must be one of lloco, lloco:none, not 'lloco:law'"):
        chat_request(engine, body, "other", 1000)


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        ({}, {}),
        ({"max_tokens": 9, "extra_body": {"top_k": 1}}, {"max_new_tokens": 9, "top_k": 1}),
        ({"max_completion_tokens": 9, "temperature": 0.9, "top_p": 0.8, "seed": 7},
         {"max_new_tokens": 9, "temperature": 0.9, "top_p": 0.8, "seed": 7}),
        ({"stop": ["e"], "extra_body": {"filters": {"year": {"$gte": 2024}}}},
         {"stop": ("e",), "filters": {"year": 2024}}),
        ({"extra_body": {"filters": {"type": "eq", "key": "year", "value": 2023}}}, {"filters": {"year": 2023}}),
        ({"extra_body": {"whole_document": CRANES.doc_id, "hints": "spelling", "no_repeat_ngram": 3}},
         {"whole_document": CRANES.doc_id, "hints": ("spelling",), "no_repeat_ngram": 3}),
        ({"extra_body": {"min_score": 0.99, "when_nothing": "refuse"}}, {"min_score": 0.99, "when_nothing": "refuse"}),
    ],
)  # fmt: skip
def test_the_answer_is_the_engines_own_plain_and_streamed(client, engine, said, asked):
    own = engine.ask(QUESTION, **{"max_new_tokens": 12, **asked})
    said = said if {"max_tokens", "max_completion_tokens"} & set(said) else {**said, "max_tokens": 12}
    plain = ask(client, **said)
    message = plain.choices[0].message
    assert (message.content, message.role, plain.choices[0].finish_reason) == (own.text, "assistant", own.finish)
    assert [source["document"] for source in plain.lloco["sources"]] == [hit.doc_id for hit in own.hits]
    assert (plain.lloco["warnings"], plain.lloco["hints"]) == (list(own.warnings), list(own.hints))
    chunks = list(ask(client, stream=True, **said))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == own.text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [own.finish]
    assert chunks[-1].choices[0].delta.annotations == [
        one.model_dump(exclude_unset=True) for one in message.annotations
    ]
    assert chunks[-1].lloco["sources"] == plain.lloco["sources"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_sources_are_word_for_word(client, engine):
    whole = ask(client, max_tokens=4)
    assert whole.lloco["sources"]
    for source, note in zip(whole.lloco["sources"], whole.choices[0].message.annotations, strict=True):
        text = engine.store.document_text(source["document"])
        assert source["quote"] == text[source["start"] : source["end"]] == note.file_citation["quote"]
        assert source["text"] == text[source["text_start"] : source["text_end"]]
        assert note.type == "file_citation" and note.file_citation["document"] == source["document"]


def test_usage_counts_slots_as_cached_tokens_of_the_prompt(client, engine):
    own = engine.ask(QUESTION, max_new_tokens=6).usage
    usage = ask(client, max_tokens=6).usage
    assert usage.prompt_tokens == own.prompt_tokens + own.prompt_slots
    assert usage.prompt_tokens_details.cached_tokens == own.prompt_slots > 0
    assert usage.total_tokens == usage.prompt_tokens + own.completion_tokens
    chunks = list(ask(client, max_tokens=6, stream=True, stream_options={"include_usage": True}))
    assert (chunks[-1].choices, chunks[-1].usage) == ([], usage)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_conversation_counts_and_the_system_is_read_after_the_documents(client, engine):
    said = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": [{"type": "text", "text": "Who repaired the crane?"}]},
        {"role": "assistant", "content": "Anna Vogt.", "annotations": [], "refusal": None},
        {"role": "user", "content": "And in which year?"},
    ]
    turns = (Turn("user", "Who repaired the crane?"), Turn("assistant", "Anna Vogt."))
    own = engine.ask("And in which year?", history=turns, context="Answer in one word.", max_new_tokens=8)
    assert ask(client, said, max_tokens=8).choices[0].message.content == own.text


def test_a_message_that_came_from_here_can_be_sent_back(client):
    first = ask(client, max_tokens=4).choices[0].message
    messages = [*user(QUESTION), first, *user("And in hall 5?")]
    assert ask(client, messages, max_tokens=4).choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("body", "code", "param", "says"),
    [
        ({"n": 2}, "unsupported_parameter", "n", "n is not served, and 2 was received; ask several times"),
        ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools", "documents are searched"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format", "free text"),
        ({"presence_penalty": 0.5}, "unsupported_parameter", "presence_penalty", "repetition_penalty"),
        ({"logprobs": True}, "unsupported_parameter", "logprobs", "leave it out"),
        ({"top_q": 3}, "unsupported_parameter", "top_q", "'top_q' is no field of this request"),
        ({"top_k": 0}, "invalid_value", "top_k", "greater than or equal to 1, not 0"),
        ({"top_k": "3"}, "invalid_value", "top_k", "valid integer, not '3'"),
        ({"temperature": -1}, "invalid_value", "temperature", "not -1"),
        ({"seed": 10**30}, "invalid_value", "seed", "18446744073709551615"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "invalid_value", "max_tokens", "given once"),
        ({"hints": ["rhyme"]}, "invalid_value", None, "hints must be some of spelling, pointing, not 'rhyme'"),
        ({"filters": {"year": {"$near": 3}}}, "invalid_value", None, "$near"),
        ({"messages": []}, "invalid_value", "messages", "at least 1"),
        ({"messages": [{"role": "assistant", "content": "Hm."}]}, "invalid_value", "messages", "put the question last"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_value", None, ""),
        ({"messages": user("  ")}, "invalid_value", None, "must not be empty"),
        ({"messages": user("\ud800")}, "invalid_value", None, "surrogate"),
        ({"messages": user("x" * 40_000)}, "invalid_value", "messages", "at most 32,000 characters"),
        ({"messages": user("pump " * 6_000)}, "context_length_exceeded", "messages", ""),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "invalid_value", None, ""),
        ({"whole_document": "nothing.md"}, "not_found", None, "nothing.md"),
        ({"adapter": "law"}, "invalid_value", "adapter", "law"),
        ({"model": "gpt-4"}, "model_not_found", "model", "a model must be one of lloco, lloco:none, not 'gpt-4'"),
        ({"model": "lloco:none", "adapter": "law"}, "invalid_value", "adapter", "leave it out"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_by_name(http, body, code, param, says):
    sent = {"model": "lloco", "messages": user(QUESTION), "max_tokens": 4} | body
    for stream in (False, True):
        answer = http.post("/v1/chat/completions", content=json.dumps(sent | {"stream": stream}).encode(),
                           headers={"content-type": "application/json"})  # fmt: skip
        error = answer.json()["error"]
        assert 400 <= answer.status_code < 500 and error["type"] == "invalid_request_error"
        assert error["code"] == code and says in error["message"]
        assert param is None or error["param"] == param


def test_values_that_ask_for_nothing_are_taken(http):
    nothing = {"n": 1, "tools": [], "presence_penalty": 0.0, "frequency_penalty": 0, "logprobs": None, "user": "me"}
    nothing |= {"response_format": {"type": "text"}, "tool_choice": "none", "store": False, "top_k": None}
    assert http.post(
        "/v1/chat/completions", json={"model": "lloco", "messages": user("Hall?"), "max_tokens": 2} | nothing
    ).is_success


def test_errors_are_the_clients_own_classes(client):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, n=3)
    assert (refused.value.code, refused.value.param, refused.value.type) == (
        "unsupported_parameter",
        "n",
        "invalid_request_error",
    )
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=user("?"))


async def test_async_streams_come_piece_by_piece_beside_each_other(address, engine):
    own = engine.ask(QUESTION, max_new_tokens=24).text

    async def one(client: AsyncOpenAI) -> tuple[str, int]:
        stream = await ask(client, max_tokens=24, stream=True)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return "".join(pieces), len([piece for piece in pieces if piece])

    async with AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        got = await asyncio.gather(*(one(client) for _ in range(4)))
    assert {text for text, _ in got} == {own}
    assert all(count > 1 for _, count in got)


def test_the_first_event_comes_before_the_last_token(http, engine, monkeypatch):
    """The decoder makes no second piece before the first has been read by the client."""
    read = threading.Event()
    stream = engine.stream

    def slow(*args, **options):
        made = stream(*args, **options)
        pieces = made._pieces

        def held():
            for number, piece in enumerate(pieces):
                assert number == 0 or read.wait(20), "the first piece was not sent before the second was made"
                yield piece

        made._pieces = held()
        return made

    monkeypatch.setattr(engine, "stream", slow)
    sent = {"model": "lloco", "messages": user(QUESTION), "max_tokens": 12, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=sent) as answer:
        pieces = 0
        for line in answer.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                pieces += 1
                read.set()
    assert pieces > 1


def test_compare_streams_three_methods(http, engine):
    own = engine.compare(QUESTION, max_new_tokens=6)
    finals, order, deltas = {}, [], {}
    with http.stream("POST", "/lloco/compare", json={"question": QUESTION, "max_new_tokens": 6}) as answer:
        name = ""
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line[7:]
                order.append(name)
            elif line.startswith("data: "):
                data = json.loads(line[6:])
                deltas[name] = deltas.get(name, "") + data.get("delta", "")
                finals[name] = data.get("final", finals.get(name))
    assert list(dict.fromkeys(order)) == ["lloco", "text_retrieval", "in_context", "done"]
    for name, answer in own.items():
        assert finals[name]["answer"] == answer.text == deltas[name]
        assert (finals[name]["prompt_tokens"], finals[name]["error"]) == (answer.usage.prompt_tokens, None)
        assert finals[name]["first_token_s"] > 0 and finals[name]["memory_bytes"] > 0
