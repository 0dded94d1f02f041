"""Workers that are Ray's actors, killed, and driven by a process that is killed: real processes, tiny decoders."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster_cases import differing, documents, opened

from lloco_engine import Document, RayCluster
from lloco_engine.config import RefineConfig
from lloco_engine.errors import ConfigError, StoreMismatch
from lloco_engine.testing import save_tiny_decoder

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray", reason="needs Ray: pip install 'lloco[ray]'")

DOCUMENTS = documents(24)
HALVES = RayCluster(workers=2, cpus=1)
DRIVER = """
import sys
from pathlib import Path
from cluster_cases import documents, opened
from lloco_engine import RayCluster

def tell(progress):
    print(progress.documents_done, progress.done_segments, flush=True)

with opened(Path(sys.argv[1]), sys.argv[2]) as engine:
    engine.ingest(documents(24), cluster=RayCluster(workers=2, cpus=0.5), progress=tell)
"""


@pytest.fixture(scope="module")
def connected():
    """This process as a part of a cluster of two cores."""
    from lloco_engine.cluster import ray as own

    own._import_ray()
    with own._loopback(ray):
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            object_store_memory=own._OBJECTS,
        )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_loaded):
    """A store that a single process made."""
    path = tmp_path_factory.mktemp("alone") / "store"
    with opened(path, tiny_loaded) as engine:
        engine.ingest(DOCUMENTS)
    return path


def workers() -> list[int]:
    """Process ids of this machine's workers that have made a segment or are making one."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                name = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if name.startswith(b"ray::Worker"):
                found.append(int(folder.name))
    return found


def test_the_store_is_that_of_a_single_process_though_three_workers_are_killed(tmp_path, tiny_loaded, connected, alone):
    killed = []

    def kill(progress):
        if progress.documents_done in (3, 9, 15) and progress.done_segments == 0:
            for pid in workers():
                if pid not in killed:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    return

    with opened(tmp_path / "store", tiny_loaded) as engine:
        report = engine.ingest([*DOCUMENTS[:5], Document("bad", ""), *DOCUMENTS[5:]], cluster=HALVES, progress=kill)
    assert len(killed) == 3
    assert [failure.doc_id for failure in report.failed] == ["bad"]
    assert report.added == tuple(one.doc_id for one in DOCUMENTS)
    assert differing(tmp_path / "store", alone) == []
    assert ray.is_initialized(), "the cluster that was there is left as it is"


def test_refinement_is_that_of_a_single_process(tmp_path, tiny_loaded, connected):
    few = RefineConfig(steps=2, stretch=32)
    for name, cluster in (("alone", None), ("store", HALVES)):
        with opened(tmp_path / name, tiny_loaded) as engine:
            engine.ingest(DOCUMENTS[:6])
            assert engine.refine(config=few, cluster=cluster).refined > 0
    assert differing(tmp_path / "store", tmp_path / "alone") == []


def test_a_worker_that_finds_another_decoder_is_refused(tmp_path, connected):
    folder = save_tiny_decoder(tmp_path / "tiny", max_position_embeddings=4096)
    with opened(tmp_path / "store", str(folder)) as engine:
        assert engine.chunker.split(DOCUMENTS[0])
        save_tiny_decoder(folder, seed=1, max_position_embeddings=4096)
        with pytest.raises(StoreMismatch, match=r"worker \d+ on .*decoder_fingerprint"):
            engine.ingest(DOCUMENTS[:2], cluster=HALVES)


def test_a_worker_that_no_machine_has_room_for_is_refused(tmp_path, tiny_loaded, connected):
    with (
        opened(tmp_path / "store", tiny_loaded) as engine,
        pytest.raises(ConfigError, match="each asks for 64 CPU, while it has 2 CPU"),
    ):
        engine.ingest(DOCUMENTS[:2], cluster=RayCluster(cpus=64))


def test_a_driver_that_is_killed_loses_what_was_in_flight(tmp_path, tiny_folder, tiny_loaded, alone):
    command = [sys.executable, "-W", "error", "-c", DRIVER, str(tmp_path / "store"), str(tiny_folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    before = set(workers())
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as driver:
        for line in driver.stdout:
            if int(line.split()[0]) == 8:
                driver.kill()
                break
        else:
            pytest.fail(driver.stderr.read())
        assert driver.stderr.read() == "", "a run must be quiet"
    made = {file.stem for file in (tmp_path / "store" / "segments").rglob("*.safetensors")}
    deadline = time.monotonic() + 60
    while set(workers()) - before:
        assert time.monotonic() < deadline, "workers outlive their driver"
        time.sleep(0.2)
    sent = []
    with opened(tmp_path / "store", tiny_loaded) as engine:
        assert engine.store.verify() == [one for one in engine.store.verify() if one.kind == "orphan"]
        report = engine.ingest(DOCUMENTS, progress=sent.append)
        assert len(report.unchanged) >= 8
        assert engine.store.verify() == []
    whole = {file.stem for file in (alone / "segments").rglob("*.safetensors")}
    assert report.segments == len(whole - made)
    assert differing(tmp_path / "store", alone) == []
