"""Half a character in any text that comes in is refused in words; other odd text is read."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lloco_engine import ChunkConfig, Document, Engine, GenerateConfig, Turn
from lloco_engine.errors import ConfigError, StoreError
from lloco_engine.testing import HashingEmbedder
from lloco_engine.unicode import require_unicode

HALF = "caf\udce9"
SHORT = GenerateConfig(3)


@pytest.fixture(scope="module")
def engine(tiny_loaded, tmp_path_factory):
    store = tmp_path_factory.mktemp("unicode") / "store"
    with Engine.open(store, decoder=tiny_loaded, embedder=HashingEmbedder(), chunk=ChunkConfig(64, 32, 8)) as engine:
        engine.ingest(Document("d", "The café stands in hall three.", metadata={"k": "v"}))
        yield engine


CALLS = {
    "question": lambda e: e.ask(HALF),
    "a stream's question": lambda e: e.stream(HALF),
    "a search": lambda e: e.retrieve(HALF),
    "a comparison": lambda e: e.compare(HALF),
    "tenant": lambda e: e.ask("Where?", tenant=HALF),
    "a filter's value": lambda e: e.ask("Where?", filters={"k": HALF}),
    "a filter's values": lambda e: e.ask("Where?", filters={"k": ["v", HALF]}),
    "a filter's key": lambda e: e.retrieve("Where?", filters={HALF: "v"}),
    "a nested filter": lambda e: e.retrieve("Where?", filters={"$and": [{"k": {"$in": [HALF]}}]}),
    "history": lambda e: e.ask("Where?", history=[Turn("user", "a"), Turn("assistant", HALF)]),
    "context": lambda e: e.ask("Where?", context=HALF),
    "whole_document": lambda e: e.ask("Where?", whole_document=HALF),
    "an id to delete": lambda e: e.delete(HALF),
    "a tenant to delete from": lambda e: e.delete("d", tenant=HALF),
    "a text to find": lambda e: e.find_text(HALF),
    "a segment to find": lambda e: e.find_segment(HALF),
    "a text to count": lambda e: e.token_ids(HALF),
    "documents of a tenant": lambda e: e.documents(HALF),
    "a document's text": lambda e: e.store.document_text(HALF),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_half_a_character_is_refused_in_words(call, engine):
    with pytest.raises(ConfigError, match=r"must be valid Unicode, and character 3 of 'caf.udce9' is a lone surrogate"):
        call(engine)


WRONG = {
    "question": lambda e: e.ask(5),
    "tenant": lambda e: e.ask("Where?", tenant=3),
    "context": lambda e: e.ask("Where?", context=b"x"),
    "history": lambda e: e.ask("Where?", history=["What?"]),
    "hits": lambda e: e.ask("Where?", hits=[None]),
    "filter": lambda e: e.retrieve("Where?", filters="year>2020"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_argument_of_a_wrong_type_is_refused_by_name(name, engine):
    with pytest.raises(ConfigError, match=rf"{name} must be (text|a sequence|a mapping).*, not "):
        WRONG[name](engine)


@pytest.mark.parametrize("name", ["a\ud800", "a\0b"])
def test_a_store_has_a_name_that_the_system_can_have(name, engine, tmp_path):
    for call in (lambda: Engine.open(tmp_path / name), lambda: engine.backup(tmp_path / name)):
        with pytest.raises(StoreError, match="a store's folder must have a name"):
            call()


@pytest.mark.parametrize(
    "document",
    [
        Document(HALF, "Text."),
        Document("e", f"Text {HALF}."),
        Document("e", "Text.", title=HALF),
        Document("e", "Text.", source=HALF),
        Document("e", "Text.", metadata={"k": HALF}),
        Document("e", "Text.", metadata={HALF: "v"}),
        Document("e", "Text.", tenant=HALF),
    ],
    ids=["id", "text", "title", "source", "value", "key", "tenant"],
)
def test_half_a_character_in_a_document_refuses_that_one(document, engine):
    report = engine.ingest([document, Document("sound", "Another text.")])
    assert len(report.failed) == 1
    assert "surrogate" in report.failed[0].reason
    assert engine.documents("")[-1].doc_id == "sound"
    engine.delete("sound")


@pytest.mark.parametrize(
    "question", ["a\0b?", "\u200b?", "\ufeff?", "\uffff?", "\x1b[2J?", "e\u0301\u0301\u0301?", 'a" OR "b* NEAR(']
)
def test_other_odd_text_is_read(question, engine):
    assert engine.ask(question, generate=SHORT, context=question, history=[Turn("user", question)]).token_ids


def test_names_say_where_it_is():
    require_unicode(a="x", b=None, c={"k": [1, 2.5, True, b"\xff", "y"]})
    with pytest.raises(ConfigError, match=r"^c must be"):
        require_unicode(a="x", c={"k": ["y", {"z": HALF}]})


def test_arguments_of_the_command_line_that_are_not_utf8(engine):
    run = [os.fsencode(sys.executable), b"-m", b"lloco_engine", b"show", b"caf\xe9", b"--store"]
    done = subprocess.run([*run, os.fsencode(engine.store.path)], capture_output=True, check=False)
    assert done.returncode == 1
    assert b"error: text must be valid Unicode" in done.stderr
    assert b"Traceback" not in done.stderr
