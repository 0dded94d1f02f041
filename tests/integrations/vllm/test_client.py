"""A decoder on vLLM servers: the same answers as with one in this process, and clear errors where that cannot be."""

from __future__ import annotations

import json
import shutil
import socket
from contextlib import contextmanager
from dataclasses import replace

import pytest
from adapter_cases import adapter
from summary_cases import save_tiny_autocompressor
from typer.testing import CliRunner
from vllm_cases import KEY, Server, running

from lloco_engine import (
    AdapterError,
    AskRequest,
    ChunkConfig,
    CompressConfig,
    ConfigError,
    DecoderUnavailable,
    Document,
    Engine,
    PromptTooLong,
    Turn,
)
from lloco_engine.cli import app
from lloco_engine.decoder.local import LocalDecoder
from lloco_engine.testing import HashingEmbedder, save_tiny_decoder, tiny_tokenizer
from lloco_integrations.vllm import client
from lloco_integrations.vllm.replicas import Replicas, parse_urls

QUESTION = "Which pump stands in hall 3 of the mill?"
PUMPS = " ".join(f"The pump number {number} stands in hall {number} of the mill." for number in range(12))
CRANES = " ".join(f"The crane number {number} was repaired by Anna Vogt." for number in range(12))
SMALL = {"chunk": ChunkConfig(64, 24, 4), "compress": CompressConfig("uncompressed", 1)}
TWELVE = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_folder):
    """A store of two tenants, with an adapter for one group of one of them."""
    path = tmp_path_factory.mktemp("vllm") / "store"
    with Engine.open(path, decoder=str(tiny_folder), embedder=HashingEmbedder(), **SMALL) as engine:
        engine.ingest([Document("pumps", PUMPS), Document("cranes", CRANES, metadata={"group": "law"})])
        engine.ingest(Document("secret", "The password of the vault is swordfish."), tenant="other")
        made = adapter(path.parent / "made", engine.decoder, seed=3)
        engine.adapters.registry.add(made, "law")
    return path


@pytest.fixture(scope="module")
def local(store):
    """The engine that answers in this process."""
    with Engine.open(store, embedder=HashingEmbedder()) as engine:
        yield engine


@pytest.fixture(scope="module")
def served(store, tiny_folder):
    """The decoder of the servers."""
    decoder = LocalDecoder.load(str(tiny_folder))
    decoder.load_adapter(next((store / "adapters" / "law").iterdir()), "law@1")
    return decoder


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("LLOCO_VLLM_KEY", KEY.decode())
    monkeypatch.delenv("LLOCO_VLLM_KEY_FILE", raising=False)


@contextmanager
def asked(*servers: Server, more: str = "", **options):
    """An engine whose decoder is these servers."""
    with running(*servers) as urls:
        place = ",".join([*urls, *filter(None, [more])])
        with Engine.open(servers[0].store, decoder=f"vllm:{place}", embedder=HashingEmbedder(), **options) as engine:
            yield engine


def nowhere() -> str:
    """An address that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def server(store, served):
    return Server(store, served)


def same(ours, theirs) -> None:
    """Two answers of the same tokens, told alike, but for times."""
    assert theirs.token_ids == ours.token_ids
    told = ("text", "hits", "finish", "adapter", "reasoning", "warnings")
    assert [getattr(theirs, name) for name in told] == [getattr(ours, name) for name in told]
    counts = ("prompt_tokens", "prompt_slots", "template_tokens", "source_tokens", "completion_tokens")
    assert [getattr(theirs.usage, name) for name in counts] == [getattr(ours.usage, name) for name in counts]


# -- the same answers ------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_decoder_in_this_process(local, server):
    questions = [
        AskRequest(QUESTION),
        AskRequest("Who repaired crane 7?").but({"top_k": 1}),
        AskRequest(QUESTION).but({"focus": 0, "relevance": 0.0}),
        AskRequest(QUESTION).but({"focus": 1, "history": (Turn("user", "Hello?"), Turn("assistant", "Yes."))}),
        AskRequest(QUESTION, whole_document="pumps"),
        AskRequest("Say it.", hits=(), verbatim=True),
        AskRequest(QUESTION, context="The mill has a tower.", adapter="none"),
        AskRequest("What is the password?", tenant="other"),
    ]
    with asked(server) as engine:
        for question in questions:
            ours, theirs = (one.ask(question, **TWELVE) for one in (local, engine))
            same(ours, theirs)
            assert theirs.usage.ttft_s > 0 and theirs.usage.decode_s >= 0 and theirs.usage.peak_memory == 0
        both = [one.compare(QUESTION, **TWELVE) for one in (local, engine)]
        for name, ours in both[0].items():
            same(ours, both[1][name])
    read = [memory.segments for memory in server.memories]
    assert len(read[0]) == 4 and len(read[1]) == 1 and len(read[4]) > 4
    assert {memory.tenant for memory in server.memories} == {"", "other"}


def test_an_adapter_answers_under_its_name_and_a_missing_one_is_named_at_open(local, server, tiny_folder):
    ours = local.ask(QUESTION, adapter="law", **TWELVE)
    with asked(server) as engine:
        same(ours, engine.ask(QUESTION, adapter="law", **TWELVE))
        assert server.bodies[-1]["model"] == ours.adapter == "law@1"
        assert ours.token_ids != local.ask(QUESTION, adapter="none", **TWELVE).token_ids
    bare = Server(server.store, LocalDecoder.load(str(tiny_folder)))
    with pytest.raises(AdapterError, match=r"must all have the adapter 'law@1'.*--lora-modules law@1=.*vllm-args"):
        asked(bare).__enter__()
    with pytest.raises(AdapterError, match="law@1"):
        asked(server, bare).__enter__()


def test_settings_reach_the_server_and_what_it_cannot_have_is_refused_by_name(local, server):
    given = {"temperature": 0.7, "top_p": 0.9, "sample_top_k": 5, "seed": 11, "min_new_tokens": 3, "max_new_tokens": 9}
    with asked(server) as engine:
        drawn = engine.ask(QUESTION, **given)
        body = server.bodies[-1]
        sent = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 11, "min_tokens": 3, "max_tokens": 9}
        assert sent.items() <= body.items()
        assert 3 <= len(drawn.token_ids) <= 9
        assert drawn.token_ids == engine.ask(QUESTION, **given).token_ids
        for stops in (("e",), ("the", "\n")):
            ours, theirs = (one.ask(QUESTION, stop=stops, max_new_tokens=40) for one in (local, engine))
            same(ours, theirs)
        refused = {
            "repetition_penalty": 1.2,
            "no_repeat_ngram": 3,
            "beams": 2,
            "seed": 2**63,
            "placement": "sequence",
        }
        before = len(server.bodies)
        for name, value in refused.items():
            with pytest.raises(ConfigError, match=rf"^{name} must be .* with a decoder on vLLM, not {value!r}"):
                engine.ask(QUESTION, **{name: value})
        assert len(server.bodies) == before
        hinted = engine.ask(QUESTION, hints="spelling,pointing", **TWELVE)
        assert hinted.warnings[-1] == "hints (spelling, pointing) were off: the vLLM servers do not know them"
        assert hinted.hints == ()
    server.longest = 300
    with asked(server) as engine, pytest.raises(PromptTooLong, match="the 300 tokens that the vLLM servers"):
        engine.ask(QUESTION, max_new_tokens=280)


def test_thoughts_have_their_budget_and_are_ended_there(tmp_path):
    folder = save_tiny_decoder(tmp_path / "thinks", max_position_embeddings=4096, vocab_size=310)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n'", "assistant\n<think>'")
    tokenizer.save_pretrained(folder)
    with Engine.open(tmp_path / "store", decoder=str(folder), embedder=HashingEmbedder(), **SMALL) as engine:
        engine.ingest(Document("pumps", PUMPS))
        wanted = [engine.ask(QUESTION, reasoning_tokens=budget, **TWELVE) for budget in (7, 0)]
    assert "were ended for it" in wanted[0].warnings[0]
    server = Server(tmp_path / "store", LocalDecoder.load(str(folder)))
    with asked(server) as engine:
        for budget, ours in zip((7, 0), wanted, strict=True):
            same(ours, engine.ask(QUESTION, reasoning_tokens=budget, **TWELVE))
    assert len(server.bodies) == 3, "the first answer is asked for again, after its thoughts"


def test_a_gateway_needs_no_weights(store, local, served, tiny_folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    options = {"embedder": HashingEmbedder()}
    with (
        running(Server(store, served)) as (url,),
        Engine.open(store, decoder=f"vllm:{url}/v1/#{bare}", **options) as it,
    ):
        same(local.ask(QUESTION, **TWELVE), it.ask(QUESTION, **TWELVE))


async def test_asyncio_streams_and_a_stream_that_is_closed_stops_the_server(local, server):
    ours = local.ask(QUESTION, **TWELVE)
    with asked(server) as engine:
        same(ours, await engine.aask(QUESTION, **TWELVE))
        async with engine.astream(QUESTION, **TWELVE) as stream:
            pieces = [piece async for piece in stream]
        assert "".join(pieces) == ours.text and len(pieces) > 1
        server.sent = 0
        with engine.stream(QUESTION, max_new_tokens=1500, min_new_tokens=1500) as stream:
            next(stream)
        engine.ask(QUESTION, **TWELVE)
        assert server.sent < 1000


def test_summary_embeddings_are_sent_with_the_prompt(tmp_path):
    folder = save_tiny_autocompressor(tmp_path / "auto", max_position_embeddings=4096)
    options = {"embedder": HashingEmbedder(), "compress": CompressConfig("autocompressor"), "chunk": SMALL["chunk"]}
    with Engine.open(tmp_path / "store", decoder=str(folder), **options) as engine:
        engine.ingest(Document("pumps", PUMPS))
        ours = [engine.ask(QUESTION, top_k=k, **TWELVE) for k in (1, 3)]
        made = {"memory": "summary", "compressor": "autocompressor"}
        targets = adapter(tmp_path / "made", engine.decoder, **made)
        engine.adapters.registry.add(targets, "law")
    server = Server(tmp_path / "store", LocalDecoder.load(str(folder)))
    with pytest.raises(
        AdapterError, match="must adapt k_proj, o_proj, q_proj, v_proj alone, and 'law@1' adapts down_proj"
    ):
        asked(server).__enter__()
    with Engine.open(tmp_path / "store", decoder=str(folder), **options) as engine:
        engine.adapters.registry.remove("law")
    with asked(server) as engine:
        for k, answer in zip((1, 3), ours, strict=True):
            same(answer, engine.ask(QUESTION, top_k=k, **TWELVE))
        assert "prompt" not in server.bodies[-1] and "kv_transfer_params" not in server.bodies[-1]


# -- in front of it --------------------------------------------------------------------------------------------------


def test_the_command_line_and_a_served_store_take_it_by_name(store, local, server, monkeypatch):
    import httpx

    from lloco_engine.serve.running import serving

    ours = local.ask(QUESTION, **TWELVE)
    monkeypatch.setattr("lloco_engine.embedder.Embedder", lambda *_: HashingEmbedder())
    with running(server) as (url,):
        arguments = ["ask", QUESTION, "--store", str(store), "--decoder", f"vllm:{url}", "--max-new-tokens", "12"]
        result = CliRunner().invoke(app, [*arguments, "--json"])
        assert json.loads(result.output)["answer"] == ours.text, result.output
        with Engine.open(store, decoder=f"vllm:{url}") as engine, serving(engine) as address:
            body = {"model": "lloco", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 12}
            said = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
            assert said["choices"][0]["message"]["content"] == ours.text
            server.fails = 1
            failed = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
            assert failed.status_code == 503 and failed.json()["error"]["code"] == "decoder_unavailable"


def test_langchain_takes_it(local, server):
    pytest.importorskip("langchain_core")
    from lloco_integrations.langchain import LLoCOLLM, LLoCORetriever

    def chain(engine: Engine) -> str:
        found = LLoCORetriever(engine=engine, k=2).invoke(QUESTION)
        prompt = "\n\n".join([*(document.page_content for document in found), QUESTION])
        return LLoCOLLM(engine=engine, max_tokens=12).invoke(prompt)

    with asked(server) as engine:
        assert chain(engine) == chain(local) != ""
    assert len(server.memories[-1].segments) == 2


def test_llama_index_takes_it(local, server, closed_loop):
    pytest.importorskip("llama_index.core")
    from llama_index.core.query_engine import RetrieverQueryEngine

    from lloco_integrations.llama_index import LLoCOLLM, LLoCORetriever

    def query(engine: Engine) -> str:
        retriever = LLoCORetriever(engine, top_k=2)
        return str(RetrieverQueryEngine.from_args(retriever, llm=LLoCOLLM(engine, max_tokens=12)).query(QUESTION))

    with asked(server) as engine:
        assert query(engine) == query(local) != ""
    assert len(server.memories[-1].segments) == 2


# -- replicas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_stream", [False, True])
def test_another_replica_answers_where_one_fails_or_is_gone(store, local, served, in_stream):
    ours = local.ask(QUESTION, **TWELVE)
    servers = [Server(store, served, fails_in_stream=in_stream) for _ in range(2)]
    with asked(*servers, more=nowhere()) as engine:
        for _ in range(3):
            same(ours, engine.ask(QUESTION, **TWELVE))
        used = [server for server in servers if server.bodies]
        assert len(used) == 1, "one segment, one server"
        used[0].fails = 1
        same(ours, engine.ask(QUESTION, **TWELVE))
        assert all(server.bodies for server in servers)
        for server in servers:
            server.fails = 9
        with pytest.raises(DecoderUnavailable, match=r"no vLLM server answers: .*500"):
            engine.ask(QUESTION, **TWELVE)


def test_an_answer_that_breaks_off_is_an_error_and_no_shorter_answer(server):
    server.breaks = 4
    with asked(server) as engine:
        stream = engine.stream(QUESTION, min_new_tokens=12, **TWELVE)
        with pytest.raises(DecoderUnavailable, match="broke off in the middle of an answer"):
            list(stream)


def test_segments_keep_their_server_when_another_comes_or_goes():
    urls = [f"http://host{number}:8000" for number in range(5)]
    many, fewer = Replicas(urls), Replicas(urls[:4])
    keys = [f"{number:032x}" for number in range(500)]
    first = {key: many._order(key)[0] for key in keys}
    moved = [key for key in keys if fewer._order(key)[0] != first[key]]
    assert moved == [key for key in keys if first[key] == urls[4]]
    counts = [list(first.values()).count(url) for url in urls]
    assert min(counts) > 60 and max(counts) < 140
    many.close()
    fewer.close()


@pytest.mark.parametrize(
    "place", ["host:8000", "ftp://host", "http://", "http://a,http://a/", "http://a:x", "http://a:8000/?q=1", ""]
)
def test_what_is_no_address_is_refused(place):
    with pytest.raises(ConfigError, match="vllm:http://host:port"):
        parse_urls(place)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_another_decoder_no_server_and_no_key_are_refused_at_open(store, server, monkeypatch):
    server.names = ["gpt-oss"]
    with pytest.raises(DecoderUnavailable, match=r"must serve the store's decoder, .*serves 'gpt-oss'.*vllm-args"):
        asked(server).__enter__()
    with pytest.raises(DecoderUnavailable, match="a vLLM server must answer, and none does"):
        Engine.open(store, decoder=f"vllm:{nowhere()}", embedder=HashingEmbedder())
    with pytest.raises(DecoderUnavailable, match="must refuse a memory that has expired, and does not"):
        asked(Server(server.store, server.decoder, reads=False)).__enter__()
    monkeypatch.delenv("LLOCO_VLLM_KEY")
    with pytest.raises(ConfigError, match="openssl rand"):
        Engine.open(store, decoder=f"vllm:{nowhere()}", embedder=HashingEmbedder())


def test_a_request_of_another_key_and_an_old_one_are_refused_by_the_server(server, monkeypatch):
    with asked(server) as engine:
        monkeypatch.setattr(client, "LIFETIME", -5)
        with pytest.raises(DecoderUnavailable, match=r"refuses the request \(400\): the request has expired"):
            engine.ask(QUESTION)
    monkeypatch.undo()
    monkeypatch.setenv("LLOCO_VLLM_KEY", "x" * 64)
    with asked(server) as engine, pytest.raises(DecoderUnavailable, match="signed with the server's key"):
        engine.ask(QUESTION)
    assert server.memories == []


def test_what_needs_weights_is_refused_with_what_to_do(server, tmp_path):
    with asked(server) as engine:
        for call in (
            lambda: engine.ingest(Document("new", "New.")),
            lambda: engine.refine(),
            lambda: engine.score(QUESTION, ["yes"]),
        ):
            with pytest.raises(ConfigError, match=r"must run in this process.*lloco ingest --decoder"):
                call()
    with pytest.raises(ConfigError, match="make it with a decoder in this process first"):
        Engine.open(tmp_path / "none", decoder="vllm:http://127.0.0.1:1", embedder=HashingEmbedder())
    assert not (tmp_path / "none").exists()


def test_a_segment_that_takes_anothers_place_meanwhile_is_read(store, server, local):
    """A refined segment has a new id: a hit from before leads to it."""
    hits = local.retrieve(QUESTION, top_k=1)
    old = [replace(hit, segment_id="0" * 32) for hit in hits]
    with asked(server) as engine:
        same(local.ask(QUESTION, hits=old, **TWELVE), engine.ask(QUESTION, hits=old, **TWELVE))
    assert server.memories[-1].segments == (hits[0].segment_id,)
