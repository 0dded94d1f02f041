"""The notebooks as they are kept: run from top to bottom, without errors, small, and in the index."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from places import ROOT

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_the_index_lists_every_notebook():
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert NOTEBOOKS and all(f"({path.name})" in index for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_as_it_ran(path):
    text = path.read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "run it with `make notebooks`"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs and not [output for output in outputs if output["output_type"] == "error"]
    shown = json.dumps([output for output in outputs if output["output_type"] == "stream"])
    assert "site-packages" not in shown and "/tmp/" not in shown and str(Path.home()) not in shown
    assert len(text) <= 400_000


@pytest.mark.filterwarnings("ignore")  # of the kernel's client, about what the dead kernel left open
def test_a_kernel_that_dies_is_reported_and_the_notebook_is_left_as_it_was(tmp_path, capsys):
    import nbformat

    path = tmp_path / "dying.ipynb"
    cells = [nbformat.v4.new_code_cell(source) for source in ("1 + 1", "import os\nos._exit(1)", "2 + 2")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    before = path.read_text(encoding="utf-8")
    assert runpy.run_path(str(FOLDER / "run.py"))["run"](path, 120) is False
    assert "dying.ipynb: failed: its kernel died in cell 2" in capsys.readouterr().out
    assert path.read_text(encoding="utf-8") == before


def test_a_check_runs_a_notebook_and_leaves_it_as_it_was(tmp_path):
    import nbformat

    path = tmp_path / "fine.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source="1 + 1")]), path)
    before, run = path.read_text(encoding="utf-8"), runpy.run_path(str(FOLDER / "run.py"))["run"]
    assert run(path, 120, keep=False) and path.read_text(encoding="utf-8") == before
    assert run(path, 120) and nbformat.read(path, as_version=4).cells[0].execution_count == 1
