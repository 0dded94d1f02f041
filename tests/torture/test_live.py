"""Files that are damaged under a running engine: it warns, fails by name or is right, and goes on; never a signal."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path


def test_no_damage_under_a_running_engine_goes_unseen(request, report, tmp_path, tiny_folder):
    count, seed = request.config.getoption("--live"), request.config.getoption("--seed")
    command = [sys.executable, str(Path(__file__).with_name("live.py")), tmp_path / "store", tiny_folder, count, seed]
    errors = tmp_path / "errors"
    with errors.open("w") as lines:
        done = subprocess.run(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=lines, text=True, cwd=Path(__file__).parent
        )
    trials = [json.loads(line) for line in done.stdout.splitlines()]
    failed = [trial for trial in trials if trial["wrong"]]
    seen = Counter(trial["came"] for trial in trials)
    note = ", ".join(f"{number} {came}" for came, number in sorted(seen.items()))
    report("damage under a running engine", len(trials), len(failed) + (done.returncode != 0), note)
    assert done.returncode == 0, f"exit code {done.returncode} after {trials[-1:]}: {errors.read_text()[-2000:]}"
    assert not failed, failed[0]
    assert len(trials) == count
    assert count < 50 or (seen["warned"] and seen["the same"])
