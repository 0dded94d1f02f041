"""Rows of an evaluation out of the values of its questions: averages, intervals, differences, cells of a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lloco_engine.eval import metrics
from lloco_engine.eval.methods import Row
from lloco_engine.eval.statistics import Sample, interval

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from lloco_engine.eval.data import Group

__all__ = ["cells", "differences", "rows"]

_COSTS = ("prompt_slots", "prompt_tokens", "source_tokens")
_ALWAYS = ("f1", "rouge_l")  # null where they were not taken
_MORE = ("em", "rouge_1", "rouge_2", "accuracy", "accuracy_generated", "success")

Values = Mapping[str, Any]


def rows(about: Sequence[Row], groups: Sequence[Group], values: Sequence[Sequence[Values]], seed: int) -> list[Any]:
    """The table.

    Args:
        about: the rows.
        groups: what was asked about.
        values: of each group, of each row, what `Scorer.measure` gave.
        seed: of the bootstrap.
    """
    sample = Sample(len(groups), seed)
    documents = sum(group.documents for group in groups)
    sums = _sums(about, values)
    made = []
    for number, (row, parts) in enumerate(zip(about, sums, strict=True)):
        total = {name: sum(part.get(name, 0.0) for part in parts) for name in {name for part in parts for name in part}}
        scores = {name: _average(total, name) for name in (*_ALWAYS, *_MORE) if name in total or name in _ALWAYS}
        drawn = {name: sample.ratio(parts, name, "questions") for name, value in scores.items() if value is not None}
        drawn["loss"] = sample.ratio(parts, "loss", "tokens")
        none, full = (_losses(about, sums, method, row.adapter, sample) for method in ("none", "full"))
        share = None
        if none is not None and full is not None:
            share = metrics.recovered(float(drawn["loss"][0]), float(none[0]), float(full[0]))
            if share is not None:
                drawn["recovered"] = (none - drawn["loss"]) / _not_zero(none - full)
        value = row.to_json() | {
            "hints": max((list(of_rows[number].get("hints", ())) for of_rows in values), key=len),
            "documents": documents,
            "questions": int(total["questions"]),
            "loss": float(drawn["loss"][0]),
            "recovered": share,
            **scores,
            **{name: total[name] / total["questions"] for name in _COSTS},
        }
        if "rouge_1" in scores:
            value["rouge_geometric"] = metrics.geometric_mean(scores)
            product = drawn["rouge_1"] * drawn["rouge_2"] * drawn["rouge_l"]
            drawn["rouge_geometric"] = product ** (1 / 3)
        value["intervals"] = {name: bounds for name, each in drawn.items() if (bounds := interval(each)) is not None}
        made.append(value)
    return made


def differences(
    about: Sequence[Row], groups: Sequence[Group], values: Sequence[Sequence[Values]], seed: int
) -> list[dict[str, Any]]:
    """Every row less each baseline (no context, full text, text retrieval with the same adapter; untuned full text).

    Paired: the documents are drawn together. An interval that is clear of zero is a difference that other documents of
    the kind would show too.
    """
    sample = Sample(len(groups), seed)
    sums = _sums(about, values)
    made = []
    for row, parts in zip(about, sums, strict=True):
        baselines = [
            other
            for other in about
            if other != row
            and other.method in ("none", "full", "text_retrieved")
            and (other.adapter == row.adapter or (other.method == "full" and other.adapter == "none"))
        ]
        for other in baselines:
            against = sums[about.index(other)]
            by_metric = {}
            for name in ("loss", *_ALWAYS, *_MORE):
                under = "tokens" if name == "loss" else "questions"
                if name not in parts[0] or name not in against[0]:
                    continue
                drawn = sample.ratio(parts, name, under) - sample.ratio(against, name, under)
                by_metric[name] = {"difference": float(drawn[0]), "interval": interval(drawn)}
            made.append(row.to_json() | {"against": other.to_json(), "metrics": by_metric})
    return made


def cells(about: Sequence[Row], groups: Sequence[Group], values: Sequence[Sequence[Values]]) -> list[dict[str, Any]]:
    """Of groups that are cells of a grid, each row's averages in each cell."""
    made = []
    for group, of_rows in zip(groups, values, strict=True):
        for row, value in zip(about, of_rows, strict=True):
            if group.tags:
                total = _sum(value["questions"])
                scores = {name: _average(total, name) for name in (*_ALWAYS, *_MORE) if name in total}
                made.append({**group.tags} | row.to_json() | {"loss": total["loss"] / total["tokens"]} | scores)
    return made


def _sums(about: Sequence[Row], values: Sequence[Sequence[Values]]) -> list[list[dict[str, float]]]:
    """Of each row, of each group, the sums over its questions."""
    return [[_sum(of_rows[number]["questions"]) for of_rows in values] for number in range(len(about))]


def _sum(questions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    names = [name for name, value in questions[0].items() if not isinstance(value, str)]
    return {name: sum(question[name] for question in questions) for name in names} | {"questions": len(questions)}


def _average(total: Mapping[str, float], name: str) -> float | None:
    return total[name] / total["questions"] if name in total else None


def _losses(
    about: Sequence[Row], sums: Sequence[Sequence[Mapping[str, float]]], method: str, adapter: str, sample: Sample
) -> npt.NDArray[np.float64] | None:
    """A baseline's losses in the sample and its draws, or None where the run has no such row."""
    row = Row(method, None, adapter)
    return sample.ratio(sums[about.index(row)], "loss", "tokens") if row in about else None


def _not_zero(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    import numpy as np

    return np.where(values == 0, np.nan, values)
