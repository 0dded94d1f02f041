"""The tables of a catalogue, whose rows are whose, and the hashes of what they say.

Which rows belong to a document or a segment follows from the foreign keys that cascade, so a table or a column that a
later migration brings is hashed without being named here.
"""

from __future__ import annotations

import hashlib
import sqlite3
import struct
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

__all__ = ["Key", "Parts", "Shape", "packed", "quoted"]

Parts = dict[str, str]  # hash by table
Key = int | str
_ROOTS = ("documents", "segments")
_OWN = ("seals", "sealed")
_BESIDE = {
    "schema": "SELECT type, name, tbl_name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_stat%' ORDER BY 1, 2",
    "user_version": "PRAGMA user_version",
    "application_id": "PRAGMA application_id",
    "manifest": "SELECT manifest FROM sealed",
}
_LABELS = {"documents": "doc_id"}  # what names a row in messages, where its key does not
# By the statements that made a catalogue's tables: each writer asks SQLite forty times of the same ones.
_ANSWERS: dict[tuple[tuple[str, str], ...], dict[tuple[str, str], list[Any]]] = {}
_MOST_SCHEMAS = 8


@dataclass(frozen=True)
class _Table:
    """A table with rows of a root: how they are found, and how a row says whose it is."""

    name: str
    columns: tuple[str, ...]
    where: str  # of a row; one parameter, the root's key
    order: str
    key_of: Callable[[str], str]  # the root's key as SQL, of a row that a trigger calls by this name

    @cached_property
    def select(self) -> str:
        columns = ", ".join(map(quoted, self.columns))
        return f"SELECT {columns} FROM {quoted(self.name)} WHERE {self.where} ORDER BY {self.order}"


class Shape:
    """Which tables a catalogue has, and whose rows they hold.

    Args:
        connection: to the catalogue.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._queries: dict[str, tuple[str, tuple[str, ...]]] = {}
        statements = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table' ORDER BY name")
        tables: dict[str, str] = {name: sql or "" for name, sql in statements.fetchall()}
        self._answers = _ANSWERS.setdefault(tuple(tables.items()), {})
        while len(_ANSWERS) > _MOST_SCHEMAS:
            _ANSWERS.pop(next(iter(_ANSWERS)), None)
        self.virtual = tuple(name for name, sql in tables.items() if sql.upper().startswith("CREATE VIRTUAL"))
        self.plain = tuple(
            name
            for name in tables
            if name not in (*self.virtual, *_OWN)
            and not name.startswith(("sqlite_stat", *(f"{virtual}_" for virtual in self.virtual)))
        )

    @cached_property
    def owned(self) -> dict[str, tuple[_Table, ...]]:
        """Of each root the tables with rows of it, itself first and every other after the one that it refers to."""
        return {root: tuple(self._below(root)) for root in _ROOTS if root in self.plain}

    @cached_property
    def others(self) -> tuple[str, ...]:
        """Tables that belong to no root."""
        known = {table.name for tables in self.owned.values() for table in tables}
        return tuple(name for name in self.plain if name not in known)

    def key(self, root: str) -> str:
        """The column that is a root's key."""
        return next(str(row[1]) for row in self._info(root) if row[5])

    def keys(self, root: str) -> list[Key]:
        """The keys of all rows of a root."""
        column = quoted(self.key(root))
        return [row[0] for row in self._connection.execute(f"SELECT {column} FROM {root} ORDER BY {column}")]

    def label(self, root: str, key: Key) -> str:
        """What messages call a row of a root."""
        column = _LABELS.get(root)
        if column is None:
            return str(key)
        row = self._connection.execute(f"SELECT {column} FROM {root} WHERE {self.key(root)} = ?", (key,)).fetchone()
        return str(row[0])

    def parts(self, root: str, key: Key) -> Parts | None:
        """The hashes of everything that is said of one row of a root; None when it is not there."""
        made = {}
        for table in self.owned[root]:
            digest, rows = _digest(table.columns), 0
            for row in self._connection.execute(table.select, (key,)):
                digest.update(packed(row))
                rows += 1
            if table.name == root and not rows:
                return None
            made[table.name] = digest.hexdigest()[:32]
        return made

    def rest(self, names: Collection[str] | None = None) -> Parts:
        """The hashes of the tables that belong to no root, of the schema, and of the text of the manifest.

        Args:
            names: of those that are wanted; None for all.
        """
        made = {}
        for name in self.others if names is None else [name for name in self.others if name in names]:
            made[name] = self._hash(*self._whole(name))
        return made | {name: self.beside(name) for name in _BESIDE if names is None or name in names}

    def beside(self, name: str) -> str:
        """The hash of one of the things that are in no table of their own."""
        return self._hash(_BESIDE[name], (name,))

    def _hash(self, query: str, columns: tuple[str, ...]) -> str:
        digest = _digest(columns)
        for row in self._connection.execute(query):
            digest.update(packed(row))
        return str(digest.hexdigest()[:32])

    def _whole(self, table: str) -> tuple[str, tuple[str, ...]]:
        """The query for all rows of a table, and its columns."""
        if table not in self._queries:
            columns = self.columns(table)
            listed = ", ".join(map(quoted, columns))
            query = f"SELECT {listed} FROM {quoted(table)} ORDER BY {self._order(table)}"
            self._queries[table] = query, columns
        return self._queries[table]

    def columns(self, table: str) -> tuple[str, ...]:
        """A table's columns, those that are worked out too."""
        return tuple(row[1] for row in self._info(table))

    def _order(self, table: str) -> str:
        """The columns that rows are put in order by, which no two rows have in common."""
        info = self._info(table)
        keys = [quoted(row[1]) for row in sorted(info, key=lambda row: int(row[5])) if row[5]]
        return ", ".join(keys or [quoted(row[1]) for row in info])

    def _info(self, table: str) -> list[Any]:
        return self._pragma("table_xinfo", table)

    def _pragma(self, name: str, table: str) -> list[Any]:
        """What SQLite says of a table, which depends on the statements that made the tables alone."""
        if (name, table) not in self._answers:
            self._answers[name, table] = self._connection.execute(f"PRAGMA {name}({quoted(table)})").fetchall()
        return self._answers[name, table]

    def _below(self, root: str) -> Iterator[_Table]:
        key = quoted(self.key(root))
        found = {root: _Table(root, self.columns(root), f"{key} = ?", self._order(root), lambda row: f"{row}.{key}")}
        yield found[root]
        while True:
            new = [name for name in self.plain if name not in found and self._parent(name, found)]
            for name in new:
                parent, mine, theirs = self._parent(name, found) or ("", "", "")
                found[name] = self._child(name, found[parent], mine, theirs, root if theirs == key else "")
                yield found[name]
            if not new:
                return

    def _parent(self, name: str, found: Iterable[str]) -> tuple[str, str, str] | None:
        """The table in ``found`` that rows of this one go with, and the columns of both that say so."""
        for row in self._pragma("foreign_key_list", name):
            parent, mine, theirs, cascades = row[2], row[3], row[4], row[6] == "CASCADE"
            if parent in found and cascades:
                return parent, quoted(mine), quoted(theirs or self.key(parent))
        return None

    def _child(self, name: str, parent: _Table, mine: str, theirs: str, root: str) -> _Table:
        if parent.name == root:
            return _Table(name, self.columns(name), f"{mine} = ?", self._order(name), lambda row: f"{row}.{mine}")
        above = quoted(parent.name)
        return _Table(
            name,
            self.columns(name),
            f"{mine} IN (SELECT {theirs} FROM {above} WHERE {parent.where})",
            self._order(name),
            lambda row: f"(SELECT {parent.key_of('p')} FROM {above} p WHERE p.{theirs} = {row}.{mine})",
        )


def _digest(columns: tuple[str, ...]) -> Any:
    return _begun(columns).copy()


@lru_cache(maxsize=256)
def _begun(columns: tuple[str, ...]) -> Any:
    return hashlib.sha256(packed(columns))


def packed(row: Iterable[Any]) -> bytes:
    """A row as bytes: types and lengths with the values, so that no two rows are alike."""
    parts = []
    for value in row:
        if isinstance(value, str):
            mark, data = b"t", value.encode("utf-8", "surrogateescape")
        elif isinstance(value, bytes):
            mark, data = b"b", value
        elif isinstance(value, float):
            mark, data = b"f", struct.pack("<d", value)
        else:
            mark, data = (b"n", b"") if value is None else (b"i", str(value).encode("ascii"))
        parts += [mark, len(data).to_bytes(8, "little"), data]
    return b"".join((*parts, b"."))


def quoted(name: str) -> str:
    """A name as SQL takes any."""
    doubled = name.replace('"', '""')
    return f'"{doubled}"'
