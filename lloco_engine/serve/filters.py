"""Filters as the API writes them, as the engine does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lloco_engine.errors import ConfigError
from lloco_engine.filters import MAX_DEPTH

__all__ = ["both", "plain_filters"]

_COMPARISONS = ("eq", "ne", "gt", "gte", "lt", "lte", "in", "nin")


def plain_filters(given: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """A filter of the API as the engine's; one of the engine's own is let be.

    The API's are ``{"type": "eq", "key": "year", "value": 2024}`` and ``{"type": "and", "filters": [...]}``.

    Raises:
        ConfigError: it is a filter of the API, and not as that has it.
    """
    keys, kind = set(given), given.get("type")
    if depth > MAX_DEPTH:
        raise ConfigError(f"filters must be at most {MAX_DEPTH} deep")
    if keys == {"type", "filters"}:
        parts = given["filters"]
        if kind not in ("and", "or") or not isinstance(parts, list) or not all(isinstance(one, dict) for one in parts):
            raise ConfigError(f"filters together have the type 'and' or 'or' and a list of filters, not {given!r:.80}")
        return {f"${kind}": [plain_filters(one, depth + 1) for one in parts]}
    if keys == {"type", "key", "value"}:
        if kind not in _COMPARISONS or not isinstance(given["key"], str):
            raise ConfigError(f"a filter has a key and a type of {', '.join(_COMPARISONS)}, not {given!r:.80}")
        return {given["key"]: {f"${kind}": given["value"]}}
    return dict(given)


def both(one: dict[str, Any], other: dict[str, Any] | None) -> dict[str, Any]:
    """What meets two filters."""
    return {"$and": [one, other]} if other else one
