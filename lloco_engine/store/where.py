"""A filter as a term of SQL on the catalogue's documents, every key and value of it a bound parameter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lloco_engine.filters import And, Condition, Filter, Not
from lloco_engine.store.values import NUMBER, TEXT, encode, escape, private_key

__all__ = ["Where", "fold", "where"]

_FIELDS = ("doc_id", "source", "title")  # columns that count as metadata of their names
_SIGNS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
_Term: TypeAlias = tuple[str, list[str]]


@dataclass(frozen=True)
class Where:
    """A term that holds for rows ``d`` of documents, and the values of its parameters, in order."""

    sql: str
    values: tuple[str, ...]

    @property
    def key(self) -> str:
        """The same for filters that ask for the same, whatever their order: for caches, and short."""
        digest = hashlib.sha256(self.sql.encode("utf-8"))
        for value in self.values:
            digest.update(b"\0" + value.encode("utf-8"))
        return digest.hexdigest()


def where(tenant: str, wanted: Filter) -> Where:
    """What holds for the documents of a tenant that a filter lets through."""
    sql, values = _compiled(wanted, tenant)
    return Where(f"d.tenant = ? AND {sql}", (tenant, *values))


def fold(text: str) -> str:
    """Text without upper and lower case: a function of SQL on every connection of a catalogue."""
    return text.casefold()


def _compiled(part: Filter, tenant: str) -> _Term:
    if isinstance(part, Condition):
        return _condition(part, tenant)
    if isinstance(part, Not):
        sql, values = _compiled(part.part, tenant)
        return f"NOT {sql}", values
    parts = sorted(_compiled(inner, tenant) for inner in part.parts)
    if isinstance(part, And):
        return _joined(parts, "AND") if parts else ("1", [])
    return _joined(parts, "OR") if parts else ("0", [])


def _joined(parts: Sequence[_Term], word: str) -> _Term:
    """The terms in balanced brackets, for SQLite limits how deep an expression is."""
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    (left, first), (right, second) = _joined(parts[:half], word), _joined(parts[half:], word)
    return f"({left} {word} {right})", first + second


def _condition(condition: Condition, tenant: str) -> _Term:
    test, values = _of_metadata(condition)
    key = private_key(condition.key) if condition.private else escape(condition.key)
    selects, bound = [f"SELECT doc_key FROM metadata WHERE key = ? AND {test}"], [key, *values]
    if not condition.private and condition.key in _FIELDS and (found := _of_field(condition)) is not None:
        test, values = found
        selects.append(f"SELECT doc_key FROM documents WHERE tenant = ? AND {test}")
        bound += [tenant, *values]
    return f"d.doc_key IN ({' UNION ALL '.join(selects)})", bound


def _of_metadata(condition: Condition) -> _Term:
    """What holds for rows of the table of metadata, whose values are as `values.encode` gives them."""
    match condition.operator:
        case "exists":
            return "1", []
        case "filled":
            return "value <> ?", [TEXT]
        case "in":
            return _in("value", [encode(value) for value in condition.values])
    (value,) = condition.values
    if condition.operator in _SIGNS:
        kind = TEXT if isinstance(value, str) else NUMBER
        # ';' comes after ':': the values of one type lie between the two
        return f"value {_SIGNS[condition.operator]} ? AND value >= ? AND value < ?", [
            encode(value),
            kind,
            kind[0] + ";",
        ]
    if not isinstance(value, str):
        return "value = ? AND listed", [encode(value)]
    text = f"value >= '{TEXT}' AND value < 's;'"
    match condition.operator:
        case "contains":
            return f"(value = ? OR NOT listed AND {text} AND instr(substr(value, 3), ?))", [
                encode(value),
                escape(value),
            ]
        case "text":
            return f"{text} AND instr(substr(value, 3), ?)", [escape(value)]
        case _:
            return f"{text} AND instr(fold(substr(value, 3)), ?)", [escape(fold(value))]


def _of_field(condition: Condition) -> _Term | None:
    """What holds for a column of documents, which is text, and missing when it is empty; None when nothing can."""
    column = condition.key
    if condition.operator in ("exists", "filled"):
        return f"{column} <> ''", []
    texts = [value for value in condition.values if isinstance(value, str)]
    if condition.operator == "in":
        return _in(column, texts)
    if not texts:
        return None
    if condition.operator in _SIGNS:
        return f"{column} <> '' AND {column} {_SIGNS[condition.operator]} ?", texts
    if condition.operator == "text_any_case":
        return f"instr(fold({column}), ?)", [fold(texts[0])]
    return f"instr({column}, ?)", texts


def _in(column: str, values: Sequence[str]) -> _Term:
    """One of some values; many are one parameter, as SQLite limits how many there are."""
    few = sorted(set(values))
    if len(few) == 1:
        return f"{column} = ?", few
    return f"{column} IN (SELECT value FROM json_each(?))", [json.dumps(few, ensure_ascii=False)]
