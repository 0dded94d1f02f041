"""Time to first token and prompt size against source length, for LLoCO and for reading the text in context."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lloco_engine.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["check_suffix", "draw", "source_of"]

_OURS, _THEIRS, _QUIET = "#0072B2", "#D55E00", "#767676"  # blue and vermilion (Okabe and Ito) differ to every eye
_SUFFIXES = (".png", ".svg")


def check_suffix(path: Path) -> None:
    """Check that a file can be drawn to.

    Raises:
        ConfigError: the suffix is neither .png nor .svg.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"a plot's file must end in {' or '.join(_SUFFIXES)}, not {path.suffix!r}")


def source_of(result: Mapping[str, Any]) -> str:
    """What a picture names in its file as the result that it was drawn of: 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(result, ensure_ascii=False).encode()).hexdigest()


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw the result of a bench.

    Args:
        result: what `lloco_engine.eval.bench.run` returned.
        path: .png or .svg.

    Raises:
        ConfigError: the suffix is neither.
    """
    check_suffix(path)
    from matplotlib.figure import Figure

    details = result["details"]
    whole, in_context = _points(details["whole"]), _points(details["in_context"])
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    ratio = details["config"]["whole_ratio"]
    plain = whole[-1][1]["no_context_ttft_s"]

    _line(left, in_context, lambda row: row["ttft_s"], _THEIRS, "text in context, up to the window", "s")
    _line(left, whole, lambda row: row["ttft_s"], _OURS, f"LLoCO, {ratio:g}x", "s")
    left.axhline(plain, color=_QUIET, linewidth=1, linestyle=(0, (4, 3)))
    left.annotate(
        f"no context, {plain:.2g} s", (whole[0][0], plain), (0, -4), textcoords="offset points",
        color=_QUIET, fontsize=9, va="top",
    )  # fmt: skip
    _dress(left, "Time to first token", "seconds", [length for length, _ in whole])
    low, high = left.get_ylim()
    left.set_ylim(low / 1.6, high * 2.5)

    _line(right, in_context, lambda row: row["prompt_tokens"], _THEIRS, "text in context, up to the window", "tokens")
    _line(right, whole, lambda row: row["prompt_slots"] + row["prompt_tokens"], _OURS, f"LLoCO, {ratio:g}x", "")
    _dress(right, "Prompt: text tokens and slots", "tokens and slots", [length for length, _ in whole])
    low, high = right.get_ylim()
    right.set_ylim(low / 1.6, high * 2.5)

    figure.suptitle(f"The whole source in the prompt: {_machine(details)}", x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=150, metadata={"Source": source_of(result)})


def _points(rows: Mapping[str, Any]) -> list[tuple[int, Any]]:
    return sorted((int(length), row) for length, row in rows.items())


def _line(axes: Axes, points: Sequence[tuple[int, Any]], value: Any, colour: str, name: str, unit: str) -> None:
    """A line with its name and its last value written at its end."""
    if not points:
        return
    lengths, values = [length for length, _ in points], [value(row) for _, row in points]
    axes.plot(lengths, values, color=colour, linewidth=2, marker="o", markersize=5, clip_on=False)
    last = f"{values[-1]:,.2g}" if values[-1] < 10 else f"{values[-1]:,.0f}"
    axes.annotate(
        f"{name}\n{last} {unit}".rstrip(), (lengths[-1], values[-1]), (0, 8), textcoords="offset points",
        color=colour, fontsize=9, fontweight="bold", ha="center" if len(points) < 5 else "right", va="bottom",
    )  # fmt: skip


def _dress(axes: Axes, title: str, unit: str, lengths: Sequence[int]) -> None:
    from matplotlib.ticker import StrMethodFormatter

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("source length, tokens")
    axes.set_ylabel(unit)
    axes.set_xticks(lengths, [f"{length // 1024}k" if length >= 1024 else str(length) for length in lengths])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.grid(True, axis="y", color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _machine(details: Mapping[str, Any]) -> str:
    hardware = details["hardware"]
    where = hardware.get("accelerator") or f"{hardware['processor']}, {hardware['threads']} threads"
    return f"decoder {Path(details['config']['decoder']).name}, {where}"
