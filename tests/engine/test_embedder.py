"""The embedder: offline, lazy, unit vectors, told apart by fingerprint. And its double keeps the same promises."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from lloco_engine.embedder import Embedder
from lloco_engine.errors import ModelNotFound
from lloco_engine.models import embedder_folder
from lloco_engine.testing import HashingEmbedder


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder(device="cpu")


@pytest.fixture(scope="module", params=["embedded", "double"])
def either(request, embedder):
    return embedder if request.param == "embedded" else HashingEmbedder()


def test_vectors_are_unit_float32_rows(either):
    vectors = either.encode(["a pump", "a crane that fell", ""])
    assert vectors.shape == (3, either.dim)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)


def test_no_texts_give_no_rows(either):
    assert either.encode([]).shape == (0, either.dim)
    assert either.encode([]).dtype == np.float32


def test_near_texts_are_near(either):
    pump, near, far = either.encode(["the pump needs oil", "oil for the pump", "an essay about painting in Venice"])
    assert pump @ near > pump @ far + 0.2


def test_a_text_has_the_same_vector_in_any_batch(either):
    texts = [f"text number {n} " * n for n in range(1, 9)]
    together = either.encode(texts, batch_size=3)
    for text, vector in zip(texts, together, strict=True):
        np.testing.assert_allclose(either.encode([text])[0], vector, atol=1e-5)


def test_nothing_is_read_before_it_is_needed():
    assert Embedder("no/such/embedder/anywhere").name == "no/such/embedder/anywhere"


def test_an_unknown_embedder_is_named():
    unknown = Embedder("/no/such/folder")
    with pytest.raises(
        ModelNotFound, match="embedder is 'embedded', a local folder or a hub id, and '/no/such/folder'"
    ):
        unknown.encode(["x"])
    with pytest.raises(ModelNotFound):
        _ = unknown.fingerprint


def test_the_network_is_never_tried(monkeypatch, capfd):
    def refuse(*_):
        raise AssertionError("the network was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert Embedder(device="cpu").encode(["x"]).shape == (1, 384)
    assert capfd.readouterr() == ("", "")


def test_a_copy_has_the_same_fingerprint_and_a_change_shows(embedder, tmp_path):
    copy = Path(shutil.copytree(embedder_folder(), tmp_path / "copy"))
    assert Embedder(str(copy)).fingerprint == embedder.fingerprint
    pooling = copy / "1_Pooling" / "config.json"
    pooling.write_text(
        pooling.read_text().replace('"pooling_mode_mean_tokens": true', '"pooling_mode_mean_tokens": false')
    )
    assert Embedder(str(copy)).fingerprint != embedder.fingerprint


def test_threads_can_share_one(embedder):
    texts = [f"{'word ' * n}{n}" for n in range(12)]
    alone = [embedder.encode([text])[0] for text in texts]
    found: dict[int, np.ndarray] = {}

    def work(n: int) -> None:
        found[n] = embedder.encode([texts[n]])[0]

    threads = [Thread(target=work, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, vector in enumerate(alone):
        np.testing.assert_allclose(found[n], vector, atol=1e-6)


def test_prompts_of_an_embedder_are_put_before_questions_and_documents(tmp_path):
    plain = Embedder()
    folder = tmp_path / "prompted"
    shutil.copytree(plain.folder, folder)
    file = folder / "config_sentence_transformers.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(config | {"prompts": {"query": "query: ", "document": "passage: "}}))
    prompted = Embedder(str(folder))
    assert np.allclose(prompted.encode_query(["pump"]), plain.encode(["query: pump"]), atol=1e-5)
    assert np.allclose(prompted.encode(["pump"]), plain.encode(["passage: pump"]), atol=1e-5)
    assert np.allclose(plain.encode_query(["pump"]), plain.encode(["pump"]), atol=1e-6)
    assert prompted.fingerprint != plain.fingerprint, "its vectors are others"
