"""A writer is killed at any time: what it had said was done is there, the rest is there wholly or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from adapter_cases import adapter
from changes import AT_REST, OFTEN
from victim import PHASES

from lloco_engine.decoder.local import LocalDecoder


def test_nothing_that_was_done_is_lost_and_nothing_is_half_done(request, report, tmp_path, tiny_folder):
    kills, victims, seed = (request.config.getoption(f"--{name}") for name in ("kills", "victims", "seed"))
    made = adapter(tmp_path / "adapter", LocalDecoder.load(str(tiny_folder)))
    here = Path(__file__).parent
    running = []
    for number in range(victims):
        count = kills // victims + (number < kills % victims)
        command = [here / "victim.py", tmp_path / str(number), tiny_folder, made, count, seed * 1000 + number]
        errors = (tmp_path / f"{number}.errors").open("w")
        with errors:
            running.append(
                subprocess.Popen(
                    [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=errors, text=True, cwd=here
                )
            )
    trials = []
    try:
        for victim in running:
            lines = victim.communicate()[0].splitlines()
            trials += map(json.loads, lines)
    finally:
        for victim in running:
            victim.kill()
            victim.wait()
            victim.stdout.close()
    said = "".join(path.read_text() for path in tmp_path.glob("*.errors"))
    failed = [trial for trial in trials if trial["problem"]]
    for kind in OFTEN | AT_REST:
        some = [trial for trial in trials if trial["kind"] == kind]
        where = Counter(trial["phase"] for trial in some)
        note = ", ".join(f"{where[phase]} {phase}" for phase in PHASES.values() if where[phase])
        report(f"kill -9 in {kind}", len(some), sum(trial in failed for trial in some), note)
    assert len(trials) == kills, said[-2000:]
    assert not failed, failed[0]
    where = Counter(trial["phase"] for trial in trials)
    assert kills < 100 or min(where[phase] for phase in PHASES.values()) > 0, where
