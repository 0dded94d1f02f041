"""What an answer stands on, and that it says so: irrelevant hits, hits that are gone or forged, earlier turns."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from places import ROOT

from lloco_engine import (
    ChunkConfig,
    CompressConfig,
    ConfigError,
    Document,
    Engine,
    GenerateConfig,
    RetrieveConfig,
    SegmentUnavailable,
    Span,
    Turn,
)
from lloco_engine.demo import documents_folder, hard_questions
from lloco_engine.eval.scores import MOST_REFUSED
from lloco_engine.relevance import NOTHING, doubt, floor_of
from lloco_engine.retrieve import searched_for
from lloco_engine.testing import HashingEmbedder

SHORT = GenerateConfig(max_new_tokens=4)
TOPICS = ("pump", "crane", "valve", "mirror", "ladder", "kettle", "anvil", "barge")
QUESTION = "Where does the pump number 2 stand?"
NEVER = "Explain photosynthesis."


def story(topic: str) -> str:
    return " ".join(f"The {topic} number {number} stands in hall {number} of {topic}." for number in range(6))


@pytest.fixture(scope="module")
def filled(tmp_path_factory, decoder) -> Path:
    path = tmp_path_factory.mktemp("filled") / "store"
    options = {"chunk": ChunkConfig(256, 48, 8), "compress": CompressConfig("uncompressed", 1)}
    with Engine.open(path, decoder=decoder, embedder=HashingEmbedder(), **options) as made:
        made.ingest([Document(f"{topic}.md", story(topic), source=f"in/{topic}.md") for topic in TOPICS])
        made.ingest([Document("secret.md", story("vault"), tenant="acme")])
    return path


@pytest.fixture
def engine(filled, decoder, tmp_path):
    shutil.copytree(filled, tmp_path / "store")
    with Engine.open(tmp_path / "store", decoder=decoder, embedder=HashingEmbedder()) as made:
        yield made


# -- settings of search ----------------------------------------------------------------------------------------------


def test_a_call_sets_what_the_engine_leaves_open(engine, decoder):
    every = engine.retrieve(QUESTION, top_k=8)
    between = (every[0].score + every[1].score) / 2
    (best,) = engine.retrieve(QUESTION, min_score=between)
    assert (best.segment_id, best.score) == (every[0].segment_id, every[0].score)
    assert engine.ask(QUESTION, min_score=between, generate=SHORT).hits == (best,)
    assert engine.retrieve(QUESTION, lexical=0.0)[0].score != every[0].score
    with Engine.open(engine.store.path, decoder=decoder, embedder=engine.embedder, retrieve=RetrieveConfig(2)) as other:
        assert other.retrieve(QUESTION) == every[:2] and other.retrieve(QUESTION, top_k=3) == every[:3]
        assert len(other.ask(QUESTION, generate=SHORT).hits) == 2
    with pytest.raises(ConfigError, match="min_score must be between"):
        engine.retrieve(QUESTION, min_score=7)
    for call in (engine.retrieve, engine.ask):
        with pytest.raises(TypeError, match="'nothing'"):
            call(QUESTION, nothing=1)


# -- nothing that answers --------------------------------------------------------------------------------------------


def test_below_the_floor_the_answer_warns(engine):
    assert engine.ask(QUESTION, floor=0.3, generate=SHORT).warnings == ()
    answer = engine.ask(NEVER, floor=0.3, generate=SHORT)
    assert answer.hits and "no document seems to answer this: the best score is" in answer.warnings[0]
    given = engine.ask(NEVER, hits=engine.retrieve(NEVER), floor=0.3, generate=SHORT)
    assert given.warnings == answer.warnings and engine.doubt(list(answer.hits), 0.3) == answer.warnings[0]
    assert engine.ask(NEVER, generate=SHORT).warnings == (), "another embedder's scores have no floor of ours"


def test_it_can_refuse_and_the_decoder_is_not_asked(engine, monkeypatch):
    def refuse(*_: object, **__: object):
        raise AssertionError("the decoder was asked")

    plain = engine.ask(NEVER, hits=engine.store.chunks("pump.md"), when_nothing="refuse", floor=0.9, generate=SHORT)
    assert plain.text != NOTHING, "what was not searched for has no score to doubt"
    monkeypatch.setattr(type(engine.decoder), "stream", refuse)
    for options in ({"floor": 0.3}, {"min_score": 0.9}, {"filters": {"doc_id": "none"}}, {"hits": ()}):
        answer = engine.ask(NEVER, when_nothing="refuse", **options)
        assert (answer.text, answer.hits, answer.usage.completion_tokens) == (NOTHING, (), 0)
    with pytest.raises(AssertionError):
        engine.ask(NEVER, when_nothing="refuse", floor=0.3, context="Plants turn light into sugar.")


def test_a_floor_is_the_embedders_and_of_one_share_of_words(engine):
    known = "770c70ae18e7b62c"
    assert 0.2 < floor_of(RetrieveConfig(), known) < 0.4
    assert floor_of(RetrieveConfig(lexical=0.2), known) == floor_of(RetrieveConfig(), "another") == -1
    assert floor_of(RetrieveConfig(floor=0.7), "another") == 0.7
    (hit,) = engine.retrieve(QUESTION, top_k=1)
    assert doubt([replace(hit, score=0.29), replace(hit, score=0.0, windows=())], 0.3) and not doubt(
        [replace(hit, score=0.3)], 0.3
    )
    beside = replace(hit, score=0.0, windows=())
    assert doubt([beside], 0.3) is None and doubt([], 0.3) is None and doubt([replace(beside, score=1.0)], 0.3) is None


# -- hits that are given back ----------------------------------------------------------------------------------------


def test_a_deleted_documents_hit_is_not_cited(engine):
    hits = engine.retrieve("Where does number 2 stand?", top_k=8)
    engine.delete("crane.md")
    answer = engine.ask("Where?", hits=hits, generate=SHORT)
    assert "crane.md" not in {hit.doc_id for hit in answer.hits} and len(answer.hits) == len(hits) - 1
    assert answer.warnings[0].startswith("1 of 8 segments are not in the store any more") and "crane.md" in str(
        answer.warnings
    )
    with pytest.raises(SegmentUnavailable, match=r"'crane\.md' was replaced or deleted since; retrieve again"):
        engine.ask("Where?", hits=[hit for hit in hits if hit.doc_id == "crane.md"])


def test_a_replaced_document_is_cited_as_it_is_now(engine):
    (hit,) = engine.retrieve(QUESTION, top_k=1)
    engine.ingest(
        [
            Document("pump.md", story("pump"), source="moved/pump.md", metadata={"year": 2}),
            Document("crane.md", story("crane") + " It was sold."),
        ]
    )
    (read,) = engine.ask("Where?", hits=[hit], generate=SHORT).hits
    assert read.metadata == {"year": 2} and read.score == hit.score and read.windows == hit.windows


def test_a_forged_hit_is_looked_up(engine):
    (hit,) = engine.retrieve(QUESTION, top_k=1)
    (secret,) = engine.store.chunks("secret.md", "acme")
    forged = replace(
        hit,
        text="The pump is on the moon.",
        source="moon.pdf",
        title="Moon",
        metadata={"a": 1},
        version=9,
        score=float("nan"),
        windows=(Span(-5, 3), Span(0, 10**9)),
        also_in=("secret.md", "crane.md"),
    )
    (read,) = engine.ask("Where?", hits=[forged], generate=SHORT).hits
    assert read == replace(hit, score=0.0, windows=())
    for strange in (secret.segment_id, "../../manifest"):  # a place and its text name a segment that was replaced since
        (read,) = engine.ask("Where?", hits=[replace(hit, segment_id=strange)], generate=SHORT).hits
        assert read == hit
    for other in (
        replace(hit, segment_id=secret.segment_id, text="The pump is on the moon."),
        replace(hit, segment_id=secret.segment_id, ordinal=hit.ordinal + 1),
        replace(hit, doc_id="secret.md", segment_id=secret.segment_id),
        replace(secret, tenant=""),
        replace(hit, doc_id="crane.md"),
    ):
        with pytest.raises(SegmentUnavailable, match="not in the store any more"):
            engine.ask("Where?", hits=[other], generate=SHORT)


def test_what_vanishes_between_search_and_reading_is_named(engine, monkeypatch):
    real = engine.store.load_segment
    gone: list[str] = []

    def load(segment_id: str, *args: object, **options: object):
        segment = real(segment_id, *args, **options)
        if not gone:  # the first segment is read, and then its document goes
            gone.extend(hit.doc_id for hit in engine.find_segment(segment_id))
            engine.delete(gone[0])
        return segment

    monkeypatch.setattr(engine.store, "load_segment", load)
    answer = engine.ask("Where does number 2 stand?", generate=SHORT)
    assert gone[0] not in {hit.doc_id for hit in answer.hits} and len(answer.hits) == 3
    assert f"{gone[0]!r} was replaced or deleted since" in answer.warnings[0]


# -- one text in several documents -----------------------------------------------------------------------------------


def test_a_text_of_several_documents_is_cited_as_the_one_that_is_meant(engine):
    engine.ingest([Document(f"copy-{n}.md", story("pump"), source=f"copies/{n}.md", metadata={"n": n}) for n in (1, 2)])
    (first, *_) = engine.retrieve(QUESTION)
    assert first.doc_id == "pump.md" and set(first.also_in) == {"copy-1.md", "copy-2.md"}
    (own,) = engine.retrieve(QUESTION, filters={"doc_id": "copy-2.md"})
    assert own.doc_id == "copy-2.md" and own.also_in == (), "a document that a filter shuts out is not named"
    assert engine.ask("Where?", hits=[own], generate=SHORT).hits == (own,)
    both = engine.ask("Where?", hits=[own, first], generate=SHORT).hits
    assert [hit.doc_id for hit in both] == ["copy-2.md"] and "pump.md" in both[0].also_in
    for about in ({"source": "copies/2.md"}, {"id": "copy-2.md"}, {"n": 2}, {"file": "copies/2.md", "n": 1}):
        (found,) = engine.find_text(story("pump"), about=about)
        assert found.doc_id == "copy-2.md" and set(found.also_in) == {"pump.md", "copy-1.md"}
    assert engine.find_text(story("pump"), about={"n": [1]})[0].doc_id == "pump.md"
    engine.delete("pump.md")
    (left,) = engine.find_text(story("pump"))
    assert left.doc_id == "copy-1.md" and left.also_in == ("copy-2.md",)


# -- conversations ---------------------------------------------------------------------------------------------------


def test_a_follow_up_is_searched_for_after_the_turn_before_and_alone():
    history = [Turn("user", "Where is the pump?"), Turn("assistant", "In hall 2."), Turn("user", "Who made it?")]
    assert searched_for("And when?", history[2:]) == ["Who made it?\nAnd when?", "And when?"]
    expected = ["Who made it?\nAnd when?", "And when?", "Where is the pump?\nWho made it?\nAnd when?"]
    assert searched_for("And when?", history) == expected, "the turn before may be a follow-up, too"
    assert searched_for("When?", [Turn("assistant", "Hello.")]) == searched_for("When?", ()) == ["When?"]


def test_a_follow_up_finds_what_it_is_about_and_a_new_topic_its_own(engine, monkeypatch):
    history = [Turn("user", "Where does the anvil stand?"), Turn("assistant", "In hall 2.")]
    follow = engine.retrieve("And number 4?", top_k=2, history=history)
    assert follow[0].doc_id == "anvil.md" and len(follow) == 2
    assert engine.retrieve(QUESTION, history=history, top_k=1)[0].doc_id == "pump.md"
    longer = [*history, Turn("user", "Thanks!"), Turn("assistant", "Gladly.")]
    assert engine.retrieve("Why so?", top_k=1, history=longer)[0].doc_id == "anvil.md"
    assert engine.retrieve(QUESTION, history=longer, top_k=1)[0].doc_id == "pump.md"
    answer = engine.ask("And number 4?", top_k=2, history=history, generate=SHORT)
    assert answer.hits == tuple(follow)
    alone = {hit.segment_id: hit.score for hit in engine.retrieve("And number 4?", top_k=8)}
    assert all(hit.score >= alone.get(hit.segment_id, -1) for hit in follow)
    searched: list[str] = []
    monkeypatch.setattr(engine, "retrieve", lambda question, **_: searched.append(question) or [])
    engine.ask("And number 4?", hits=follow, history=history, generate=SHORT)
    assert searched == [], "who brings hits has searched already"


def test_neighbours_of_a_follow_up_stand_beside_what_was_found(engine):
    engine.ingest([Document("long.md", " ".join(story(topic) for topic in TOPICS))])
    history = [Turn("user", "Where does the anvil stand?")]
    hits = engine.retrieve("And number 4?", top_k=2, neighbours=1, history=history)
    found = [hit for hit in hits if hit.score]
    assert len(found) == 2 and len(hits) > 2
    assert all(any(abs(hit.ordinal - one.ordinal) <= 1 for one in found if one.doc_id == hit.doc_id) for hit in hits)


# -- the floor that was measured -------------------------------------------------------------------------------------


def test_the_floor_is_the_one_that_was_measured():
    measured = json.loads((ROOT / "results" / "scores.json").read_text(encoding="utf-8"))
    assert floor_of(RetrieveConfig(), measured["embedder_fingerprint"]) == measured["floor"]
    assert measured["lexical"] == RetrieveConfig.lexical and measured["most_refused"] == MOST_REFUSED
    for row in measured["rows"]:
        assert not row["answered"] or row["below_floor"] <= MOST_REFUSED * row["count"]


def test_the_hard_questions_are_of_the_demo():
    texts = [path.read_text(encoding="utf-8") for path in documents_folder().iterdir()]
    hard = hard_questions()
    assert all(any(case["evidence"] in text for text in texts) for case in hard["follow_ups"])
    assert len(hard["near"]) == len(hard["foreign"]) == 24 and len(hard["follow_ups"]) == 28
