"""What metadata may hold: the values of JSON, and the common types of Python that become them.

==========================================  ==========================================================================
given                                       kept
==========================================  ==========================================================================
text, whole numbers, booleans, None         as they are
finite floats                               as they are
NaN, NaT, pandas' NA                        None: tables write them for a missing value
`datetime`, `date`, `time`                  ISO 8601 text, which sorts as the times do
`Path`, `UUID`                              text
`Decimal`, `Fraction`                       a whole number, or the nearest float
`Enum`                                      its value
numpy's (and torch's) scalars and arrays    numbers, text and lists
lists, tuples, sets, ranges                 lists (sets in the order of their JSON)
mappings with text as keys                  objects
==========================================  ==========================================================================

Everything else is refused by name. None counts as missing where filters look (`lloco_engine.filters`).
"""

from __future__ import annotations

import datetime
import decimal
import enum
import json
import math
import numbers
import os
import uuid
from collections.abc import Mapping, Sequence, Set
from typing import Any

from lloco_engine.errors import ConfigError
from lloco_engine.types import MetadataValue
from lloco_engine.unicode import not_unicode

__all__ = ["MAX_CHARS", "MAX_DEPTH", "dump", "plain", "plain_metadata", "same_metadata"]

MAX_DEPTH = 32  # lists and objects inside each other
MAX_CHARS = 1_000_000  # of all metadata of a document as JSON
_MAX_BITS = 3000  # of a whole number: 900 digits


def plain_metadata(metadata: Mapping[str, Any]) -> dict[str, MetadataValue]:
    """A document's metadata as JSON values.

    Raises:
        ConfigError: a key is not text, a value has no form in JSON, or it is too long or too deep; names the key.
    """
    made = {_key(key, "metadata"): plain(value, f"metadata {_shown(key)}") for key, value in metadata.items()}
    if (chars := len(dump(made))) > MAX_CHARS:
        raise ConfigError(f"metadata must be at most {MAX_CHARS:,} characters of JSON, not {chars:,}")
    return made


def plain(value: Any, name: str, depth: int = 0) -> MetadataValue:
    """One value as JSON has it; see the table above.

    Args:
        value: anything.
        name: what errors call it.
        depth: how deep it lies in another.

    Raises:
        ConfigError: JSON has no form for it.
    """
    if depth > MAX_DEPTH:
        raise ConfigError(f"{name} must hold at most {MAX_DEPTH} lists and objects inside each other")
    if isinstance(value, enum.Enum):
        return plain(value.value, name, depth + 1)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, name)
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date, and so is pandas' NaT
        return value.isoformat() if value == value else None
    if type(value).__name__ == "NAType":
        return None
    if isinstance(value, os.PathLike | uuid.UUID):
        return _text(str(value), name)
    kind = getattr(getattr(value, "dtype", None), "kind", "")  # numpy's scalars have one too, and count as numbers
    if isinstance(value, decimal.Decimal | numbers.Real) and kind != "m":
        return _number(value, name)
    if isinstance(value, Mapping):
        return {_key(key, name): plain(inner, f"{name}[{_shown(key)}]", depth + 1) for key, inner in value.items()}
    if isinstance(value, Set):
        return sorted((plain(inner, name, depth + 1) for inner in value), key=dump)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [plain(inner, name, depth + 1) for inner in value]
    if hasattr(value, "dtype") and hasattr(value, "tolist"):  # an array, or a scalar that is no number
        made = _times(value.astype(str).tolist()) if kind == "M" else value.tolist()
        if kind != "m" and not hasattr(made, "dtype"):
            return plain(made, name, depth + 1)
    raise ConfigError(
        f"{name} must be text, a finite number, a boolean, None, a date or time, or a list or object of these, "
        f"not {type(value).__name__}"
    )


def dump(value: MetadataValue | Mapping[str, MetadataValue]) -> str:
    """A value as JSON, keys in order: equal texts are equal values, of equal types."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True)


def same_metadata(one: Mapping[str, MetadataValue], other: Mapping[str, MetadataValue]) -> bool:
    """Whether two mappings of JSON values are the same, types included: 1 is not True."""
    return dump(one) == dump(other)


def _number(value: Any, name: str) -> int | float | None:
    if isinstance(value, numbers.Integral):
        whole = int(value)
        if whole.bit_length() > _MAX_BITS:
            raise ConfigError(f"{name} must be a number of at most 900 digits")
        return whole
    if value.is_nan() if isinstance(value, decimal.Decimal) else math.isnan(value):
        return None
    try:
        near = float(value)
    except OverflowError as error:  # a huge fraction
        raise ConfigError(f"{name} must be a finite number that a float can hold") from error
    if not math.isfinite(near):
        raise ConfigError(f"{name} must be a finite number, not {value!r}")
    if not isinstance(value, float) and not hasattr(value, "dtype") and value == int(value):
        return _number(int(value), name)
    return near


def _times(made: Any) -> Any:
    return [_times(inner) for inner in made] if isinstance(made, list) else None if made == "NaT" else made


def _key(key: object, name: str) -> str:
    if isinstance(key, enum.Enum) and isinstance(key, str):
        key = key.value
    if not isinstance(key, str):
        raise ConfigError(f"{name} must have text as keys, not {key!r:.80}")
    return _text(key, f"the key {_shown(key)} of {name}")


def _text(text: str, name: str) -> str:
    text = str.__str__(text)  # also of a subclass, as numpy's
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise not_unicode(error, name) from error
    return text


def _shown(key: object) -> str:
    return ascii(key)[:80]
