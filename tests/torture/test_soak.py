"""Two tenants ask for a while beside a writer that adds, replaces and deletes: nothing crosses, nothing is wrong."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from changes import open_engine

from lloco_engine import Document, GenerateConfig
from lloco_engine.errors import SegmentUnavailable

SHORT = GenerateConfig(max_new_tokens=2)
TOPICS = ("pump", "crane", "tram", "court", "mill", "bell")


def resident() -> int:
    """Bytes of memory that the process has now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_tenants_ask_beside_a_writer(request, report, tmp_path, tiny_folder):
    seconds, seed = request.config.getoption("--soak"), request.config.getoption("--seed")
    deadline = time.monotonic() + seconds
    failed: list[str] = []
    asked, written, checked = [0, 0], [0], [0]
    memory: list[int] = []
    warm = threading.Event()

    def text(tenant: str, topic: str, number: int) -> str:
        return f"The {topic} of {tenant} stands in hall {number}. " * (1 + number % 7)

    def guarded(work):
        def run(*arguments) -> None:
            try:
                while time.monotonic() < deadline:
                    work(*arguments)
            except BaseException as error:
                failed.append(f"{work.__name__}: {error!r}")

        return run

    with open_engine(tmp_path / "store", str(tiny_folder)) as engine:
        for tenant in ("red", "blue"):
            engine.ingest([Document(f"{topic}.md", text(tenant, topic, 0)) for topic in TOPICS], tenant=tenant)
        draw = random.Random(seed)

        @guarded
        def write() -> None:
            tenant, topic = draw.choice(("red", "blue")), draw.choice(TOPICS)
            if draw.random() < 0.3 and len(engine.documents(tenant)) > 3:
                there = draw.choice(engine.documents(tenant)).doc_id
                engine.delete(there, tenant)
            else:
                engine.ingest([Document(f"{topic}.md", text(tenant, topic, draw.randrange(40)))], tenant=tenant)
            written[0] += 1
            time.sleep(0.02)

        @guarded
        def ask(tenant: str, number: int) -> None:
            topic = TOPICS[asked[number] % len(TOPICS)]
            try:
                answer = engine.ask(f"Where is the {topic}?", tenant=tenant, generate=SHORT, top_k=3)
            except SegmentUnavailable:  # all that was found went away in between, and that is what it says
                answer = None
            asked[number] += 1
            for hit in answer.hits if answer else ():
                if hit.tenant != tenant or f"of {tenant} " not in hit.text:
                    failed.append(f"{tenant} was shown {hit.tenant}'s {hit.text!r}")
            if asked[number] == 50:
                warm.set()

        @guarded
        def check() -> None:
            if problems := [problem for problem in engine.verify() if problem.kind != "orphan"]:
                failed.append(f"verify cried wolf: {problems[0]}")
            checked[0] += 1
            if warm.is_set():
                memory.append(resident())
            time.sleep(0.1)

        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(write), pool.submit(ask, "red", 0), pool.submit(ask, "blue", 1), pool.submit(check)]
            for job in jobs:
                job.result()
        assert [problem for problem in engine.verify() if problem.kind != "orphan"] == []
    grown = (max(memory[len(memory) // 2 :]) - memory[0]) / 2**20 if len(memory) > 3 else 0.0
    note = f"beside {written[0]} changes and {checked[0]} checks in {seconds} s; memory grew by {grown:.0f} MB"
    report("answers of two tenants", sum(asked), len(failed), note)
    assert not failed, failed[0]
    assert sum(asked) > 10 and written[0] > 5
