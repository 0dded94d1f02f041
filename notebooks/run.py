"""Run notebooks from top to bottom and keep their outputs: ``python notebooks/run.py`` (all), ``... 01 06`` (some).

``--check`` keeps none: the notebooks are left as they are.

A notebook must finish in time on a CPU (``--seconds``, five minutes) and stay small. One that fails keeps the outputs it
had.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

HERE = Path(__file__).parent
BYTES = 400_000


def main() -> int:
    """Run the notebooks that are asked for; returns how many failed."""
    parser = argparse.ArgumentParser(description="Run notebooks from top to bottom and keep their outputs.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="how a notebook's name begins, e.g. 01 (default: all)")
    parser.add_argument("--seconds", type=int, default=300, help="longest time for one notebook (default 300)")
    parser.add_argument("--check", action="store_true", help="only run them, and leave them as they are")
    arguments = parser.parse_args()
    paths = [
        path
        for path in sorted(HERE.glob("*.ipynb"))
        if not arguments.names or path.name.startswith(tuple(arguments.names))
    ]
    if not paths:
        parser.error(f"no notebook begins with {' or '.join(arguments.names)}")
    return sum(not run(path, arguments.seconds, keep=not arguments.check) for path in paths)


def run(path: Path, most: int, *, keep: bool = True) -> bool:
    """Run one notebook and, to ``keep`` them, write its outputs into it; says how long it took, and whether it may be."""
    notebook = nbformat.read(path, as_version=4)
    began = time.perf_counter()
    started: list[int] = []  # cells, by their number from 1
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=most,
            startup_timeout=most,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,
            on_cell_start=lambda cell, cell_index: started.append(cell_index + 1),
        )
        try:
            client.execute(env=os.environ | {"PYTHONPATH": str(HERE.parent)})
        except (CellExecutionError, CellTimeoutError) as error:
            print(f"{path.name}: failed\n{error}")
            return False
        except (AssertionError, RuntimeError) as error:  # nbclient's own: those of a cell come as CellExecutionError
            at = f"in cell {started[-1]}, killed or out of memory" if started else "before the first cell"
            print(f"{path.name}: failed: its kernel died {at} ({type(error).__name__}: {error or 'no message'})")
            return False
    seconds = time.perf_counter() - began
    for cell in notebook.cells:
        cell.metadata.clear()
    notebook.metadata.clear()
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    text = nbformat.writes(notebook) + "\n"
    print(f"{path.name}: {seconds:.0f} s of at most {most} s, {len(text) // 1000} KB of at most {BYTES // 1000} KB")
    if seconds > most or len(text) > BYTES:
        return False
    if keep:
        path.write_text(text, encoding="utf-8")
    return True


if __name__ == "__main__":
    sys.exit(main())
