"""Whether the word index says what the chunks say: derived once more, and compared word by word."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from itertools import zip_longest
from typing import Any

from lloco_engine.store.tables import Shape
from lloco_engine.store.terms import add_words

__all__ = ["word_problems"]

_ROWS = 5_000
_FILLED_FROM = ("documents", "chunks", "windows")  # what `add_words` reads; vectors stay behind


def word_problems(copy: sqlite3.Connection, empty: sqlite3.Connection) -> Iterator[str]:
    """What is wrong with the full-text tables of a catalogue, a sentence for each that is not right.

    Args:
        copy: a private copy of the catalogue, which is written to.
        empty: a catalogue of the latest form with nothing in it, which is filled.
    """
    shape = Shape(copy)
    empty.execute("PRAGMA foreign_keys = OFF")
    for table in _FILLED_FROM:
        columns = shape.columns(table)
        listed = ", ".join("x'' AS vector" if name == "vector" else f'"{name}"' for name in columns)
        marks = ", ".join("?" * len(columns))
        names = ", ".join(f'"{name}"' for name in columns)
        rows = copy.execute(f"SELECT {listed} FROM {table}")
        empty.executemany(f"INSERT INTO {table} ({names}) VALUES ({marks})", rows)
    add_words(empty)
    for name in Shape(empty).virtual:
        try:
            if name not in shape.virtual:
                raise sqlite3.DatabaseError("it is missing")
            copy.execute(f"INSERT INTO {name} ({name}) VALUES ('integrity-check')")
            if not _same(_instances(copy, name), _instances(empty, name)) or not _found_alike(copy, empty, name):
                raise sqlite3.DatabaseError("it does not have the words of the chunks")
        except (sqlite3.Error, UnicodeError, MemoryError) as error:
            yield f"the word index {name!r} is damaged ({error})"


def _instances(connection: sqlite3.Connection, name: str) -> sqlite3.Cursor:
    """Every place of every word, in order."""
    connection.execute(f"CREATE VIRTUAL TABLE temp.places_of_{name} USING fts5vocab ('main', '{name}', 'instance')")
    return connection.execute(f"SELECT * FROM temp.places_of_{name}")


def _found_alike(copy: sqlite3.Connection, empty: sqlite3.Connection, name: str) -> bool:
    """Whether a search finds every word where it is: it goes other ways through the index than a list of all places."""
    empty.execute(f"CREATE VIRTUAL TABLE temp.words_of_{name} USING fts5vocab ('main', '{name}', 'row')")
    query = f"SELECT group_concat(rowid) FROM {name} WHERE {name} MATCH ?"
    for (word,) in empty.execute(f"SELECT term FROM temp.words_of_{name}"):
        quoted = '"' + word.replace('"', '""') + '"'
        if copy.execute(query, (quoted,)).fetchone() != empty.execute(query, (quoted,)).fetchone():
            return False
    return True


def _same(one: sqlite3.Cursor, other: sqlite3.Cursor) -> bool:
    with closing(one), closing(other):
        pairs = zip_longest(_batches(one), _batches(other))
        return all(first == second for first, second in pairs)


def _batches(cursor: sqlite3.Cursor) -> Iterator[list[Any]]:
    while rows := cursor.fetchmany(_ROWS):
        yield rows
