"""Results side by side: tables in Markdown, with the plots that their kind allows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lloco_engine.errors import ConfigError, DocumentError
from lloco_engine.eval import plot, plots
from lloco_engine.eval.machine import check_writable

__all__ = ["write_report"]

_SCORES = {
    "f1": "F1",
    "em": "exact match",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "rouge_geometric": "geometric mean",
    "accuracy": "accuracy, likelihood",
    "accuracy_generated": "accuracy, generated",
    "success": "success",
}
_HEADLINES = ("rouge_l", "f1", "accuracy", "success")  # scores whose differences are shown


def write_report(paths: Sequence[Path], out: Path) -> list[Path]:
    """Write ``report.md`` and its plots.

    Args:
        paths: JSON files of evaluations and benches.
        out: folder.

    Returns:
        the files written, ``report.md`` first.

    Raises:
        DocumentError: a file cannot be read, or is not such a result.
        ConfigError: two files have one name, or the folder cannot be written to.
    """
    read = [(path.stem, _read(path)) for path in paths]
    names = [name for name, _ in read]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"results must have different names, which plots are called by; {twice[0]!r} comes twice")
    check_writable(out / "report.md")
    parts, written = ["# Results"], [out / "report.md"]
    for name, result in read:
        parts.append(f"## {name}")
        if "results" in result:
            parts += _evaluation(result)
            drawings = plots.drawings(result)
        else:
            parts += _bench(result)
            drawings = {"time": partial(plot.draw, result)}
        for kind, draw in drawings.items():
            path = out / f"{name}-{kind}.png"
            draw(path)
            written.append(path)
            parts.append(f"![{name}, {kind}]({path.name})")
    written[0].write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return written


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DocumentError(f"the result {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DocumentError(f"the result {path} must be JSON in UTF-8: {error}") from error
    evaluation = isinstance(value, dict) and isinstance(value.get("results"), list) and "config" in value
    bench = isinstance(value, dict) and isinstance(value.get("details"), dict)
    if not (evaluation or bench):
        raise DocumentError(f"a result must be what lloco eval or lloco bench wrote with --json; {path} is not")
    return value  # type: ignore[no-any-return]


def _evaluation(result: Mapping[str, Any]) -> Iterator[str]:
    config, rows = result["config"], result["results"]
    task = config.get("task", "plain")
    yield (
        f"Task {task}, {rows[0]['questions']:,} questions about {rows[0]['documents']:,} documents of {config['data']}"
        f". Decoder {config['decoder']['name']}, compressor {config['compressor']['name']}. In brackets: 95% "
        "intervals, bootstrap over documents."
    )
    scores = [name for name in _SCORES if any(row.get(name) is not None for row in rows)]
    header = ["method", "adapter", "ratio", "loss", "recovered", *(_SCORES[name] for name in scores)]
    header += ["prompt tokens", "prompt slots", "source tokens"]
    yield _table(
        header,
        [
            [
                row["method"],
                row["adapter"],
                _number(row["ratio"], 0),
                *(_bounded(row, name) for name in ("loss", "recovered", *scores)),
                *(_number(row[name], 0) for name in ("prompt_tokens", "prompt_slots", "source_tokens")),
            ]
            for row in rows
        ],
    )
    compared = ["loss", *(name for name in _HEADLINES if name in scores)]
    if lines := list(_differences(result, compared)):
        yield "A row less a baseline, paired by document (of loss, below 0 is better; clear of 0 in bold):"
        yield _table(["method", "adapter", "ratio", "against", *(_SCORES.get(name, name) for name in compared)], lines)
    for note in config.get("notes", ()):
        yield f"* {note}"
    yield _circumstances(config)


def _differences(result: Mapping[str, Any], names: Sequence[str]) -> Iterator[list[str]]:
    for each in result.get("differences", ()):
        if each["method"] not in ("none", "full", "text_retrieved"):
            other = f"{each['against']['method']}, adapter {each['against']['adapter']}"
            shown = [_difference(each["metrics"].get(name)) for name in names]
            yield [each["method"], each["adapter"], _number(each["ratio"], 0), other, *shown]


def _difference(taken: Mapping[str, Any] | None) -> str:
    if taken is None:
        return "-"
    shown, bounds = f"{taken['difference']:+.3f}", taken["interval"]
    if bounds is None:
        return shown
    shown += f" [{bounds[0]:+.3f}, {bounds[1]:+.3f}]"
    return f"**{shown}**" if bounds[0] > 0 or bounds[1] < 0 else shown


def _bench(result: Mapping[str, Any]) -> Iterator[str]:
    lines = []
    for name, value in result.items():
        if isinstance(value, Mapping) and name != "details":
            lines.append([name, ", ".join(f"{int(length):,}: {_number(each, 3)}" for length, each in value.items())])
        elif name != "details":
            lines.append([name, _number(value, 3)])
    yield _table(["measured", "value (by source tokens)"], lines)
    yield _circumstances(result["details"])


def _circumstances(values: Mapping[str, Any]) -> str:
    hardware, versions = values.get("hardware", {}), values.get("versions", {})
    where = hardware.get("accelerator") or hardware.get("processor", "unknown machine")
    made = f"On {where}, {hardware.get('threads', '?')} threads, {hardware.get('dtype', '?')}"
    used = ", ".join(f"{name} {version}" for name, version in versions.items() if name in ("lloco", "torch"))
    return f"{made}; {used}; {values.get('date', 'no date')}."


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _bounded(row: Mapping[str, Any], name: str) -> str:
    shown = _number(row.get(name), 3)
    bounds = row.get("intervals", {}).get(name)
    return shown if bounds is None else f"{shown} [{bounds[0]:.3f}, {bounds[1]:.3f}]"


def _number(value: Any, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:,.{digits}f}" if isinstance(value, int | float) else str(value)
