"""Files, vector stores and search by the official client; what the store holds; and what a kill leaves."""

from __future__ import annotations

import io
import json
import threading
from dataclasses import replace

import numpy as np
import openai
import pytest
from serve_cases import CRANES, PUMPS, until, user

TEXT = b"The weir at Brindle was built by Ada Moss. It has nine sluices and a white gate."


def upload(client, name="weir.md", text=TEXT):
    return client.files.create(file=(name, io.BytesIO(text)), purpose="assistants")


def test_a_file_is_uploaded_attached_asked_searched_and_deleted(client, http, engine):
    file = upload(client)
    assert (file.filename, file.bytes, file.status, file.object) == ("weir.md", len(TEXT), "processed", "file")
    assert client.files.retrieve(file.id) == file and file in list(client.files.list())
    assert client.files.content(file.id).read() == TEXT
    store = client.vector_stores.create(name="Weirs", metadata={"a": "b"})
    assert (store.name, store.metadata, store.file_counts.total) == ("Weirs", {"a": "b"}, 0)
    held = client.vector_stores.files.create_and_poll(
        file.id, vector_store_id=store.id, attributes={"year": 1850, "kind": "weir"}
    )
    assert (held.status, held.last_error, held.attributes) == ("completed", None, {"year": 1850, "kind": "weir"})
    document = held.lloco["document"]
    assert document == f"{file.id}@{store.id}" and held.usage_bytes > 0
    assert client.vector_stores.retrieve(store.id).file_counts.completed == 1
    assert [one.id for one in client.vector_stores.files.list(store.id)] == [file.id]

    known = {one["id"]: one for one in http.get("/lloco/documents").json()["data"]}[document]
    assert (known["title"], known["source"], known["file_id"]) == ("weir.md", "weir.md", file.id)
    assert known["metadata"] == {"year": 1850, "kind": "weir", "group": store.id}
    assert known["tokens"] > 0 and known["slots"] > 0 and known["segments"] > 0
    read = http.get(f"/lloco/documents/{document}/text", params={"start": 4, "end": 8}).json()
    assert (read["text"], read["length"]) == ("weir", len(TEXT))

    found = client.vector_stores.search(store.id, query="Who built the weir at Brindle?")
    assert {(one.file_id, one.filename) for one in found} == {(file.id, "weir.md")}
    assert found.data[0].content[0].text in TEXT.decode() and 0 < found.data[0].score <= 1
    wanted = {"type": "and", "filters": [{"type": "gt", "key": "year", "value": 1900}]}
    assert client.vector_stores.search(store.id, query="weir", filters=wanted).data == []
    strict = {"score_threshold": 1.0}
    assert client.vector_stores.search(store.id, query="weir", ranking_options=strict).data == []

    answer = client.chat.completions.create(
        model="lloco", messages=user("weir?"), max_tokens=4, extra_body={"filters": {"group": store.id}}
    )
    assert {one.file_citation["file_id"] for one in answer.choices[0].message.annotations} == {file.id}

    with pytest.raises(openai.ConflictError, match="take it out first"):
        client.vector_stores.files.create(store.id, file_id=file.id)
    assert client.vector_stores.files.delete(file.id, vector_store_id=store.id).deleted
    assert engine.store.find_documents({"group": store.id}) == []
    client.vector_stores.files.create_and_poll(file.id, vector_store_id=store.id)
    assert client.files.delete(file.id).deleted
    assert engine.store.find_documents({"group": store.id}) == []
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    assert client.vector_stores.delete(store.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.vector_stores.retrieve(store.id)


def test_a_group_of_any_name_has_an_id_that_fits_into_an_address(client, engine):
    group = "oil & gas/2026 100%, 日本"
    engine.ingest([replace(PUMPS, doc_id="in/a b.md", metadata={"group": group})])
    (known,) = [one for one in client.vector_stores.list() if one.name == group]
    assert known.id == "oil%20%26%20gas%2F2026%20100%25%2C%20日本"
    assert [one.id for one in client.vector_stores.files.list(known.id)] == ["in/a b.md"]
    assert client.vector_stores.files.retrieve("in/a b.md", vector_store_id=known.id).status == "completed"
    file = upload(client, "c.md", b"# Cranes\n\nThe crane of the quay lifts nine tonnes.")
    client.vector_stores.files.create_and_poll(file.id, vector_store_id=known.id)
    assert len(engine.store.find_documents({"group": group})) == 2
    assert client.vector_stores.retrieve(known.id).file_counts.completed == 2
    assert file.id in [one.file_id for one in client.vector_stores.search(known.id, query="crane")]
    assert client.vector_stores.delete(known.id).deleted
    assert engine.store.find_documents({"group": group}) == []


def test_groups_that_were_ingested_otherwise_are_vector_stores(client, http):
    names = [store.id for store in client.vector_stores.list()]
    assert names[-2:] == ["default", "mill"]
    assert [one.id for one in client.vector_stores.files.list("mill")] == [PUMPS.doc_id]
    assert [one.id for one in client.vector_stores.files.list("default")] == [CRANES.doc_id]
    assert client.vector_stores.files.retrieve(CRANES.doc_id, vector_store_id="default").status == "completed"
    assert [one.file_id for one in client.vector_stores.search("default", query="crane pump")][:1] == [CRANES.doc_id]
    assert http.get("/lloco/documents/in/cranes.md/text").json()["text"] == CRANES.text


def test_a_batch_is_polled_and_cut_off(client):
    store = client.vector_stores.create()
    files = [io.BytesIO(TEXT + str(number).encode()) for number in range(3)]
    for number, file in enumerate(files):
        file.name = f"weir {number}.txt"
    batch = client.vector_stores.file_batches.upload_and_poll(store.id, files=files)
    assert (batch.status, batch.file_counts.completed, batch.file_counts.total) == ("completed", 3, 3)
    assert len(list(client.vector_stores.file_batches.list_files(batch.id, vector_store_id=store.id))) == 3
    assert client.vector_stores.file_batches.cancel(batch.id, vector_store_id=store.id).file_counts.completed == 3
    assert client.vector_stores.delete(store.id).deleted


def test_a_file_of_records_becomes_several_documents(client, engine):
    texts = {"a": "The mill has nine wheels.", "b": "The weir is white.", "c": ""}
    lines = "\n".join(json.dumps({"doc_id": name, "text": text}) for name, text in texts.items()).encode()
    file = upload(client, "records.jsonl", lines)
    held = client.vector_stores.files.create_and_poll(file.id, vector_store_id="default")
    assert held.status == "completed" and "1 of 3 records were left out" in held.last_error.message
    assert held.lloco["documents"] == [f"{file.id}@default/a", f"{file.id}@default/b"]
    assert client.files.delete(file.id).deleted
    assert not [one for one in engine.documents("") if one.doc_id.startswith(file.id)]


def test_what_cannot_be_read_fails_and_says_why_without_a_path(client, engine):
    file = upload(client, "empty.md", b"  \n")
    held = client.vector_stores.files.create_and_poll(file.id, vector_store_id="default")
    assert (held.status, held.last_error.code) == ("failed", "invalid_file")
    assert "blank" in held.last_error.message and str(engine.store.path) not in held.last_error.message
    with pytest.raises(openai.BadRequestError, match=r"must end with .*\.md") as refused:
        upload(client, "program.exe")
    assert refused.value.code == "unsupported_file"
    with pytest.raises(openai.BadRequestError, match="a purpose must be one of assistants, user_data, not 'fine-tune'"):
        client.files.create(file=("a.md", TEXT), purpose="fine-tune")


@pytest.mark.parametrize("name", ["../../../etc/passwd.md", "..\\..\\evil.md", "/abs.md", "a\0b.md", "<script>x.md"])
def test_no_file_name_leaves_the_store(client, engine, name):
    before = {path for path in engine.store.path.parent.rglob("*") if "serve/files" not in str(path)}
    file = upload(client, name)
    made = [path for path in (engine.store.path / "serve" / "files").rglob("content*") if file.id in str(path)]
    assert [path.name for path in made] == ["content.md"]
    assert "/" not in file.filename and "\\" not in file.filename and "\0" not in file.filename
    after = {path for path in engine.store.path.parent.rglob("*") if "serve/files" not in str(path)}
    assert {path.name for path in after - before} <= {"records.sqlite-wal", "records.sqlite-shm"}
    client.files.delete(file.id)


def test_attributes_must_be_metadata(client):
    file = upload(client)
    for attributes in ({"group": "x"}, {"tenant": "x"}, {"doc_id": "x"}):
        with pytest.raises(openai.BadRequestError, match="must not use the names"):
            client.vector_stores.files.create("default", file_id=file.id, attributes=attributes)
    with pytest.raises(openai.BadRequestError):
        client.vector_stores.files.create("default", file_id=file.id, attributes={"a": ["list"]})
    with pytest.raises(openai.BadRequestError, match="chunking_strategy"):
        client.vector_stores.files.create("default", file_id=file.id, chunking_strategy={"type": "static"})
    client.files.delete(file.id)


def test_embeddings_are_the_stores_own_vectors(client, engine):
    texts = ["The pump.", "Two cranes."]
    made = client.embeddings.create(model="lloco-embeddings", input=texts)
    own = engine.embedder.encode(texts)
    np.testing.assert_allclose([one.embedding for one in made.data], own, rtol=1e-6)
    plain = client.embeddings.create(model="lloco-embeddings", input="The pump.", encoding_format="float")
    np.testing.assert_allclose(plain.data[0].embedding, own[0], rtol=1e-6)
    assert made.usage.total_tokens == sum(len(engine.token_ids(text)) for text in texts)
    for more, says in (({"dimensions": 3}, "dimensions must be 64"), ({"input": ""}, "from 1 to 32,000")):
        with pytest.raises(openai.BadRequestError, match=says):
            client.embeddings.create(**({"model": "lloco-embeddings", "input": "a"} | more))
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model="lloco-embeddings", input=[[1, 2]])
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="text-embedding-3-small", input="a")


def test_lists_come_in_pages(client):
    made = [upload(client, f"{number}.md").id for number in range(5)]
    first = client.files.list(limit=2)
    assert [one.id for one in first.data] == [made[4], made[3]] and first.has_more
    assert [one.id for one in client.files.list(limit=2)][:5] == made[::-1]  # all pages
    assert [one.id for one in client.files.list(order="asc", after=made[1], limit=2).data] == made[2:4]
    for file in made:
        client.files.delete(file)


def test_what_the_store_holds_and_costs(http, engine):
    told = http.get("/lloco/store").json()
    own = engine.documents("")
    assert told["documents"] == len(own) and told["tokens"] == sum(one.source_tokens for one in own)
    assert told["bytes"] == sum(one.bytes for one in own) and told["bytes_per_token"] > 0
    assert (told["read_only"], told["tenant"], told["window"]) == (False, "", 4096)


def test_a_document_is_deleted_by_its_id(http, client, engine):
    file = upload(client)
    held = client.vector_stores.files.create_and_poll(file.id, vector_store_id="default")
    assert http.delete(f"/lloco/documents/{held.lloco['document']}").json()["deleted"]
    assert file.id not in [one.id for one in client.vector_stores.files.list("default")]
    assert http.delete("/lloco/documents/nothing.md").status_code == 404
    client.files.delete(file.id)


def test_a_file_that_is_taken_out_while_it_is_compressed_is_gone(client, engine, monkeypatch):
    begun, go = threading.Event(), threading.Event()
    compress = engine.compressor.compress

    def slow(*args, **options):
        begun.set()
        assert go.wait(20)
        return compress(*args, **options)

    monkeypatch.setattr(engine.compressor, "compress", slow)
    file = upload(client, "slow.md", b"A text that nobody has ever written before.")
    store = client.vector_stores.create()
    assert client.vector_stores.files.create(store.id, file_id=file.id).status == "in_progress"
    assert begun.wait(20)
    held = client.vector_stores.files.retrieve(file.id, vector_store_id=store.id)
    assert (held.status, held.lloco["segments_total"]) == ("in_progress", 1)
    assert client.files.delete(file.id).deleted
    go.set()
    until(lambda: not engine.store.find_documents({"group": store.id}))
    with pytest.raises(openai.NotFoundError):
        client.vector_stores.files.retrieve(file.id, vector_store_id=store.id)
