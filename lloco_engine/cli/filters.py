"""``--filter`` as people write it in a shell, as the mapping that `lloco_engine.filters` reads."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import typer

from lloco_engine.errors import ConfigError
from lloco_engine.filters import parse_filter

__all__ = ["HELP", "TEXT_KEYS", "parse_filters", "value_of"]

HELP = (
    "Only documents whose metadata (or doc_id, source, title) fits: KEY=VALUE, !=, >, >=, <, <=, 'KEY in A,B', "
    "'KEY not in A,B', 'KEY exists', 'KEY missing'; repeatable: all must hold. Numbers, true and false also match the "
    'same text; "2024" in double quotes is text alone.'
)
TEXT_KEYS = ("doc_id", "source", "title")
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?")
_SIGNS = {">": "$gt", ">=": "$gte", "<": "$lt", "<=": "$lte"}
_FORM = re.compile(
    r'\s*(?:"(?P<quoted>[^"]+)"|(?P<key>[^\s=<>!].*?))'
    r"(?:\s*(?P<sign>!=|>=|<=|==|=|>|<)(?P<value>.*)|\s+(?P<list>not\s+in|in)\s+(?P<values>.*)"
    r"|\s+(?P<whether>exists|missing)\s*)",
    re.DOTALL,
)
_LISTED = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[^,]*?)\s*(?:,|$)', re.DOTALL)


def parse_filters(terms: Sequence[str]) -> dict[str, Any] | None:
    """What every term of ``--filter`` asks for, together; None where there is none.

    A value of ``=``, ``!=`` and ``in`` that reads as a number or boolean also means the same text; in double quotes it
    is text alone. ``>`` and the like compare numbers with a number, and text with anything else, so ISO dates too.

    Raises:
        typer.BadParameter: a term is of none of the forms, or the engine refuses it.
    """
    made = [_term(term) for term in terms]
    if not made:
        return None
    wanted: dict[str, Any] = {"$and": made} if len(made) > 1 else made[0]
    try:
        parse_filter(wanted)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    return wanted


def _term(term: str) -> dict[str, Any]:
    found = _FORM.fullmatch(term)
    if found is None:
        raise typer.BadParameter(
            "must be KEY=VALUE, or have one of !=, >, >=, <, <=, in, not in, exists, missing in the place of =, "
            f"not {term!r}"
        )
    key = found["quoted"] or found["key"]
    if found["whether"]:
        return {key: {"$exists": found["whether"] == "exists"}}
    if found["list"]:
        values = [value for listed in _listed(found["values"]) for value in _alternatives(listed)]
        return {key: {"$in" if found["list"] == "in" else "$nin": values}}
    sign, text = found["sign"], found["value"].strip()
    if sign not in _SIGNS and text.startswith(("<", ">")):
        raise typer.BadParameter(f"must have >= or <=, or double quotes around a value that begins so, not {term!r}")
    if sign in _SIGNS:
        if not text:
            raise typer.BadParameter(f"{sign} must have a value to compare with, and {term!r} has none")
        return {key: {_SIGNS[sign]: text if key in TEXT_KEYS else value_of(text)}}
    return {key: {"$nin" if sign == "!=" else "$in": _alternatives(text)}}


def _listed(text: str) -> list[str]:
    """The values between commas; those in double quotes may hold commas themselves."""
    values = [found[1] for found in _LISTED.finditer(text) if found.end() > found.start()]
    return [*values, ""] if text.rstrip().endswith(",") else values


def _alternatives(text: str) -> list[Any]:
    value = value_of(text)
    return [value] if isinstance(value, str) else [value, text]


def value_of(text: str) -> str | int | float | bool:
    """A value as a shell has it: true, false and numbers as such, the rest, and all in double quotes, as text."""
    if text in ("true", "false"):
        return text == "true"
    if number := _NUMBER.fullmatch(text):
        return float(text) if number[2] else int(text)
    if len(text) >= 2 and text[0] == text[-1] == '"':
        try:
            quoted = json.loads(text)
        except ValueError:
            return text
        return str(quoted)
    return text
