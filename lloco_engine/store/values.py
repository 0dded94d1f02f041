"""How the catalogue keeps metadata so that filters find it by an index: a row for each value, as text that sorts.

Every value becomes text that begins with its type, so that 1 is not "1" and nothing is compared with another type:
``s:`` and the text; ``n:`` and a number, whole or not, of any size; ``b:true`` or ``b:false``; ``o:`` for an object.
Texts of one type sort as their values do: texts by code point, numbers by size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from decimal import Decimal

from lloco_engine.metadata import dump
from lloco_engine.types import MetadataValue

__all__ = ["NUMBER", "TEXT", "Row", "encode", "escape", "metadata_rows", "private_key", "rows_of"]

TEXT, NUMBER, _BOOLEAN, _OBJECT = "s:", "n:", "b:", "o:"
Row = tuple[str, str, bool]  # key, value, and whether it was in a list
_MIDDLE = 5000  # of the exponents of numbers: 900 digits before the point, 324 zeros after it
_COMPLEMENT = str.maketrans("0123456789", "9876543210")


def rows_of(metadata: Mapping[str, MetadataValue], private: Mapping[str, MetadataValue]) -> list[Row]:
    """What filters can find a document by.

    A list has a row for each of its elements, and no row when it is empty; None has none. What is inside an object has
    the keys on the way to it, joined by dots. Of ``private`` only the outermost values count, under `private_key`.

    Args:
        metadata, private: of a document, as JSON values.
    """
    rows = [row for key, value in metadata.items() for row in _rows(escape(key), value, listed=False)]
    for key, value in private.items():
        if value is not None:
            rows.append((private_key(key), encode(value) if isinstance(value, str | int | float) else _OBJECT, False))
    return list(dict.fromkeys(rows))


def metadata_rows(metadata: str, private: str) -> str:
    """`rows_of` two JSON objects, as JSON: a function of SQL on every connection of a catalogue."""
    return json.dumps(rows_of(json.loads(metadata), json.loads(private)))


def _rows(key: str, value: MetadataValue, *, listed: bool) -> Iterator[Row]:
    if value is None:
        return
    if isinstance(value, str | int | float):
        yield key, encode(value), listed
    elif isinstance(value, Mapping):
        yield key, _OBJECT, listed
        for inner_key, inner in value.items():
            yield from _rows(f"{key}.{escape(inner_key)}", inner, listed=listed)
    else:
        for inner in value:
            yield from _rows(key, inner, listed=True)


def private_key(key: str) -> str:
    """The key of a `Document.private` value: no metadata has it, for `escape` gives none that begins so."""
    return f"\1p{key}"


def escape(text: str) -> str:
    """Text without NUL, at which functions of SQL stop reading; sorts as the text does."""
    return text.replace("\1", "\1\2").replace("\0", "\1\1")


def encode(value: str | int | float) -> str:
    """One value as rows have it."""
    if isinstance(value, str):
        return TEXT + escape(value)
    if isinstance(value, bool):
        return _BOOLEAN + dump(value)
    return NUMBER + _sortable(value)


def _sortable(value: int | float) -> str:
    """A finite number as ASCII that sorts by size: sign, exponent, digits; those of a negative one complemented."""
    if isinstance(value, float):
        value = int(value) if value.is_integer() else value
    number = Decimal(value) if isinstance(value, int) else Decimal(repr(value))
    if not number:
        return "1"
    sign, digits, _ = number.as_tuple()
    size = f"{number.adjusted() + _MIDDLE:04}{''.join(map(str, digits)).rstrip('0')}"
    return f"0{size.translate(_COMPLEMENT)}~" if sign else f"2{size}"
