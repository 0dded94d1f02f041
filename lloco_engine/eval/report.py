"""A page of results: every table, the command that made it, and the plots that its kind allows."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lloco_engine.atomic import write_file
from lloco_engine.errors import ConfigError, DocumentError
from lloco_engine.eval import plot, plots, tables
from lloco_engine.eval.commands import command
from lloco_engine.eval.machine import check_writable

__all__ = ["PLAN", "Report", "check_report", "read_report", "write_report"]

PLAN = "page.toml"
"""In a folder of results: in which order they are shown, under which titles, and with which words."""

Draw = Callable[[Path], None]


@dataclass(frozen=True)
class _Section:
    """Results that are shown together.

    Args:
        title: its heading.
        results: names of files, without their suffix; evaluations come in one table.
        text: what is to be known of them, without any figure.
        scores: that have a column, None for all that were taken.
        plots: kinds to draw, None for all that can be drawn.
        command: that made them, where the results do not keep it.
    """

    title: str
    results: tuple[str, ...]
    text: str = ""
    scores: tuple[str, ...] | None = None
    plots: tuple[str, ...] | None = None
    command: str | None = None


@dataclass(frozen=True)
class Report:
    """A page and its pictures.

    Args:
        page: the file of the page.
        text: its Markdown.
        pictures: of each file that the page shows, beside it, what it is a picture of and the function that draws it.
    """

    page: Path
    text: str
    pictures: Mapping[Path, tuple[Mapping[str, Any], Draw]]


def read_report(paths: Sequence[Path], page: Path) -> Report:
    """Make a page of results.

    Args:
        paths: JSON files of ``lloco eval``, ``bench``, ``memories`` and ``scores``. With a `PLAN` beside them they come
            as it says, and what it does not name comes after.
        page: the Markdown file to be.

    Raises:
        DocumentError: a file cannot be read, or is not such a result.
        ConfigError: two files have one name, or the plan names a result that is not there.
    """
    if page.suffix != ".md":
        raise ConfigError(f"the page must be a file whose name ends in .md, not {page}; its plots go beside it")
    results: dict[str, dict[str, Any]] = {}
    for path in paths:
        if path.stem in results:
            raise ConfigError(
                f"results must have different names, which plots are called by; {path.stem!r} comes twice"
            )
        results[path.stem] = _read(path)
    if not results:
        raise ConfigError("a page needs at least one result; name the JSON files that lloco eval and bench wrote")
    title, text, sections = _plan(paths[0].with_name(PLAN), results)
    parts, pictures = [f"# {title}", *([text] if text else [])], {}
    for section in sections:
        parts += _shown(section, results)
        for name in section.results:
            for kind, draw in _drawings(results[name]).items():
                if section.plots is None or kind in section.plots:
                    picture = page.with_suffix("") / f"{name}-{kind}.png"
                    pictures[picture] = (results[name], draw)
                    parts.append(f"![{name}, {kind}]({picture.relative_to(page.parent)})")
    return Report(page, "\n\n".join(parts) + "\n", pictures)


def write_report(report: Report) -> list[Path]:
    """Write the page and its pictures; the files written, the page first.

    Raises:
        ConfigError: a file cannot be written.
    """
    for path in (report.page, *report.pictures):
        check_writable(path)
    for path, (result, draw) in report.pictures.items():
        if not _is_of(path, result):
            draw(path)
    write_file(report.page, report.text)
    return [report.page, *report.pictures]


def check_report(report: Report) -> None:
    """Check that the page is what the results say, and that its pictures are of them.

    Raises:
        ConfigError: it differs, and how to mend it.
    """
    there = report.page.read_text(encoding="utf-8") if report.page.exists() else ""
    fix = "Fix: lloco report"
    if there != report.text:
        old, new = there.splitlines(), report.text.splitlines()
        at = next(
            (n for n, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]), min(len(old), len(new))
        )
        found = repr(old[at]) if at < len(old) else "the end"
        raise ConfigError(
            f"{report.page} must be what the results say; line {at + 1} is {found}, "
            f"and {repr(new[at]) if at < len(new) else 'the end'} was expected. {fix}"
        )
    for path, (result, _) in report.pictures.items():
        if not _is_of(path, result):
            raise ConfigError(f"{path} must be a picture of the result as it is; it is missing or of another. {fix}")


def _is_of(path: Path, result: Mapping[str, Any]) -> bool:
    """Whether a picture was drawn of a result: it names what it was drawn of."""
    return path.exists() and plot.source_of(result).encode() in path.read_bytes()


def _plan(path: Path, results: Mapping[str, Any]) -> tuple[str, str, list[_Section]]:
    """The page's title, its first words and its sections; a result that no section names has one of its own."""
    plan: dict[str, Any] = {}
    if path.exists():
        try:
            plan = tomllib.loads(path.read_text(encoding="utf-8"))
            sections = [_section(each) for each in plan.get("section", ())]
        except (OSError, ValueError, TypeError) as error:
            raise DocumentError(f"the plan {path} must be TOML with a title, a text and sections: {error}") from error
    else:
        sections = []
    named = {name for section in sections for name in section.results}
    if missing := sorted(named - set(results)):
        raise ConfigError(f"the plan {path} must name results that are there; there is no {missing[0]}.json")
    sections += [_Section(name, (name,)) for name in results if name not in named]
    return plan.get("title", "Results"), plan.get("text", "").strip(), sections


def _section(given: Mapping[str, Any]) -> _Section:
    settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    return _Section(**settings)


def _shown(section: _Section, results: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """A section's title, text, tables, circumstances and commands."""
    yield f"## {section.title}"
    if section.text:
        yield section.text.strip()
    shown = {name: results[name] for name in section.results}
    evaluations = [result for result in shown.values() if tables.kind_of(result) == "eval"]
    if evaluations:
        yield tables.about(evaluations)
        yield from tables.evaluations(evaluations, section.scores)
    for result in shown.values():
        kind = tables.kind_of(result)
        if kind != "eval":
            yield from {"bench": tables.bench, "memories": tables.memories, "scores": tables.scores}[str(kind)](result)
    if where := [f"* {each}" for each in dict.fromkeys(map(tables.circumstances, shown.values())) if each]:
        yield "\n".join(where)
    commands = (
        [section.command]
        if section.command
        else [command(str(tables.kind_of(result)), name, result) for name, result in shown.items()]
    )
    yield "```sh\n" + "\n".join(commands) + "\n```"


def _drawings(result: Mapping[str, Any]) -> dict[str, Draw]:
    kind = tables.kind_of(result)
    if kind == "eval":
        return plots.drawings(result)
    return {"time": partial(plot.draw, result)} if kind == "bench" else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DocumentError(f"the result {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DocumentError(f"the result {path} must be JSON in UTF-8: {error}") from error
    if tables.kind_of(value) is None:
        raise DocumentError(f"a result must be what lloco {', '.join(tables.KINDS)} wrote with --json; {path} is not")
    return value  # type: ignore[no-any-return]
