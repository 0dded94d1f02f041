"""Score answers over questions: without context, with text, and with compressed memories, in one run on one decoder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from lloco_engine.atomic import open_file
from lloco_engine.decoder.local import LocalDecoder
from lloco_engine.embedder import Encodes
from lloco_engine.errors import ConfigError, DocumentError
from lloco_engine.eval import results
from lloco_engine.eval.data import Group
from lloco_engine.eval.evaluation import Evaluation
from lloco_engine.eval.machine import check_writable, circumstances, write_json
from lloco_engine.eval.methods import Row
from lloco_engine.eval.partial import Partial
from lloco_engine.eval.settings import EvalConfig
from lloco_engine.eval.workers import beside

__all__ = ["EvalConfig", "run"]


def run(
    config: EvalConfig,
    *,
    output: Path | None = None,
    predictions: Path | None = None,
    decoder: LocalDecoder | None = None,
    embedder: Encodes | None = None,
    cache: Path | None = None,
    workers: int = 1,
    progress: Callable[[str, float, float], None] | None = None,
) -> dict[str, Any]:
    """Evaluate; a run with an output file that was cut off goes on where it stopped.

    Args:
        config: the settings.
        output: JSON file to write.
        predictions: JSON Lines file to write: every answer with its scores.
        decoder, embedder: ones that are there already; else those of ``config``.
        cache: folder that keeps segments between runs; None is ``eval`` in the cache folder.
        workers: processes that measure beside each other, a group of documents each; 1 is this one alone. A script that
            asks for more must do so within ``if __name__ == "__main__"``.
        progress: called with what is done, how many questions are, and how many there are, each row counted.

    Returns:
        ``{"config": ..., "results": [...], "differences": [...]}``, JSON-ready, and ``"cells"`` for a grid.

    Raises:
        DocumentError: the data are not as they must be.
        AdapterError: an adapter is not there, or is not for this decoder.
        ConfigError, LLoCOError, ModelNotFound, PromptTooLong: as their messages say.
    """
    if config.data and not Path(config.data).exists():
        raise DocumentError(f"the data file {config.data} cannot be read: No such file or directory")
    if workers < 1:
        raise ConfigError(f"workers must be at least 1, not {workers}")
    if workers > 1 and (decoder is not None or embedder is not None):
        raise ConfigError(f"workers load a decoder and an embedder of their own: give none, or 1 worker, not {workers}")
    for path in (output, predictions):
        if path is not None:
            check_writable(path)
    evaluation = Evaluation(config, decoder, embedder, cache)
    groups, rows, facts = evaluation.groups, evaluation.rows, evaluation.facts()
    partial = Partial(output, hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest())
    values = _measure_all(evaluation, partial, workers, cache, progress or (lambda what, done, total: None))
    machine = evaluation.decoder.runner
    result = {
        "config": facts
        | circumstances(machine.device, machine.dtype)
        | {
            "seconds": round(sum(value["seconds"] for of_rows in values for value in of_rows), 1),
            "notes": _notes(rows, values),
        },
        "results": results.rows(rows, groups, values, config.seed),
        "differences": results.differences(rows, groups, values, config.seed),
    }
    if cells := results.cells(rows, groups, values):
        result["cells"] = cells
    if predictions is not None:
        _write_predictions(predictions, rows, groups, values)
    if output is not None:
        write_json(output, result)
    partial.finish()
    return result


def _measure_all(
    evaluation: Evaluation,
    partial: Partial,
    workers: int,
    cache: Path | None,
    progress: Callable[[str, float, float], None],
) -> list[list[dict[str, Any]]]:
    """Every row of every group, those in ``partial`` as they are there."""
    groups, rows = evaluation.groups, evaluation.rows
    missing = {
        number: [at for at in range(len(rows)) if number * len(rows) + at not in partial.done]
        for number in range(len(groups))
    }
    todo = {number: ats for number, ats in missing.items() if ats}
    total = len(rows) * sum(len(group.questions) for group in groups)
    done = total - sum(len(ats) * len(groups[number].questions) for number, ats in todo.items())
    progress("questions", done, total)
    measured = evaluation.measured(todo) if workers == 1 else beside(evaluation.config, cache, workers, todo)
    with closing(measured):
        for number, at, value in measured:
            partial.add(number * len(rows) + at, value)
            done += len(groups[number].questions)
            progress("questions", done, total)
    return [[partial.done[number * len(rows) + at] for at in range(len(rows))] for number in range(len(groups))]


def _notes(rows: Sequence[Row], values: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    notes = []
    if split := sum(max(value["split"] for value in of_rows) for of_rows in values):
        notes.append(f"{split} chunks were longer than a segment may be and became several, all placed")
    for at, row in enumerate(rows):
        left_out = [tokens for of_rows in values for tokens in of_rows[at]["left_out"]]
        if cut := [tokens for tokens in left_out if tokens]:
            part = "the middle" if row.method == "full" else "the end"
            notes.append(
                f"method {row.method}, adapter {row.adapter}: {len(cut)} of {len(left_out)} prompts did not fit the "
                f"decoder's window and lost {part} of their text, {sum(cut):,} tokens in all"
            )
    return notes


def _write_predictions(
    path: Path, rows: Sequence[Row], groups: Sequence[Group], values: Sequence[Sequence[Mapping[str, Any]]]
) -> None:
    """Every question of every row, one JSON object a line."""
    with open_file(path) as lines:
        for group, of_rows in zip(groups, values, strict=True):
            for row, value in zip(rows, of_rows, strict=True):
                for question, scored in zip(group.questions, value["questions"], strict=True):
                    asked = {"id": question.id, "question": question.question, "answers": list(question.answers)}
                    lines.write(json.dumps(row.to_json() | asked | dict(scored), ensure_ascii=False) + "\n")
