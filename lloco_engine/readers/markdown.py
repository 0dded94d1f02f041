"""Markdown as it stands but for its comments; titled by its front matter, else by its first heading.

A heading is what a Markdown parser takes for one, on the first 65,536 characters; nothing in a code block is a comment.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from typing import Any

from lloco_engine.readers.encodings import decode
from lloco_engine.readers.parsed import Parsed

__all__ = ["parse_markdown"]

_FRONT = 64 * 1024  # characters in which front matter must end
_HEAD = 64 * 1024  # characters in which the first heading must stand
_LONGEST_HEADING = 1_000  # characters
_FENCE = re.compile(r"[ \t]*(`{3,}(?=[^`]*$)|~{3,})")
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_BLANK = re.compile(r"\n[ \t>]*\r?\n")
_CONTAINERS = re.compile(r"[ \t]*(?:(?:>|(?P<marker>[-*+]|\d{1,9}[.)])(?=\s))[ \t]*)*")  # quotations and lists
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
    """The body without HTML comments and without link definitions that serve as comments; code stays as it is.

    By lines: a parser takes a minute for some megabytes.
    """
    kept: list[str] = []
    fence = _Fence()
    inside = listed = False
    paragraph = close = 0  # where that of the line ends, and the next comment after the line
    for found in _LINE.finditer(body):
        line = found[0]
        if fence.takes(line):
            kept.append(line)
            continue
        place = _CONTAINERS.match(line)
        assert place is not None  # it matches what is empty, too
        if marker := place["marker"]:
            listed = True
        elif line[:1].strip():
            listed = False
        rest = line[place.end() :]
        deep = not listed and not marker and line.startswith(("    ", "\t"))
        if not inside and not deep and (opens := _FENCE.match(rest)):
            fence = _Fence(opens[1], ">" in place[0], 2 if marker else int(listed and line[:1] == " "))
        elif not inside and _COMMENT_LABEL.match(line):
            continue
        elif inside or (not deep and "<!--" in line):
            if paragraph < found.end():
                blank = _BLANK.search(body, found.end() - 1)
                paragraph = blank.start() + 1 if blank else len(body)
            if 0 <= close < found.end():
                close = body.find("-->", found.end())
            goes_on = rest.startswith("<!--") or 0 <= close < paragraph
            line, inside = _cut(line, inside, goes_on)
        kept.append(line)
    return "".join(kept)


@dataclass
class _Fence:
    """A fence that is open: its sign, whether it stands in a quotation, and how far a list indents its lines."""

    sign: str = ""
    quoted: bool = False
    indent: int = 0

    def takes(self, line: str) -> bool:
        """Whether a line is within the fence, or ends it."""
        if not self.sign:
            return False
        if line.strip() and (
            (self.quoted and not line.lstrip().startswith(">")) or line[: self.indent].strip(" \t") != ""
        ):
            self.sign = ""  # where what it stands in ends
            return False
        bare = line.lstrip(" \t>").strip() if self.quoted else line.strip()
        if bare.startswith(self.sign) and not bare.strip(self.sign[0]):
            self.sign = ""
        return True


def _cut(line: str, inside: bool, goes_on: bool) -> tuple[str, bool]:
    """A line without what of it is in a comment, and whether the comment goes on; code spans are kept.

    What begins within a paragraph and does not end there (``goes_on``) is no comment; one that begins a line may go on
    to the end of the document.
    """
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
        if not goes_on and line.find("-->", comment + 2) < 0:
            kept.append(line[at:])
            break
        kept.append(line[at:comment])
        at, inside = comment + 2, True  # <!--> is a whole one
    return "".join(kept), inside
