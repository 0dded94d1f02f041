"""A process that ingests files one by one and says what each cost.

Run as ``eater.py STORE DECODER``. It reads a path in JSON a line, and answers with what came of the file, the seconds
it took, and the most memory that this process and the one that reads files had meanwhile, in bytes. The last line,
null, has the store verified and asked.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from lloco_engine import Engine, GenerateConfig
from lloco_engine.config import CompressConfig
from lloco_engine.readers import apart
from lloco_engine.testing import HashingEmbedder


def forget_peak(process: int | str) -> None:
    """Let the peak of a process's memory be what it has now."""
    with suppress(OSError):
        Path(f"/proc/{process}/clear_refs").write_text("5")


def peak(process: int | str) -> int:
    """The most memory that a process had since."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def reader() -> int | None:
    """The process that reads files, if it is there."""
    process = apart._reader._process
    return None if process is None else process.pid


class Watch(threading.Thread):
    """Looks at the process that reads files again and again, since what ends takes its peak with it.

    What the system says of children that ended would not do: it counts what this process had when it started them.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.02):
            self.look()

    def look(self) -> None:
        if (process := reader()) is not None:
            self.most = max(self.most, peak(process))

    def stop(self) -> int:
        """The most that was seen, in bytes."""
        self._done.set()
        self.join()
        self.look()
        return self.most


def eat(engine: Engine, path: Path) -> dict[str, object]:
    """Ingest one file."""
    for process in ("self", reader()):
        if process is not None:
            forget_peak(process)
    watch = Watch()
    watch.start()
    began = time.monotonic()
    report = engine.ingest([path])
    seconds = time.monotonic() - began
    memory = peak("self") + watch.stop()
    done = (*report.added, *report.replaced, *report.unchanged, *report.repaired, *report.moved)
    failed = [[failure.source, failure.reason] for failure in report.failed]
    return {"documents": len(done), "failed": failed, "seconds": seconds, "memory": memory}


def main() -> None:
    store, decoder = Path(sys.argv[1]), sys.argv[2]
    options = {"decoder": decoder, "embedder": HashingEmbedder(), "compress": CompressConfig("uncompressed", 1)}
    with Engine.open(store, **options) as engine:
        for line in sys.stdin:
            path = json.loads(line)
            if path is None:
                problems = [str(problem) for problem in engine.verify() if problem.kind != "orphan"]
                hits = engine.ask("Where is the pump?", generate=GenerateConfig(max_new_tokens=2), top_k=3).hits
                print(json.dumps({"problems": problems, "hits": len(hits)}), flush=True)
            else:
                print(json.dumps(eat(engine, Path(path))), flush=True)


if __name__ == "__main__":
    main()
