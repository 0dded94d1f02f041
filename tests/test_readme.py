"""The README as a reader would follow it: short, its code runs, its figures are the results', its links lead on."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import import_module

from places import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_it_is_short():
    assert len(README.split()) < 1000


def test_its_first_lines_of_python_run_as_they_stand(tmp_path):
    """In a folder of their own, as where the wheel is installed."""
    assert len(PYTHON[0].splitlines()) <= 11
    done = subprocess.run([sys.executable, "-c", PYTHON[0]], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()
    assert "340" in shown[0] and shown[1].startswith("brindle-weir-judgment.md ")
    assert re.fullmatch(r"\d+ slots stand for \d+ tokens", shown[-1])
    assert (tmp_path / "lloco-store" / "manifest.json").exists()


def test_what_its_code_imports_is_there():
    for block in PYTHON:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), node.module


def test_its_table_and_command_are_those_of_the_results():
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    measured = README[README.index("## Measured") : README.index("## More")]
    rows = [line for line in measured.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 5
    missing = [row for row in rows if row not in page.splitlines()]
    assert not missing, f"take the lines of docs/results.md, which has not {missing[0]}"
    (command,) = re.findall(r"```sh\n(.*?)\n```", measured, re.DOTALL)
    assert command in page
    for figure in re.findall(r"\d+,\d{3}", README):
        assert any(figure in row for row in rows), f"{figure} stands in no row of the table"


def test_its_links_lead_somewhere():
    names = re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", README)
    assert len(names) > 15
    assert [name for name in names if name and not (ROOT / name).exists()] == []
