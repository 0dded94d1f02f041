"""Plots of an evaluation: quality against ratio and against prompt size, and heat maps of a grid of needles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lloco_engine.eval.plot import source_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["drawings"]

# Okabe and Ito: colours that differ to every eye; a method keeps its own in every plot
_COLOURS = {
    "kv": "#0072B2",
    "kv_guided": "#000000",
    "kv_retrieved": "#56B4E9",
    "kvzip": "#E69F00",
    "kvzip_retrieved": "#E69F00",
    "snapkv": "#CC79A7",
    "snapkv_retrieved": "#CC79A7",
    "text_slots": "#009E73",
    "text_slots_retrieved": "#009E73",
    "full": "#D55E00",
    "text_retrieved": "#B8860B",
    "none": "#767676",
}
_QUIET = "#767676"
_MARKERS = "osD^v"  # one for each adapter
_BASELINES = ("none", "full", "text_retrieved")

Row = Mapping[str, Any]


def drawings(result: Mapping[str, Any]) -> dict[str, Callable[[Path], None]]:
    """What can be drawn of an evaluation: by kind, a function that writes a file."""
    made: dict[str, Callable[[Path], None]] = {}
    rows = result["results"]
    if len({row["ratio"] for row in rows if row["ratio"] is not None}) > 1:
        made["ratio"] = partial(_against_ratio, result)
    if len(rows) > 1:
        made["prompt"] = partial(_against_prompt, result)
    if any("success" in cell for cell in result.get("cells", ())):
        made["needles"] = partial(_heat_maps, result)
    return made


def _against_ratio(result: Mapping[str, Any], path: Path) -> None:
    """Loss against ratio, a panel for each adapter; what has no ratio is a line across."""
    from matplotlib.figure import Figure

    rows = result["results"]
    adapters = list(dict.fromkeys(row["adapter"] for row in rows))
    ratios = sorted({row["ratio"] for row in rows if row["ratio"] is not None})
    figure = Figure(figsize=(1 + 5.2 * len(adapters), 4.4), layout="constrained")
    panels = figure.subplots(1, len(adapters), sharey=True, squeeze=False)[0]
    for axes, adapter in zip(panels, adapters, strict=True):
        mine = [row for row in rows if row["adapter"] == adapter]
        for row in mine:
            if row["ratio"] is None:
                colour = _COLOURS.get(row["method"], _QUIET)
                axes.axhline(row["loss"], color=colour, linewidth=1.2, linestyle=(0, (4, 3)))
                axes.annotate(
                    row["method"],
                    (ratios[0], row["loss"]),
                    (0, 3),
                    textcoords="offset points",
                    color=colour,
                    fontsize=9,
                )
        for method in dict.fromkeys(row["method"] for row in mine if row["ratio"] is not None):
            line = sorted((row for row in mine if row["method"] == method), key=lambda row: row["ratio"])
            _interval_line(axes, [row["ratio"] for row in line], line, "loss", method)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ratios, [f"{ratio:g}x" for ratio in ratios])
        axes.minorticks_off()
        axes.set_title(_adapter(adapter), loc="left", fontsize=11)
        axes.set_xlabel("source tokens per slot")
        _dress(axes)
    panels[0].set_ylabel("gold-answer loss per token (lower is better)")
    drawn = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(drawn.values()), list(drawn), frameon=False, fontsize=9, loc="outside right center")
    _save(figure, result, path)


def _interval_line(axes: Axes, places: Sequence[float], rows: Sequence[Row], name: str, method: str) -> None:
    values = [row[name] for row in rows]
    bounds = [row.get("intervals", {}).get(name) or [row[name], row[name]] for row in rows]
    errors = [
        [max(0.0, value - low) for value, (low, _) in zip(values, bounds, strict=True)],
        [max(0.0, high - value) for value, (_, high) in zip(values, bounds, strict=True)],
    ]
    colour = _COLOURS.get(method, "#000000")
    dashed = "--" if method.endswith("_retrieved") else "-"
    axes.errorbar(places, values, yerr=errors, color=colour, linestyle=dashed, marker="o", capsize=3, label=method)


def _against_prompt(result: Mapping[str, Any], path: Path) -> None:
    """Loss against what the prompt holds, tokens and slots together.

    Hollow points are without an adapter; every adapter has its own marker.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    rows = result["results"]
    adapters = list(dict.fromkeys(row["adapter"] for row in rows))
    tuned = [adapter for adapter in adapters if adapter != "none"]
    marker = {"none": "o"} | {adapter: _MARKERS[at % len(_MARKERS)] for at, adapter in enumerate(tuned)}
    figure = Figure(figsize=(8.2, 4.8), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        colour = _COLOURS.get(row["method"], "#000000")
        size = row["prompt_tokens"] + row["prompt_slots"]
        axes.plot(
            size, row["loss"], marker=marker[row["adapter"]], markersize=8, color=colour, linestyle="none",
            markerfacecolor="white" if row["adapter"] == "none" else colour, markeredgewidth=1.8,
        )  # fmt: skip
        if row["ratio"] is not None:
            axes.annotate(
                f"{row['ratio']:g}x", (size, row["loss"]), (6, 5), textcoords="offset points", color=colour, fontsize=8
            )
    methods = list(dict.fromkeys(row["method"] for row in rows))
    handles = [Line2D([], [], color=_COLOURS.get(m, "#000000"), marker="o", linestyle="none", label=m) for m in methods]
    for adapter in adapters if len(adapters) > 1 else ():
        fill, mark, label = "white" if adapter == "none" else _QUIET, marker[adapter], _adapter(adapter)
        handles.append(Line2D([], [], color=_QUIET, markerfacecolor=fill, marker=mark, linestyle="none", label=label))
    axes.legend(handles=handles, frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("prompt: text tokens and slots, of the question too")
    axes.set_ylabel("gold-answer loss per token (lower is better)")
    _dress(axes)
    _save(figure, result, path)


def _heat_maps(result: Mapping[str, Any], path: Path) -> None:
    """Share of needles found by haystack length and depth, a map for each row of the table."""
    from matplotlib.figure import Figure

    cells = result["cells"]
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    shown: dict[tuple[Any, ...], list[list[float]]] = {}
    for cell in cells:
        key = (cell["method"], cell["ratio"], cell["adapter"])
        grid = shown.setdefault(key, [[float("nan")] * len(lengths) for _ in depths])
        grid[depths.index(cell["depth"])][lengths.index(cell["length"])] = cell["success"]
    across = min(3, len(shown))
    down = -(-len(shown) // across)
    figure = Figure(
        figsize=(1.4 + across * (1.4 + 0.5 * len(lengths)), down * (1.1 + 0.27 * len(depths))), layout="constrained"
    )
    panels = figure.subplots(down, across, squeeze=False).flatten()
    image = None
    for axes, ((method, ratio, adapter), grid) in zip(panels, shown.items(), strict=False):
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                if value == value:
                    colour = "black" if value > 0.55 else "white"
                    axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
        every = [value for line in grid for value in line if value == value]
        named = method if ratio is None else f"{method} {ratio:g}x"
        axes.set_title(f"{named}, {_adapter(adapter)}: {100 * sum(every) / len(every):.0f}%", fontsize=9, loc="left")
        axes.set_xticks(range(len(lengths)), [_tokens(length) for length in lengths], fontsize=8)
        axes.set_yticks(range(len(depths)), [f"{depth:g}%" for depth in depths], fontsize=8)
        axes.set_xlabel("haystack, tokens", fontsize=8)
        axes.set_ylabel("depth", fontsize=8)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    if image is not None:
        figure.colorbar(image, ax=list(panels), label="needles found", shrink=0.8)
    _save(figure, result, path)


def _tokens(length: float) -> str:
    return f"{length / 1024:g}k" if length % 1024 == 0 else f"{length:g}"


def _adapter(name: str) -> str:
    return "no adapter" if name == "none" else f"adapter {name}"


def _dress(axes: Axes) -> None:
    axes.grid(True, axis="y", color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, result: Mapping[str, Any], path: Path) -> None:
    config, row = result["config"], result["results"][0]
    title = (
        f"{config.get('task', 'plain')}: {row['questions']} questions about {row['documents']} documents, "
        f"decoder {Path(config['decoder']['name']).name}"
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=130, metadata={"Source": source_of(result)})
