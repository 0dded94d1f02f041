"""Refinement of a store: what it changes, what it leaves, and that it can die at any time."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lloco_engine import Document, Engine, refining
from lloco_engine.cli import app
from lloco_engine.cli.refine import parse_seconds, steps_of
from lloco_engine.compress.refinement import refine
from lloco_engine.config import ChunkConfig, CompressConfig, RefineConfig, StoreConfig
from lloco_engine.errors import ConfigError, NotInStore, SegmentUnavailable
from lloco_engine.store import Store, segments
from lloco_engine.testing import HashingEmbedder
from lloco_engine.types import Divergence

TESTS = Path(__file__).parent
FEW = RefineConfig(steps=4, stretch=32)
SMALL = ChunkConfig(segment_tokens=80, window_tokens=40, window_overlap=8)
MILLS = (
    "The mill at Orne has three wheels. Its keeper, Ada Brandt, came from the north in 1874 and never left. The third "
    "wheel was cast by Kessler. Nobody has turned it since the flood, and the sluice is shut with oak boards."
)
TRAMS = "A tram of the green line carries forty people and a dog; on Sundays none. The line ends at the salt."
DOCUMENTS = (Document("mills", MILLS), Document("trams", TRAMS))


@pytest.fixture(scope="module")
def filled(tmp_path_factory, tiny_loaded):
    path = tmp_path_factory.mktemp("refining") / "store"
    with opened(path, tiny_loaded) as engine:
        engine.ingest(DOCUMENTS)
    return path


def opened(path: Path, decoder, **changes) -> Engine:
    options = {"compress": CompressConfig(ratio=8), "chunk": SMALL}
    return Engine.open(path, decoder=decoder, embedder=HashingEmbedder(), **(options | changes))


@pytest.fixture
def engine(filled, tmp_path, tiny_loaded):
    """An engine on a store of its own, of two documents of three and two segments."""
    shutil.copytree(filled, tmp_path / "store")
    with opened(tmp_path / "store", tiny_loaded) as made:
        yield made


def ids(store: Store, *doc_ids: str) -> list[str]:
    return [hit.segment_id for doc_id in doc_ids or ("mills", "trams") for hit in store.chunks(doc_id)]


def parts(segment) -> list[torch.Tensor]:
    return [segment.keys, segment.values, segment.bias, segment.lengths]


def test_every_segment_is_what_refinement_makes_of_it(engine):
    store = engine.store
    former = {doc.doc_id: [store.load_segment(one) for one in ids(store, doc.doc_id)] for doc in DOCUMENTS}
    seen: list[refining.RefineProgress] = []
    generation = store.generation()
    report = engine.refine(config=FEW, progress=seen.append)
    assert (report.refined + report.kept, report.earlier, report.left, report.failed) == (len(seen), 0, 0, ())
    assert report.refined >= 1
    assert report.after < report.before
    assert [one.document for one in seen] == ["mills"] * len(former["mills"]) + ["trams"] * len(former["trams"])
    assert [one.done for one in seen] == list(range(1, len(seen) + 1))
    assert seen[-1].seconds_left == 0
    assert store.generation() > generation
    for document in DOCUMENTS:
        chunks = engine.chunker.split(document)
        now = [store.load_segment(one) for one in ids(store, document.doc_id)]
        for chunk, was, made in zip(chunks, former[document.doc_id], now, strict=True):
            expected = refine(engine.decoder, chunk.token_ids, was, FEW)
            assert made.divergence == expected.divergence
            for one, other in zip(parts(made), parts(expected), strict=True):
                assert torch.equal(one, other.to(one.dtype))
    assert store.verify() == []
    assert engine.ingest(DOCUMENTS).unchanged == ("mills", "trams")


def test_a_second_run_has_nothing_to_do(engine):
    engine.refine(config=FEW)
    made, before = ids(engine.store), engine.store.generation()
    report = engine.refine(config=RefineConfig(steps=8, stretch=32))
    assert (report.refined, report.kept, report.earlier) == (0, 0, len(made))
    assert (ids(engine.store), engine.store.generation()) == (made, before)


def test_what_got_worse_stays_and_is_not_tried_again(engine, monkeypatch):
    former = {one: engine.store.load_segment(one) for one in ids(engine.store)}
    rough = RefineConfig(steps=2, stretch=16, keys=1.0, values=1.0, biases=1.0)
    report = engine.refine(config=rough)
    assert report.kept == len(former)
    assert report.after == report.before > 0
    for was, now in zip(former.values(), map(engine.store.load_segment, ids(engine.store)), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(parts(was), parts(now), strict=True))
        assert now.divergence.after == now.divergence.before
    assert engine.refine(config=rough).earlier == len(former)


def test_hits_from_before_are_read_from_the_better_segment(engine):
    hits = engine.retrieve("Who kept the mill at Orne?")
    engine.refine(config=FEW)
    now = engine.store.current(hits)
    assert [hit.text for hit in now] == [hit.text for hit in hits]
    assert all(one.segment_id != other.segment_id for one, other in zip(now, hits, strict=True))
    answer = engine.ask("Who kept the mill at Orne?", hits=hits)
    assert [hit.segment_id for hit in answer.hits] == [hit.segment_id for hit in now]


def test_some_documents_and_a_budget(engine):
    report = engine.refine(["trams"], config=FEW, budget=1e-9)
    assert (report.refined + report.kept, report.left) == (0, len(ids(engine.store, "trams")))
    report = engine.refine(["trams"], config=FEW)
    assert report.left == 0
    assert all(engine.store.divergence(one) is None for one in ids(engine.store, "mills"))
    assert all(engine.store.divergence(one) is not None for one in ids(engine.store, "trams"))
    with pytest.raises(NotInStore, match="no document 'boats'"):
        engine.refine(["boats"], config=FEW)


def test_time_that_is_up_leaves_the_rest_for_the_next_run(engine, monkeypatch):
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(refining.time, "monotonic", lambda: next(clock))
    report = engine.refine(config=FEW, budget=100)
    monkeypatch.undo()
    done = report.refined + report.kept
    assert 0 < done < len(ids(engine.store))
    assert report.left == len(ids(engine.store)) - done
    rest = engine.refine(config=FEW)
    assert (rest.earlier, rest.left) == (done, 0)


def test_a_text_of_two_documents_is_refined_once(engine):
    engine.ingest([Document("copy", MILLS)])
    report = engine.refine(config=FEW)
    assert ids(engine.store, "copy") == ids(engine.store, "mills")
    assert report.refined + report.kept == len(set(ids(engine.store)))
    assert engine.store.verify() == []


def test_a_damaged_segment_fails_its_document_alone(engine):
    victim = ids(engine.store, "mills")[0]
    file = engine.store.path / "segments" / victim[:2] / f"{victim}.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    report = engine.refine(config=FEW)
    assert [failure.doc_id for failure in report.failed] == ["mills"]
    assert "damaged" in report.failed[0].reason
    assert report.refined + report.kept == len(ids(engine.store, "trams"))


def test_chunks_that_were_cut_otherwise_are_left_alone(engine, monkeypatch):
    before = ids(engine.store)
    shorter = ChunkConfig(segment_tokens=60, window_tokens=40, window_overlap=8)
    monkeypatch.setattr(engine._setup, "_chunk", shorter)
    monkeypatch.setitem(vars(engine._setup), "chunk", shorter)
    report = engine.refine(config=FEW)
    assert {failure.doc_id for failure in report.failed} <= {"mills", "trams"}
    assert "ingest it anew" in report.failed[0].reason
    assert set(ids(engine.store)) & set(before)
    assert report.refined + report.kept < len(before)


def test_refinement_within_ingest_is_kept_with_the_segment(tmp_path, tiny_loaded):
    compress = CompressConfig(ratio=8, settings={"refine": 4, "stretch": 32})
    with opened(tmp_path / "s", tiny_loaded, compress=compress) as engine:
        engine.ingest(DOCUMENTS)
        assert engine.manifest.compressor_settings["refine"] == 4
        told = [engine.store.divergence(one) for one in ids(engine.store)]
        assert all(one is not None and one.steps == 4 for one in told)
        assert engine.refine(config=FEW).earlier == len(told)


def test_int8_stores_are_refined_too(tmp_path, tiny_loaded):
    with opened(tmp_path / "s", tiny_loaded, store_config=StoreConfig(dtype="int8")) as engine:
        engine.ingest(DOCUMENTS)
        assert engine.refine(config=FEW).refined > 0
        assert engine.store.verify() == []


def test_the_divergence_is_under_the_checksum(engine):
    engine.refine(["trams"], config=FEW)
    form = engine.store.manifest.form
    one = ids(engine.store, "trams")[0]
    file = engine.store.path / "segments" / one[:2] / f"{one}.safetensors"
    data = file.read_bytes()
    told = segments.read(file, one, form).divergence
    assert isinstance(told, Divergence)
    text = f"{told.before!r} {told.after!r} {told.steps}".encode()
    assert data.count(text) == 1
    file.write_bytes(data.replace(text, text[:-1] + b"9"))
    with pytest.raises(SegmentUnavailable, match="does not match its checksum"):
        segments.read(file, one, form)


def test_no_steps_are_refused(engine):
    with pytest.raises(ConfigError, match="steps must be at least 1 to refine, not 0"):
        engine.refine(config=RefineConfig(steps=0))


# -- kill -9 ---------------------------------------------------------------------------------------------------------

_VICTIM = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_refining import FEW, opened
from lloco_engine.decoder.local import LocalDecoder
from lloco_engine.store import writer

calls = 0
def dies(function, at):
    def wrapped(*args, **options):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return wrapped

module, name, at = {place!r}
where = {{"os": os, "writer": writer, "Writer": writer.Writer}}[module]
with opened(Path({path!r}), LocalDecoder.load({decoder!r})) as engine:
    setattr(where, name, dies(getattr(where, name), at))
    engine.refine(config=FEW)
"""


@pytest.mark.parametrize(
    ("place", "committed"),
    [
        (("os", "replace", 2), 0),  # while the second segment's file is put in place
        (("writer", "_drop_unused", 1), 0),  # inside the transaction
        (("Writer", "_remove_files", 1), 1),  # committed, former files still there
    ],
)
def test_kill_leaves_each_segment_as_before_or_after(engine, filled, tiny_folder, tmp_path, place, committed):
    path = engine.store.path
    before = {doc.doc_id: ids(engine.store, doc.doc_id) for doc in DOCUMENTS}
    assert len(before["mills"]) == 3
    engine.close()
    code = _VICTIM.format(tests=str(TESTS), path=str(path), decoder=str(tiny_folder), place=place)
    died = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    with Store.open(path) as store:
        after = {doc.doc_id: ids(store, doc.doc_id) for doc in DOCUMENTS}
        changed = [doc_id for doc_id in before if before[doc_id] != after[doc_id]]
        assert changed == ["mills"][:committed]
        assert all(not set(before[doc_id]) & set(after[doc_id]) for doc_id in changed)
        assert {problem.kind for problem in store.verify()} <= {"orphan", "index"}
        assert not [problem for problem in store.verify() if problem.doc_ids]
    with opened(path, str(tiny_folder)) as again:
        report = again.refine(config=FEW)
        assert report.left == 0
        assert all(again.store.divergence(one) is not None for one in ids(again.store))
        with again.store.writer() as writer:
            writer.collect_garbage()
        assert again.store.verify() == []


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_tells_how_far_it_is_and_show_tells_the_divergence(engine, tiny_folder, monkeypatch):
    path = engine.store.path
    monkeypatch.setattr("lloco_engine.cli.stores.open_engine", lambda store, **_: opened(store, str(tiny_folder)))
    runner = CliRunner()
    done = runner.invoke(
        app, ["refine", "--store", str(path), "--steps", "4", "--stretch", "32", "--documents", "mills"]
    )
    assert done.exit_code == 0, done.output
    assert "1 of 3  mills  divergence" in done.stderr
    assert "min left" in done.stderr
    assert "0 done before, 0 left" in done.stdout
    shown = runner.invoke(app, ["show", "mills", "--store", str(path)])
    told = engine.store.divergence(ids(engine.store, "mills")[0])
    assert f"{told.before:.3f} -> {told.after:.3f}" in shown.stdout
    again = runner.invoke(app, ["refine", "--store", str(path), "--steps", "4", "--json", "--budget", "2h"])
    value = json.loads(again.stdout)
    assert value["earlier"] == 3
    assert value["left"] == 0
    assert runner.invoke(app, ["refine", "--store", str(path), "--budget", "soon"]).exit_code == 2
    assert runner.invoke(app, ["refine", "--store", str(path), "--steps", "some"]).exit_code == 2


def test_times_and_steps_as_a_shell_has_them():
    assert [parse_seconds(text) for text in ("90", "90s", "10m", "1.5h")] == [90, 90, 600, 5400]
    assert steps_of("12") == 12
    assert steps_of("auto") == RefineConfig().steps > 0
