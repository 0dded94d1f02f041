"""Markdown as it stands but for its comments; titled by its front matter, else by its first heading.

A heading is what a Markdown parser takes for one, on the first 65,536 characters; nothing in a code block is a comment.
"""

from __future__ import annotations

import re
import tomllib
from typing import Any

from lloco_engine.readers.encodings import decode
from lloco_engine.readers.parsed import Parsed

__all__ = ["parse_markdown"]

_FRONT = 64 * 1024  # characters in which front matter must end
_HEAD = 64 * 1024  # characters in which the first heading must stand
_LONGEST_HEADING = 1_000  # characters
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_TICKS = re.compile("`+")
_COMMENT_LABEL = re.compile(r" {0,3}\[(?://|comment|_)\]:\s{0,8}(?:#|<>)[ \t]")  # [//]: # (a comment)


def parse_markdown(data: bytes) -> Parsed:
    """The text and its title; raises `DocumentError` where its encoding cannot be told."""
    from markdown_it import MarkdownIt

    text, encoding = decode(data)
    front, title = _front_matter(text)
    body = text[front:]
    title = title or _heading(MarkdownIt("commonmark").disable("inline").parse(body[:_HEAD]))
    if "<!--" in body or "]:" in body:
        text = text[:front] + _without_comments(body)
    return Parsed(title, text, encoding)


def _front_matter(text: str) -> tuple[int, str]:
    """Where the body begins, and the title that the front matter (YAML between ``---``, TOML between ``+++``) gives."""
    head = text[:_FRONT].replace("\r\n", " \n")  # of the same length
    fence = head[:3]
    if fence not in ("---", "+++") or head[3:].split("\n", 1)[0].strip():
        return 0, ""
    end = re.compile(rf"^(?:{re.escape(fence)}|\.\.\.)[ \t]*$", re.MULTILINE).search(head, 4)
    if end is None:
        return 0, ""
    inside = head[head.index("\n") + 1 : end.start()]
    return end.end(), _title_of(inside, toml=fence == "+++")


def _title_of(front: str, *, toml: bool) -> str:
    import yaml

    try:
        values = tomllib.loads(front) if toml else yaml.safe_load(front)
        title = values.get("title") if isinstance(values, dict) else None
        return " ".join(str(title).split()) if isinstance(title, str | int | float) else ""
    except (ValueError, yaml.YAMLError, RecursionError):  # a number of 5,000 digits has no text, either
        return ""


def _heading(blocks: list[Any]) -> str:
    from markdown_it import MarkdownIt

    for number, block in enumerate(blocks):
        if block.type == "heading_open":
            content = blocks[number + 1].content[:_LONGEST_HEADING]
            (inline,) = MarkdownIt("commonmark").parseInline(content)
            parts = (child for child in inline.children or () if child.type in ("text", "code_inline", "softbreak"))
            if title := " ".join("".join(child.content or " " for child in parts).split()):
                return title
    return ""


def _without_comments(body: str) -> str:
    """The body without HTML comments and without link definitions that serve as comments; code stays as it is."""
    kept: list[str] = []
    fence = ""
    inside = False
    for line in re.findall(r"[^\n]*\n|[^\n]+", body):
        if fence:
            if (closes := _FENCE.match(line)) and closes[1].startswith(fence) and not line[closes.end() :].strip():
                fence = ""
        elif not inside and (opens := _FENCE.match(line)):
            fence = opens[1]
        elif not inside and _COMMENT_LABEL.match(line):
            continue
        elif inside or not line.startswith(("    ", "\t")):
            shown, inside = _cut(line, inside)
            kept.append(shown)
            continue
        kept.append(line)
    return "".join(kept)


def _cut(line: str, inside: bool) -> tuple[str, bool]:
    """A line without what of it is in a comment, and whether the comment goes on; code spans are kept."""
    kept: list[str] = []
    at, comment = 0, -1
    alone = set[int]()  # lengths of runs of backticks that nothing closes any more
    while at < len(line):
        if inside:
            end = line.find("-->", at)
            if end < 0:
                return "".join(kept) + ("\n" if line.endswith("\n") else ""), True
            at, inside = end + 3, False
            continue
        if comment < at and (comment := line.find("<!--", at)) < 0:
            kept.append(line[at:])
            break
        tick = line.find("`", at, comment)
        if tick >= 0:
            ticks = _TICKS.match(line, tick)
            run = ticks.end() - tick if ticks else 1
            close = None if run in alone else re.compile(f"(?<!`)`{{{run}}}(?!`)").search(line, tick + run)
            if close is None:
                alone.add(run)
            stop = close.end() if close else tick + run
            kept.append(line[at:stop])
            at = stop
            continue
        kept.append(line[at:comment])
        at, inside = comment + 4, True
    return "".join(kept), inside
