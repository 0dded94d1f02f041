"""Questions from several threads and async clients at the same time, beside an ingest: each is answered as alone."""

from __future__ import annotations

import asyncio
import threading

from lloco_engine import Document, Engine
from lloco_engine.config import ChunkConfig, CompressConfig, GenerateConfig
from lloco_engine.eval import beside
from lloco_engine.testing import HashingEmbedder

SMALL = ChunkConfig(segment_tokens=64, window_tokens=24, window_overlap=4)
LONG = GenerateConfig(max_new_tokens=48, min_new_tokens=48)
TOPICS = ("pump", "crane", "mill", "tram", "weir")


def story(topic: str) -> Document:
    return Document(f"{topic}.md", " ".join(f"The {topic} number {n} stands in hall {n} of {topic}." for n in range(9)))


async def test_threads_and_async_clients_beside_an_ingest_are_answered_as_alone(tmp_path, tiny_folder):
    options = {"embedder": HashingEmbedder(), "chunk": SMALL, "compress": CompressConfig("uncompressed", 1)}
    with Engine.open(tmp_path / "store", decoder=str(tiny_folder), **options) as engine:
        engine.ingest([story(topic) for topic in TOPICS])
        questions = [f"Where stands {topic} number {n}?" for n, topic in enumerate(TOPICS)]
        hits = [engine.retrieve(question) for question in questions]
        alone = [engine.ask(q, hits=h, generate=LONG).token_ids for q, h in zip(questions, hits, strict=True)]
        sampled = engine.ask(questions[0], hits=hits[0], generate=LONG, temperature=1.0, seed=5).token_ids
        shared = []
        run = engine.decoder._joint.run
        engine.decoder._joint.run = lambda streams: (shared.append(len(streams)), run(streams))[1]
        ingest = threading.Thread(target=lambda: engine.ingest([story(f"other {n}") for n in range(4)]))
        ingest.start()
        given = await asyncio.gather(
            *(engine.aask(q, hits=h, generate=LONG) for q, h in zip(questions, hits, strict=True)),
            engine.aask(questions[0], hits=hits[0], generate=LONG, temperature=1.0, seed=5),
        )
        ingest.join()
        assert [answer.token_ids for answer in given] == [*alone, sampled]
        assert max(shared) > 1
        assert len(engine.documents()) == 9 and engine.verify() == []


def test_what_is_measured_beside_each_other_is_what_is_answered_alone(tmp_path, tiny_folder):
    with Engine.open(tmp_path / "store", decoder=str(tiny_folder), embedder=HashingEmbedder(), chunk=SMALL) as engine:
        engine.ingest([story(topic) for topic in TOPICS[:2]])
        measured = beside.run(engine, ["Where stands pump number 3?", "Which hall?"], (1, 2), new_tokens=6, rounds=1)
    assert measured["same_answers"] == {1: 1.0, 2: 1.0}
    assert measured["over_first"][1] == 1.0
    assert set(measured["tokens_per_s"]) == {1, 2} == set(measured["decode_tokens_per_s"])
