"""CSV and TSV -> rows as lines, cells parted by tabs."""

from __future__ import annotations

import csv
import io

from lloco_engine.errors import DocumentError
from lloco_engine.readers.encodings import decode
from lloco_engine.readers.parsed import Parsed

__all__ = ["parse_csv"]

_DELIMITERS = ",;\t|"


def parse_csv(data: bytes) -> Parsed:
    """A table; what parts its cells is that of comma, semicolon, tab and bar which its first line has most of.

    Raises:
        DocumentError: its encoding cannot be told, or it is not CSV.
    """
    text, encoding = decode(data)
    first = text[: text.find("\n")] if "\n" in text else text
    delimiter = max(_DELIMITERS, key=first[:65536].count)
    csv.field_size_limit(max(len(text), 1))  # the whole text is in memory already
    try:
        rows = [
            "\t".join(" ".join(cell.split()) for cell in row).rstrip()
            for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        ]
    except csv.Error as error:
        raise DocumentError(f"the table is damaged: {error}") from error
    return Parsed("", "\n".join(row for row in rows if row), encoding)
