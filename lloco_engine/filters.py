"""Filters: which documents a search may find, as LangChain's stores and LlamaIndex write them, in one small tree.

A mapping, as LangChain's stores take it, holds for documents that meet all of it::

    {"year": 2024}                              a value
    {"year": [2023, 2024]}                      one of several
    {"year": {"$gte": 2020, "$lt": 2024}}       operators; several must all hold
    {"$or": [{"team": "pumps"}, {"$not": {"year": {"$exists": True}}}]}

Operators of a key: ``$eq $ne $gt $gte $lt $lte $between $in $nin $exists $contains $all $not``; of filters: ``$and $or
$not``. LlamaIndex's ``MetadataFilters`` and ``MetadataFilter``, nested as they may be, are taken as they are.

What they mean:

* Keys are those of the metadata, and ``doc_id``, ``source`` and ``title``, which every document has. ``a.b`` is the
  value ``b`` in an object ``a``, or the key with that dot in it.
* Values have types: 1 is not "1", and True is neither. Numbers compare as numbers, whole or not, of any size; text by
  code point, so ISO dates compare as dates where all are written alike; nothing compares with another type. The types
  that metadata may have (`lloco_engine.metadata`) are taken here too.
* A list meets a condition when one of its elements does.
* ``$ne``, ``$nin`` and ``$not`` hold wherever their opposite does not: also where the key is missing, and for a list
  only when no element is equal. A key is missing too when its value is None or an empty list.
* ``$contains`` (LlamaIndex: ``contains``, ``any``, ``all``) asks for an element of a list, or a part of a text.

Whatever is not understood is refused by name. Nothing here knows how documents are kept: `lloco_engine.store.where`
turns the tree into SQL.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from lloco_engine.errors import ConfigError
from lloco_engine.metadata import plain

__all__ = [
    "MAX_CONDITIONS",
    "MAX_DEPTH",
    "MAX_VALUES",
    "And",
    "Condition",
    "Filter",
    "Filters",
    "Not",
    "Or",
    "parse_filter",
]

MAX_DEPTH = 16  # filters inside each other
MAX_CONDITIONS = 1000
MAX_VALUES = 1_000_000  # of all conditions together

Scalar: TypeAlias = str | int | float | bool
Operator: TypeAlias = Literal["in", "gt", "gte", "lt", "lte", "exists", "filled", "contains", "text", "text_any_case"]


@dataclass(frozen=True)
class Condition:
    """One key that must have one of some values (``in``), or meet the operator with the one value that is given.

    ``exists`` and ``filled`` (there, and not the empty text) have no value; ``text`` and ``text_any_case`` ask for a
    part of a text; ``contains`` for that or for an element of a list. The key is one of `Document.private` where
    ``private`` says so, which neither a mapping nor LlamaIndex's classes can.
    """

    key: str
    operator: Operator
    values: tuple[Scalar, ...] = ()
    private: bool = False


@dataclass(frozen=True)
class And:
    """All must hold; of none, all do."""

    parts: tuple[Filter, ...] = ()


@dataclass(frozen=True)
class Or:
    """One must hold; of none, none does."""

    parts: tuple[Filter, ...] = ()


@dataclass(frozen=True)
class Not:
    """It must not hold."""

    part: Filter


class _MetadataFilters(Protocol):
    """LlamaIndex's class of this name, so far as it is read."""

    filters: Any
    condition: Any


Filter: TypeAlias = Condition | And | Or | Not
Filters: TypeAlias = Mapping[str, Any] | _MetadataFilters | Filter  # what is taken for one


def parse_filter(wanted: Filters | None) -> Filter:
    """A filter as a tree; None and an empty mapping let every document through.

    Raises:
        ConfigError: something in it is not understood, of a type that metadata cannot have, too deep or too large;
            names the key or the operator, and what is allowed.
    """
    made = _filter(wanted, 0)
    conditions = list(_conditions(made))
    if len(conditions) > MAX_CONDITIONS:
        raise ConfigError(f"a filter must have at most {MAX_CONDITIONS:,} conditions, not {len(conditions):,}")
    if (values := sum(len(condition.values) for condition in conditions)) > MAX_VALUES:
        raise ConfigError(f"a filter must have at most {MAX_VALUES:,} values, not {values:,}")
    return made


def _conditions(part: Filter) -> list[Condition]:
    if isinstance(part, Condition):
        return [part]
    if isinstance(part, Not):
        return _conditions(part.part)
    return [condition for inner in part.parts for condition in _conditions(inner)]


def _filter(wanted: Any, depth: int) -> Filter:
    if depth > MAX_DEPTH:
        raise ConfigError(f"filters must be at most {MAX_DEPTH} deep inside each other")
    if wanted is None:
        return And()
    if isinstance(wanted, And):
        return _all([part for inner in wanted.parts if (part := _filter(inner, depth + 1)) != And()])
    if isinstance(wanted, Or):
        return Or(tuple(_filter(part, depth + 1) for part in wanted.parts))
    if isinstance(wanted, Not):
        return Not(_filter(wanted.part, depth + 1))
    if isinstance(wanted, Condition):
        return wanted
    if isinstance(wanted, Mapping):
        return _all([_item(key, value, depth) for key, value in wanted.items()])
    if hasattr(wanted, "filters") and hasattr(wanted, "condition"):  # LlamaIndex's, without importing it
        return _llama_filters(wanted, depth)
    if hasattr(wanted, "key") and hasattr(wanted, "value"):
        return _llama_filter(wanted)
    raise ConfigError(
        "a filter must be a mapping such as {'year': {'$gte': 2020}}, or LlamaIndex's MetadataFilters, not "
        f"{type(wanted).__name__}"
    )


def _all(parts: Sequence[Filter]) -> Filter:
    return parts[0] if len(parts) == 1 else And(tuple(parts))


# -- mappings ---------------------------------------------------------------------------------------------------------


def _item(key: object, value: Any, depth: int) -> Filter:
    """One entry of a mapping: a key of the metadata, or an operator on filters."""
    if not isinstance(key, str):
        raise ConfigError(f"a filter's keys must be text, not {key!r:.80}")
    if key == "$not":
        return Not(_filter(_mapping(key, value), depth + 1))
    if key in ("$and", "$or"):
        if isinstance(value, str) or not isinstance(value, Sequence) or not value:
            raise ConfigError(f"{key} must have a list of at least one filter, not {value!r:.80}")
        parts = tuple(_filter(_mapping(key, part), depth + 1) for part in value)
        return And(parts) if key == "$and" else Or(parts)
    if key.startswith("$"):
        fix = f"; an operator goes below its key: {{'year': {{{key!r}: ...}}}}" if key in _OPERATORS else ""
        raise ConfigError(f"a filter's operators on filters are $and, $or and $not, not {_shown(key)}{fix}")
    key = _text(key, "a filter's key")
    return _operators(key, value, depth) if isinstance(value, Mapping) else _equal(key, value)


def _mapping(operator: str, value: Any) -> Any:
    if value is None or isinstance(value, str) or (not value and isinstance(value, Mapping)):
        raise ConfigError(f"{operator} must have a filter, such as {{'year': 2024}}, not {value!r:.80}")
    return value


def _operators(key: str, wanted: Mapping[Any, Any], depth: int) -> Filter:
    if depth > MAX_DEPTH:
        raise ConfigError(f"filters must be at most {MAX_DEPTH} deep inside each other")
    known = ", ".join(_OPERATORS)
    if not wanted:
        raise ConfigError(f"the filter on {_shown(key)} must have a value or an operator, of {known}, not {{}}")
    parts: list[Filter] = []
    for operator, value in wanted.items():
        if operator == "$not":
            inner = _operators(key, value, depth + 1) if isinstance(value, Mapping) else _equal(key, value)
            parts.append(Not(inner))
        elif isinstance(operator, str) and operator in _OPERATORS:
            parts.append(_OPERATORS[operator](key, value))
        else:
            fix = ""
            if f"${operator}" in _OPERATORS:
                fix = f": write '${operator}'"
            elif isinstance(operator, str) and not operator.startswith("$"):
                fix = f"; for the value {_shown(operator)} of an object, the key is {_shown(f'{key}.{operator}')}"
            raise ConfigError(f"the operator on {_shown(key)} must be one of {known}, not {operator!r:.80}{fix}")
    return _all(parts)


def _equal(key: str, value: Any) -> Filter:
    """A value, or a collection of which one must be the value."""
    values = plain(value, f"the filter on {_shown(key)}") if value is not None else None
    return Condition(key, "in", _scalars(key, values if isinstance(values, list) else [values]))


def _exactly(key: str, value: Any) -> Filter:
    return Condition(key, "in", (_scalar(key, value, "$in, $contains or $all for a list"),))


def _one_of(key: str, value: Any) -> Filter:
    values = plain(value, f"the filter on {_shown(key)}") if value is not None else None
    if not isinstance(values, list):
        raise ConfigError(f"the filter on {_shown(key)} must have a list of values for 'in', not {value!r:.80}")
    return Condition(key, "in", _scalars(key, values))


def _compare(operator: Operator) -> Callable[[str, Any], Filter]:
    def made(key: str, value: Any) -> Filter:
        bound = _scalar(key, value, "$in or $between for several values")
        if isinstance(bound, bool):
            raise ConfigError(f"the filter on {_shown(key)} must compare with a number or text, not {bound}")
        return Condition(key, operator, (bound,))

    return made


def _between(key: str, value: Any) -> Filter:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise ConfigError(f"$between on {_shown(key)} must have a list of the least and the most, not {value!r:.80}")
    return And((_compare("gte")(key, value[0]), _compare("lte")(key, value[1])))


def _exists(key: str, value: Any) -> Filter:
    if not isinstance(value, bool):
        raise ConfigError(f"$exists on {_shown(key)} must be True or False, not {value!r:.80}")
    return Condition(key, "exists") if value else Not(Condition(key, "exists"))


def _contains(key: str, value: Any) -> Filter:
    return Condition(key, "contains", (_scalar(key, value, "$all for several values"),))


def _contains_each(key: str, value: Any) -> tuple[Filter, ...]:
    values = _one_of(key, value)
    if not isinstance(values, Condition) or not values.values:
        raise ConfigError(f"the filter on {_shown(key)} must have at least one value, not {value!r:.80}")
    return tuple(Condition(key, "contains", (inner,)) for inner in values.values)


_OPERATORS: dict[str, Callable[[str, Any], Filter]] = {
    "$eq": _exactly,
    "$ne": lambda key, value: Not(_exactly(key, value)),
    "$gt": _compare("gt"),
    "$gte": _compare("gte"),
    "$lt": _compare("lt"),
    "$lte": _compare("lte"),
    "$between": _between,
    "$in": _one_of,
    "$nin": lambda key, value: Not(_one_of(key, value)),
    "$exists": _exists,
    "$contains": _contains,
    "$all": lambda key, value: And(_contains_each(key, value)),
    "$not": lambda key, value: Not(_equal(key, value)),  # named here for messages; `_operators` sees to it
}


# -- LlamaIndex -------------------------------------------------------------------------------------------------------


def _llama_filters(wanted: Any, depth: int) -> Filter:
    parts = tuple(_filter(part, depth + 1) for part in wanted.filters)
    condition = _word(wanted.condition or "and")
    if condition == "and" or not parts:
        return And(parts)
    if condition == "or":
        return Or(parts)
    if condition == "not":
        return Not(Or(parts))  # as LlamaIndex's own stores have it: none of them holds
    raise ConfigError(f"the condition of MetadataFilters must be and, or, or not, not {condition!r:.80}")


def _llama_filter(wanted: Any) -> Filter:
    key, value, operator = wanted.key, wanted.value, _word(getattr(wanted, "operator", None) or "==")
    if not isinstance(key, str):
        raise ConfigError(f"the key of a MetadataFilter must be text, not {key!r:.80}")
    if not isinstance(operator, str) or operator not in _LLAMA_OPERATORS:
        known = ", ".join(_LLAMA_OPERATORS)
        raise ConfigError(f"the operator on {_shown(key)} must be one of {known}, not {operator!r:.80}")
    return _LLAMA_OPERATORS[operator](_text(key, "a filter's key"), value)


def _word(value: object) -> object:
    return value.value if isinstance(value, enum.Enum) else value


def _part_of_text(operator: Operator) -> Callable[[str, Any], Filter]:
    def made(key: str, value: Any) -> Filter:
        if not isinstance(value, str):
            raise ConfigError(f"the filter on {_shown(key)} must look for text, not {value!r:.80}")
        return Condition(key, operator, (_text(value, f"the filter on {_shown(key)}"),))

    return made


_LLAMA_OPERATORS: dict[str, Callable[[str, Any], Filter]] = {
    "==": _exactly,
    "!=": _OPERATORS["$ne"],
    ">": _OPERATORS["$gt"],
    ">=": _OPERATORS["$gte"],
    "<": _OPERATORS["$lt"],
    "<=": _OPERATORS["$lte"],
    "in": _one_of,
    "nin": _OPERATORS["$nin"],
    "any": lambda key, value: Or(_contains_each(key, value)),
    "all": _OPERATORS["$all"],
    "contains": _contains,
    "text_match": _part_of_text("text"),
    "text_match_insensitive": _part_of_text("text_any_case"),
    "is_empty": lambda key, value: Not(Condition(key, "filled")),
}


# -- values -----------------------------------------------------------------------------------------------------------


def _scalar(key: str, value: Any, fix: str) -> Scalar:
    made = plain(value, f"the filter on {_shown(key)}")
    if isinstance(made, list):
        raise ConfigError(f"the filter on {_shown(key)} must have one value, not {value!r:.80}: use {fix}")
    return _scalars(key, [made])[0]


def _scalars(key: str, values: Sequence[Any]) -> tuple[Scalar, ...]:
    for value in values:
        if value is None:
            raise ConfigError(
                f"the filter on {_shown(key)} must not compare with None or NaN: use {{'$exists': False}} for a value "
                "that is missing"
            )
        if not isinstance(value, str | int | float):
            raise ConfigError(f"the filter on {_shown(key)} must have text, numbers or booleans, not {value!r:.80}")
        if isinstance(value, str):
            _text(value, f"the filter on {_shown(key)}")
    return tuple(values)


def _text(text: str, name: str) -> str:
    plain(text, name)  # valid Unicode
    if "\0" in text:
        raise ConfigError(f"{name} must not be binary, and character {text.index(chr(0))} is NUL")
    return text


def _shown(key: str) -> str:
    return ascii(key)[:80]
