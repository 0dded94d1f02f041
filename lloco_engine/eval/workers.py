"""An evaluation measured by several processes beside each other, for machines that one does not fill."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from lloco_engine.errors import LLoCOError
from lloco_engine.eval.evaluation import Evaluation
from lloco_engine.eval.settings import EvalConfig

__all__ = ["beside"]

_mine: Evaluation  # of a worker process, which has one only


def beside(
    config: EvalConfig, cache: Path | None, workers: int, todo: Mapping[int, Sequence[int]]
) -> Generator[tuple[int, int, dict[str, Any]]]:
    """As `Evaluation.measured`, in whatever order they are done; a group is one process's.

    Args:
        config, cache: as `Evaluation` takes them; each process makes its own of them.
        workers: how many processes; they share the threads that torch would use.
        todo: rows by group.

    Raises:
        LLoCOError: a process ended before its time.
    """
    if not todo:
        return
    others = set(multiprocessing.active_children())
    threads = max(1, torch.get_num_threads() // workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(todo)), context, _begin, (config, cache, threads)) as pool:
        try:
            for made in as_completed([pool.submit(_measure, number, ats) for number, ats in todo.items()]):
                yield from made.result()
        except BaseException as error:  # whoever stops this waits for no group that is being measured
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise LLoCOError(
                    f"one of {workers} workers ended before its time, perhaps for want of memory. Fix: fewer workers; "
                    "with an output file what was done is kept"
                ) from error
            raise


def _begin(config: EvalConfig, cache: Path | None, threads: int) -> None:
    global _mine
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process is told, and ends the others
    torch.set_num_threads(threads)
    _mine = Evaluation(config, cache=cache)


def _measure(number: int, ats: Sequence[int]) -> list[tuple[int, int, dict[str, Any]]]:
    return list(_mine.measured({number: ats}))
