"""Segments made by workers: the store is that of a single process, whoever dies, and whatever a worker says."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from cluster_cases import TeamCluster, content, differing, documents, opened
from summary_cases import save_tiny_autocompressor

from lloco_engine import Document, jobs
from lloco_engine.cluster import RayCluster
from lloco_engine.cluster.pool import Pool
from lloco_engine.cluster.worker import Outcome
from lloco_engine.config import CompressConfig, RefineConfig
from lloco_engine.errors import ConfigError, LLoCOError, StoreMismatch
from lloco_engine.testing import save_tiny_decoder
from lloco_engine.types import IngestReport

DOCUMENTS = documents(12)


def told(report: IngestReport) -> dict:
    return {name: value for name, value in asdict(report).items() if name not in ("compress_s", "seconds")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_loaded):
    """What a single process makes of the documents, and says of it."""
    path = tmp_path_factory.mktemp("alone") / "store"
    with opened(path, tiny_loaded) as engine:
        report = engine.ingest(DOCUMENTS)
    return path, told(report)


def run(path, tiny_loaded, cluster, sources=DOCUMENTS, **options):
    with opened(path, tiny_loaded) as engine:
        return engine.ingest(sources, cluster=cluster, **options)


@pytest.mark.parametrize("seed", range(3))
def test_the_store_is_that_of_a_single_process(tmp_path, tiny_loaded, alone, seed):
    cluster = TeamCluster(seed=seed)
    seen = []
    report = run(tmp_path / "store", tiny_loaded, cluster, progress=seen.append)
    assert told(report) == alone[1]
    assert differing(tmp_path / "store", alone[0]) == []
    assert len(cluster.team.sent) == report.segments > 15
    assert cluster.team.hired == 3 < cluster.team.most
    assert cluster.team.is_closed
    assert [one.document for one in seen if one.done_segments == 0] == [one.doc_id for one in DOCUMENTS]
    assert seen[-1].source_tokens_done == report.source_tokens
    assert seen[-1].tokens_per_s > 0


def test_workers_that_die_cost_their_jobs_and_no_more(tmp_path, tiny_loaded, alone):
    cluster = TeamCluster(dies=lambda job, number: number in (2, 6, 11))
    report = run(tmp_path / "store", tiny_loaded, cluster)
    assert told(report) == alone[1]
    assert differing(tmp_path / "store", alone[0]) == []
    assert cluster.team.deaths > 1
    assert cluster.team.hired == 3 + cluster.team.deaths
    assert len(cluster.team.sent) <= report.segments + 2 * cluster.team.deaths  # what it did, and what waited


def test_a_job_that_ends_every_worker_fails_its_document_alone(tmp_path, tiny_loaded):
    bad = Document("bad", "the worker of this one dies, always")
    with opened(tmp_path / "here", tiny_loaded) as engine:
        (chunk,) = engine.chunker.split(bad)
    cluster = TeamCluster(dies=lambda job, number: job.token_ids == chunk.token_ids)
    report = run(tmp_path / "store", tiny_loaded, cluster, [*DOCUMENTS[:3], bad, *DOCUMENTS[3:6]])
    assert list(report.added) == [one.doc_id for one in DOCUMENTS[:6]]
    (failure,) = report.failed
    assert failure.doc_id == "bad"
    assert "3 died of it (killed)" in failure.reason
    assert cluster.team.deaths == 3


def test_documents_that_cannot_be_used_are_failures_as_in_a_single_process(tmp_path, tiny_loaded):
    sources = [*DOCUMENTS[:2], Document("empty", ""), DOCUMENTS[0], tmp_path / "none.txt", *DOCUMENTS[2:4]]
    with opened(tmp_path / "alone", tiny_loaded) as engine:
        expected = engine.ingest(sources)
    report = run(tmp_path / "store", tiny_loaded, TeamCluster(), sources)
    assert told(report) == told(expected)
    assert len(report.failed) == 3
    assert differing(tmp_path / "store", tmp_path / "alone") == []


def test_what_is_there_is_not_sent(tmp_path, tiny_loaded):
    run(tmp_path / "store", tiny_loaded, TeamCluster(), DOCUMENTS[:8])
    again = TeamCluster()
    report = run(tmp_path / "store", tiny_loaded, again, DOCUMENTS[:8])
    assert report.unchanged == tuple(one.doc_id for one in DOCUMENTS[:8])
    assert (again.team.hired, again.team.sent) == (0, [])


def test_damaged_segments_are_made_again_together(tmp_path, tiny_loaded, alone):
    run(tmp_path / "store", tiny_loaded, TeamCluster())
    files = sorted((tmp_path / "store" / "segments").rglob("*.safetensors"))
    for file in files[:4]:
        file.write_bytes(b"damaged")
    report = run(tmp_path / "store", tiny_loaded, TeamCluster())
    assert report.segments == 4
    assert report.repaired
    assert not any(name.startswith("segments/") for name in differing(tmp_path / "store", alone[0]))


def test_a_run_that_was_cut_off_goes_on_with_what_was_made(tmp_path, tiny_loaded, alone):
    class Cut(Exception):
        pass

    def cut(progress):
        if progress.document == "doc-006":
            raise Cut

    first = TeamCluster()
    with pytest.raises(Cut):
        run(tmp_path / "store", tiny_loaded, first, progress=cut)
    there = {file.stem for file in (tmp_path / "store" / "segments").rglob("*.safetensors")}
    second = TeamCluster()
    report = run(tmp_path / "store", tiny_loaded, second)
    assert report.unchanged == tuple(one.doc_id for one in DOCUMENTS[:6])
    assert there.isdisjoint(second.team.sent)
    assert there | set(second.team.sent) == {file.stem for file in (alone[0] / "segments").rglob("*.safetensors")}
    assert differing(tmp_path / "store", alone[0]) == []


def test_an_answer_that_was_damaged_on_its_way_is_made_again(tmp_path, tiny_loaded, alone):
    def spoil(answer, number):
        return Outcome(answer.data[:-1] + b"?", 0.0) if number == 4 else answer

    report = run(tmp_path / "store", tiny_loaded, TeamCluster(spoil=spoil))
    assert report.failed == ()
    assert differing(tmp_path / "store", alone[0]) == []


def test_segments_that_build_on_others_are_made_after_these(tmp_path):
    folder = save_tiny_autocompressor(tmp_path / "tiny", max_position_embeddings=256)
    made = {}
    for name, cluster in (("alone", None), ("store", TeamCluster(seed=4, dies=lambda job, number: number == 3))):
        options = {"compress": CompressConfig("autocompressor")}
        with opened(tmp_path / name, str(folder), **options) as engine:
            report = engine.ingest(DOCUMENTS[:6], cluster=cluster)
            assert report.failed == ()
        made[name] = told(report)
    assert made["store"] == made["alone"]
    assert differing(tmp_path / "store", tmp_path / "alone") == []
    assert any(row[-1] for row in content(tmp_path / "store")["segments"]), "no segment builds on another"


def test_refinement_is_that_of_a_single_process(tmp_path, tiny_loaded):
    few = RefineConfig(steps=2, stretch=32)
    made = {}
    for name, cluster in (("alone", None), ("store", TeamCluster(seed=1, dies=lambda job, number: number == 2))):
        with opened(tmp_path / name, tiny_loaded) as engine:
            engine.ingest(DOCUMENTS[:6])
            report = engine.refine(config=few, cluster=cluster)
        made[name] = asdict(replace(report, seconds=0.0))
    assert made["store"] == made["alone"]
    assert made["alone"]["refined"] > 0
    assert differing(tmp_path / "store", tmp_path / "alone") == []


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda recipe: replace(recipe, version="0.0.9"), ConfigError, r"worker \d+ on .*: version of lloco"),
        (lambda recipe: replace(recipe, decoder="/none"), LLoCOError, r"worker \d+ on .*/none"),
    ],
)
def test_a_worker_that_is_not_as_it_must_be_ends_the_run(tmp_path, tiny_loaded, change, error, says):
    cluster = TeamCluster(change)
    with pytest.raises(error, match=says):
        run(tmp_path / "store", tiny_loaded, cluster)
    assert cluster.team.sent == []
    assert cluster.team.is_closed


def test_a_worker_with_another_decoder_is_refused(tmp_path, tiny_loaded):
    other = str(save_tiny_decoder(tmp_path / "other", seed=1, max_position_embeddings=4096))
    with pytest.raises(StoreMismatch, match="decoder_fingerprint"):
        run(tmp_path / "store", tiny_loaded, TeamCluster(lambda recipe: replace(recipe, decoder=other)))


def test_workers_that_die_before_they_work_end_the_run(tmp_path, tiny_loaded, monkeypatch):
    monkeypatch.setattr("lloco_engine.cluster.worker.Worker.ready", lambda self: _die())
    with pytest.raises(LLoCOError, match="3 in a row died before: killed"):
        run(tmp_path / "store", tiny_loaded, TeamCluster())


def _die():
    from lloco_engine.cluster.pool import WorkerDied

    raise WorkerDied("killed")


def test_only_what_workers_can_find_by_name_is_sent(tmp_path, tiny_loaded):
    from lloco_engine.compress.uncompressed import Uncompressed

    class Mine(Uncompressed):
        pass

    with (
        opened(
            tmp_path / "store", tiny_loaded, compressor=Mine(), compress=CompressConfig("uncompressed", ratio=1)
        ) as engine,
        pytest.raises(ConfigError, match="register it in a plugin file"),
    ):
        engine.ingest(DOCUMENTS[:1], cluster=TeamCluster())


@pytest.mark.parametrize(
    "bad",
    [{"address": ""}, {"workers": 0}, {"workers": 1.5}, {"cpus": 0}, {"gpus": -1}],
    ids=lambda bad: next(iter(bad)),
)
def test_a_cluster_outside_its_rules_is_refused(bad):
    with pytest.raises(ConfigError, match="not"):
        RayCluster(**bad)


def test_jobs_in_this_process_are_made_when_they_are_asked_for(tmp_path, tiny_loaded):
    with opened(tmp_path / "store", tiny_loaded) as engine:
        chunk = engine.chunker.split(DOCUMENTS[0])[0]
        job = jobs.Compress(engine.store.segment_id("", chunk.token_ids), chunk.token_ids)
        maker = engine._resources.maker(None)
        maker.begin(job)
        assert not maker.wants_more
        assert engine.store.segment_stats(job.segment_id) is None
        assert maker.make(job).stats == engine.store.segment_stats(job.segment_id)


def test_the_pool_says_what_it_waits_for(tmp_path, tiny_loaded, monkeypatch, capsys):
    monkeypatch.setattr("lloco_engine.cluster.pool._PATIENCE_S", 0.0)
    cluster = TeamCluster()
    with opened(tmp_path / "store", tiny_loaded) as engine:
        pool: Pool = cluster.maker(engine.store, None)
        monkeypatch.setattr(cluster.team, "ready", lambda worker: object())
        monkeypatch.setattr(cluster.team, "wait", lambda tickets, timeout: [])
        pool.begin(jobs.Compress("0" * 32, (1, 2)))
        assert pool.wants_more
    assert "waiting for workers: no worker has begun" in capsys.readouterr().err
