"""Who is let in, what one request may ask, and what clients that misbehave do to others."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time

import httpx
import openai
import pytest
from openai import OpenAI
from serve_cases import DOCUMENTS, PUMPS, QUESTION, until, user
from typer.testing import CliRunner

from lloco_engine.cli import app as cli
from lloco_engine.errors import ConfigError, StoreError
from lloco_engine.serve import logs
from lloco_engine.serve.app import create_app
from lloco_engine.serve.keys import Caller, KeyFile
from lloco_engine.serve.limits import Limits
from lloco_engine.serve.running import check_address, serving

CHAT = {"model": "lloco", "messages": user(QUESTION), "max_tokens": 4}


@pytest.fixture
def filled(empty_store):
    with empty_store() as engine:
        engine.ingest(DOCUMENTS)
        yield engine


# -- keys -------------------------------------------------------------------------------------------------------


def test_a_key_is_kept_as_a_hash_and_found(keys_file):
    keys = KeyFile(keys_file)
    given, made = keys.add("acme")
    reads, _ = keys.add("acme", "read")
    assert given not in keys_file.read_text() and keys_file.stat().st_mode & 0o777 == 0o600
    assert (keys.find(given), keys.find(reads)) == (Caller("acme", "write"), Caller("acme", "read"))
    assert keys.find(given[:-1]) is None and keys.find("") is None and keys.find("\udc80") is None
    KeyFile(keys_file).remove(made.id)
    assert keys.find(given) is None and keys.find(reads) is not None, "a removed key is let in no more, at once"
    with pytest.raises(ConfigError, match="an id must be one of"):
        keys.remove("nobody")
    keys_file.write_text("{}")
    assert keys.find(reads) is None, "a damaged file lets nobody in"
    with pytest.raises(ConfigError, match="must be a file that `lloco keys add` wrote"):
        keys.add("acme")


def test_each_key_sees_its_tenant_only(filled, keys_file, listen):
    keys = KeyFile(keys_file)
    mine, other, reads = keys.add("")[0], keys.add("other")[0], keys.add("", "read")[0]
    figures = keys.add("", "metrics")[0]
    address = listen(create_app(filled, keys=keys))

    def client(key: str) -> OpenAI:
        return OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)

    def get(key: str, path: str) -> httpx.Response:
        return httpx.get(address + path, headers={"Authorization": f"Bearer {key}"})

    with client(mine) as my, client(other) as others, client(reads) as reader, client("lloco-wrong") as wrong:
        file = my.files.create(file=("a.md", b"The vault has a door."), purpose="assistants")
        my.vector_stores.files.create_and_poll(file.id, vector_store_id="default")
        store = my.vector_stores.create(name="mine")
        for call in (
            lambda: others.files.retrieve(file.id),
            lambda: others.files.content(file.id),
            lambda: others.files.delete(file.id),
            lambda: others.vector_stores.retrieve(store.id),
            lambda: others.vector_stores.files.create("default", file_id=file.id),
            lambda: others.vector_stores.files.retrieve(file.id, vector_store_id="default"),
        ):
            with pytest.raises(openai.NotFoundError):
                call()
        assert [one["id"] for one in get(other, "/lloco/documents").json()["data"]] == ["secret.md"]
        assert get(other, f"/lloco/documents/{PUMPS.doc_id}/text").status_code == 404
        assert get(mine, "/lloco/documents/secret.md/text").status_code == 404
        assert get(other, "/lloco/store").json()["documents"] == 1
        answer = my.chat.completions.create(**CHAT | {"messages": user("password of the vault?")})
        assert "secret.md" not in {one["document"] for one in answer.lloco["sources"]}
        told = others.chat.completions.create(**CHAT | {"messages": user("pump?")})
        assert {one["document"] for one in told.lloco["sources"]} == {"secret.md"}
        with pytest.raises(openai.BadRequestError, match="'tenant' is no field"):
            others.chat.completions.create(**CHAT, extra_body={"tenant": ""})
        assert reader.chat.completions.create(**CHAT).choices and reader.files.list().data
        assert get(reads, "/lloco/store").json()["read_only"] is True
        for call in (
            lambda: reader.files.create(file=("b.md", b"text"), purpose="assistants"),
            lambda: reader.files.delete(file.id),
            lambda: reader.vector_stores.create(),
            lambda: reader.vector_stores.delete(store.id),
        ):
            with pytest.raises(openai.PermissionDeniedError, match="this key only reads") as refused:
                call()
            assert refused.value.code == "insufficient_permissions"
        with pytest.raises(openai.AuthenticationError, match="is none of them") as unknown:
            wrong.models.list()
        assert unknown.value.code == "invalid_api_key"
    assert httpx.get(f"{address}/v1/models").status_code == 401
    assert httpx.get(f"{address}/healthz").json() == {"status": "ok"} == httpx.get(f"{address}/readyz").json()
    assert (get(mine, "/metrics").status_code, get(figures, "/v1/models").status_code) == (403, 403)
    text = get(figures, "/metrics").text
    assert "lloco_answers_total 3.0" in text and "acme" not in text and "lloco_first_token_seconds_bucket" in text
    assert 'lloco_requests_total{method="GET",route="/v1/models",status="401"}' in text or "401" in text


def test_without_keys_only_this_machine_is_listened_on(keys_file, tmp_path):
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(ConfigError, match=r"without keys a server listens on 127\.0\.0\.1 alone"):
            check_address(host, None)
    assert check_address("127.0.0.1", None) is None
    with pytest.raises(ConfigError, match="there is no file of keys"):
        check_address("0.0.0.0", keys_file)
    keys_file.write_text('{"keys": []}')
    with pytest.raises(ConfigError, match="must hold a key"):
        check_address("0.0.0.0", keys_file)
    out = CliRunner().invoke(cli, ["serve", "--host", "0.0.0.0", "--store", str(tmp_path / "no")])
    assert out.exit_code == 1 and "lloco keys add" in out.output and not (tmp_path / "no").exists()


def test_keys_by_the_command_line(keys_file):
    run = CliRunner()
    added = run.invoke(cli, ["keys", "add", "--tenant", "acme", "--read-only", "--keys", str(keys_file)])
    assert added.exit_code == 0
    assert KeyFile(keys_file).find(added.stdout.strip()) == Caller("acme", "read")
    listed = json.loads(run.invoke(cli, ["keys", "list", "--keys", str(keys_file), "--json"]).stdout)
    assert [(one["tenant"], one["scope"]) for one in listed] == [("acme", "read")]
    assert run.invoke(cli, ["keys", "remove", listed[0]["id"], "--keys", str(keys_file)]).exit_code == 0
    assert KeyFile(keys_file).load() == []
    assert run.invoke(cli, ["keys", "remove", "x", "--keys", str(keys_file)]).exit_code == 1


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost:1"}, 200),
        ({"Origin": "null"}, 403),
    ],
)
def test_without_keys_no_other_sites_page_may_send(http, address, headers, status):
    answer = http.get("/v1/models", headers=headers)
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"]["code"] == "wrong_origin"
    assert http.get("/v1/models", headers={"Origin": address}).status_code == 200


# -- limits -----------------------------------------------------------------------------------------------------


def raw(address: str, data: bytes, wait: float = 10.0) -> bytes:
    """What is answered to bytes as they are."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as made:
        made.sendall(data)
        got = b""
        while part := made.recv(65536):
            got += part
            if b"\r\n\r\n" in got and b"}}" in got:
                break
        return got


def test_what_a_request_may_ask_is_limited(filled, listen):
    limits = Limits(body_bytes=10_000, upload_bytes=50_000, body_s=1, question_chars=500)
    address = listen(create_app(filled, limits=limits))
    post = lambda **how: httpx.post(f"{address}/v1/chat/completions", timeout=20, **how)  # noqa: E731
    large = post(json=CHAT | {"messages": user("x" * 20_000)})
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    assert "at most 10,000 bytes" in large.json()["error"]["message"]
    chunked = post(content=(b"x" * 1000 for _ in range(50)), headers={"content-type": "application/json"})
    assert (chunked.status_code, chunked.json()["error"]["code"]) == (413, "body_too_large")
    assert "at most 500 characters" in post(json=CHAT | {"messages": user("x" * 501)}).json()["error"]["message"]
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.APIStatusError) as refused:
            client.files.create(file=("a.md", b"x" * 120_000), purpose="assistants")
        assert refused.value.status_code == 413
        assert client.files.create(file=("a.md", b"x" * 40_000), purpose="assistants").bytes == 40_000
    for body, code in (
        (b"{", "invalid_json"),
        (b"[]", "invalid_value"),
        (b"\xff", "invalid"),
        (b"[" * 9000, "invalid"),
    ):
        got = post(content=body, headers={"content-type": "application/json"})
        assert got.status_code == 400 and got.json()["error"]["code"].startswith(code), got.text
    began = time.monotonic()
    half = raw(address, b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                        b"Content-Length: 500\r\n\r\n{\"model\":")  # fmt: skip
    assert b" 408 " in half.splitlines()[0] and b"body_timeout" in half and time.monotonic() - began < 5
    assert post(json=CHAT).is_success, "others are served as before"


def test_a_hundred_megabytes_are_refused_and_cost_no_memory(filled, listen):
    import resource

    address = listen(create_app(filled))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    part = b"x" * 1_000_000
    answer = httpx.post(f"{address}/v1/chat/completions", content=(part for _ in range(100)), timeout=60,
                        headers={"content-type": "application/json"})  # fmt: skip
    assert answer.status_code == 413
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB


def test_more_questions_than_places_and_queue_are_told_when_to_come_again(filled, listen, monkeypatch):
    go = threading.Event()
    stream = filled.stream
    monkeypatch.setattr(filled, "stream", lambda *args, **options: (go.wait(20), stream(*args, **options))[1])
    address = listen(create_app(filled, limits=Limits(concurrent=1, queue=1)))
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(f"{address}/v1/chat/completions", json=CHAT, timeout=30))

    def taken() -> float:
        figures = httpx.get(f"{address}/metrics").text.splitlines()
        return sum(float(line.split()[1]) for line in figures if line.startswith(("lloco_answering ", "lloco_queue ")))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for number, thread in enumerate(threads, start=1):
        thread.start()
        until(lambda wanted=number: taken() >= wanted)
    refused = httpx.post(f"{address}/v1/chat/completions", json=CHAT)
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    with (
        OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.RateLimitError),
    ):
        client.chat.completions.create(**CHAT)
    go.set()
    for thread in threads:
        thread.join()
    assert [one.status_code for one in answers] == [200, 200]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_its_answer(filled, listen, monkeypatch, stream):
    closed = threading.Event()
    real = filled.stream

    def slow(*args, **options):
        made = real(*args, **options)

        def endless():
            try:
                while True:
                    time.sleep(0.01)
                    yield "word "
            finally:
                closed.set()

        made._pieces = endless()
        return made

    monkeypatch.setattr(filled, "stream", slow)
    address = listen(create_app(filled, limits=Limits(concurrent=1, queue=0)))
    with httpx.Client() as client:
        if stream:
            with client.stream("POST", f"{address}/v1/chat/completions", json=CHAT | {"stream": True}) as answer:
                assert next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{address}/v1/chat/completions", json=CHAT, timeout=0.3)
    assert closed.wait(10), "the answer goes on though nobody reads it"
    monkeypatch.setattr(filled, "stream", real)
    until(lambda: httpx.post(f"{address}/v1/chat/completions", json=CHAT, timeout=10).is_success)


def test_a_client_that_reads_nothing_gives_its_place_up(filled, listen, monkeypatch):
    real = filled.stream

    def long(*args, **options):
        made = real(*args, **options)
        made._pieces = ("x" * 100_000 for _ in range(1000))
        return made

    monkeypatch.setattr(filled, "stream", long)
    address = listen(create_app(filled, limits=Limits(concurrent=1, queue=0, send_s=1)))
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps(CHAT | {"stream": True}).encode()
    with socket.create_connection((host, int(port))) as made:
        made.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                     b"Content-Length: %d\r\n\r\n%s" % (len(body), body))  # fmt: skip
        made.recv(10)
        assert httpx.post(f"{address}/v1/chat/completions", json=CHAT).status_code == 429
        monkeypatch.setattr(filled, "stream", real)
        until(lambda: httpx.post(f"{address}/v1/chat/completions", json=CHAT, timeout=10).is_success)


# -- operation --------------------------------------------------------------------------------------------------


def test_a_server_that_is_told_to_stop_finishes_its_answers(filled, monkeypatch):
    real, begun, go = filled.stream, threading.Event(), threading.Event()

    def slow(*args, **options):
        begun.set()
        assert go.wait(20)
        return real(*args, **options)

    own = filled.ask(QUESTION, max_new_tokens=4).text
    monkeypatch.setattr(filled, "stream", slow)
    got: list[httpx.Response] = []
    with serving(filled) as address:
        asking = threading.Thread(
            target=lambda: got.append(httpx.post(f"{address}/v1/chat/completions", json=CHAT, timeout=30))
        )
        asking.start()
        assert begun.wait(20)
        threading.Timer(0.3, go.set).start()
    asking.join()
    assert got[0].json()["choices"][0]["message"]["content"] == own


def test_a_store_has_one_server_at_a_time(filled):
    for _ in range(2):
        with serving(filled) as address:
            assert httpx.get(f"{address}/readyz").is_success
            with pytest.raises(StoreError, match="one server at a time"):
                create_app(filled)


def test_logs_are_json_without_texts(http, caplog, engine, monkeypatch):
    def failing(*_args, **_options):
        raise RuntimeError(f"something about {QUESTION}")

    with caplog.at_level(logging.INFO, "lloco.serve"):
        http.post("/v1/chat/completions", json=CHAT)
        monkeypatch.setattr(engine, "stream", failing)
        failed = http.post("/v1/chat/completions", json=CHAT)
        until(lambda: sum(record.getMessage() == "request" for record in caplog.records) == 2)
    assert failed.status_code == 500 and failed.json()["error"]["code"] == "internal_error"
    assert QUESTION not in failed.text and failed.headers["x-request-id"]
    lines = [json.loads(logs.JSONLines().format(record)) for record in caplog.records if record.name == "lloco.serve"]
    told = next(line for line in lines if line.get("status") == 200)
    assert told["route"] == "/v1/chat/completions" and told["ms"] > 0 and told["method"] == "POST"
    wrong = next(line for line in lines if "error" in line)
    assert wrong["error"] == "RuntimeError" and any("test_gate.py" in frame for frame in wrong["where"])
    assert "pump" not in json.dumps(lines)


def test_the_api_can_be_read_and_nothing_comes_from_other_hosts(http):
    page = http.get("/docs")
    assert not any(there in page.text for there in ("<script", "http://", "https://", "<link", "<img"))
    assert "/v1/chat/completions" in page.text and "no_repeat_ngram" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert http.get("/openapi.json").json()["info"]["title"] == "LLoCO"
    for path in ("/page/../app.py", "/page/%2e%2e%2fapp.py", "/page/nothing.js", "/nothing"):
        assert http.get(path).status_code == 404
    assert http.get("/nothing").json()["error"]["code"] == "unknown_url"
    assert http.put("/v1/models").json()["error"]["code"] == "method_not_allowed"
    file = http.post(
        "/v1/files", files={"file": ("a.md", b"<script>alert(1)</script> text")}, data={"purpose": "assistants"}
    )
    content = http.get(f"/v1/files/{file.json()['id']}/content")
    assert content.headers["content-type"] == "application/octet-stream"
    assert (
        content.headers["content-disposition"] == "attachment"
        and "sandbox" in content.headers["content-security-policy"]
    )
    assert content.headers["x-content-type-options"] == "nosniff"
    http.delete(f"/v1/files/{file.json()['id']}")
