"""Seals: hashes over everything that the catalogue says, so that no row and no cell changes unseen.

::

    seals     one row a document and one a segment: for each table that has rows of it, a hash of those rows
    sealed    one row: the sum of all rows of ``seals``, and for each table that belongs to neither its hash, with
              those of the schema; and the text of manifest.json

A table belongs to the documents or the segments when its foreign keys, as far as they cascade, lead there; all its
columns count. So a table or a column that is added later is sealed without being named here. Hashes are renewed in the
transaction that changes the rows (`Sealing`), by triggers of that connection alone: what another program changes stays
without a seal, and what was damaged before a transaction is not sealed by it.
"""

from __future__ import annotations

import hashlib
import sqlite3
import struct
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

__all__ = [
    "Key",
    "Parts",
    "Sealing",
    "Seals",
    "Shape",
    "has_seals",
    "keep_manifest",
    "kept_manifest",
    "rest_differing",
    "seal_all",
    "seal_problems",
    "unsound",
    "unsound_keys",
]

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


@dataclass(frozen=True)
class _Table:
    """A table with rows of a root: how they are found, and how a row says whose it is."""

    name: str
    columns: tuple[str, ...]
    where: str  # of a row; one parameter, the root's key
    order: str
    key_of: Callable[[str], str]  # the root's key as SQL, of a row that a trigger calls by this name

    @property
    def select(self) -> str:
        columns = ", ".join(map(_quoted, self.columns))
        return f"SELECT {columns} FROM {_quoted(self.name)} WHERE {self.where} ORDER BY {self.order}"


class Shape:
    """Which tables a catalogue has, and whose rows they hold.

    Args:
        connection: to the catalogue.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._infos: dict[str, list[Any]] = {}
        statements = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table' ORDER BY name")
        tables: dict[str, str] = {name: sql or "" for name, sql in statements.fetchall()}
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
        column = _quoted(self.key(root))
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
                digest.update(_packed(row))
                rows += 1
            if table.name == root and not rows:
                return None
            made[table.name] = digest.hexdigest()[:32]
        return made

    def rest(self) -> Parts:
        """The hashes of the tables that belong to no root, of the schema, and of the text of the manifest."""
        made = {}
        for name in self.others:
            columns = self.columns(name)
            listed = ", ".join(map(_quoted, columns))
            query = f"SELECT {listed} FROM {_quoted(name)} ORDER BY {self._order(name)}"
            made[name] = self._hash(query, columns)
        return made | {name: self.beside(name) for name in _BESIDE}

    def beside(self, name: str) -> str:
        """The hash of one of the things that are in no table of their own."""
        return self._hash(_BESIDE[name], (name,))

    def _hash(self, query: str, columns: tuple[str, ...]) -> str:
        digest = _digest(columns)
        for row in self._connection.execute(query):
            digest.update(_packed(row))
        return str(digest.hexdigest()[:32])

    def columns(self, table: str) -> tuple[str, ...]:
        """A table's columns, those that are worked out too."""
        return tuple(row[1] for row in self._info(table))

    def _order(self, table: str) -> str:
        """The columns that rows are put in order by, which no two rows have in common."""
        info = self._info(table)
        keys = [_quoted(row[1]) for row in sorted(info, key=lambda row: int(row[5])) if row[5]]
        return ", ".join(keys or [_quoted(row[1]) for row in info])

    def _info(self, table: str) -> list[Any]:
        if table not in self._infos:
            self._infos[table] = self._connection.execute(f"PRAGMA table_xinfo({_quoted(table)})").fetchall()
        return self._infos[table]

    def _below(self, root: str) -> Iterator[_Table]:
        key = _quoted(self.key(root))
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
        for row in self._connection.execute(f"PRAGMA foreign_key_list({_quoted(name)})").fetchall():
            parent, mine, theirs, cascades = row[2], row[3], row[4], row[6] == "CASCADE"
            if parent in found and cascades:
                return parent, _quoted(mine), _quoted(theirs or self.key(parent))
        return None

    def _child(self, name: str, parent: _Table, mine: str, theirs: str, root: str) -> _Table:
        if parent.name == root:
            return _Table(name, self.columns(name), f"{mine} = ?", self._order(name), lambda row: f"{row}.{mine}")
        above = _quoted(parent.name)
        return _Table(
            name,
            self.columns(name),
            f"{mine} IN (SELECT {theirs} FROM {above} WHERE {parent.where})",
            self._order(name),
            lambda row: f"(SELECT {parent.key_of('p')} FROM {above} p WHERE p.{theirs} = {row}.{mine})",
        )


class Sealing:
    """Renews the seals of what one connection changes.

    Args:
        connection: of a writer.
        before: opens another connection, which sees the catalogue as it was before the transaction.
    """

    def __init__(self, connection: sqlite3.Connection, before: Callable[[], sqlite3.Connection]) -> None:
        self._connection, self._before = connection, before
        self._shape = Shape(connection)
        self._changes = 0
        connection.execute("CREATE TEMP TABLE changed (root TEXT, key, made INTEGER, PRIMARY KEY (root, key, made))")
        for root, tables in self._shape.owned.items():
            for table in tables:
                for event, rows in {"INSERT": ("new",), "DELETE": ("old",), "UPDATE": ("old", "new")}.items():
                    made = int(event == "INSERT" and table.name == root)
                    noted = " ".join(
                        f"INSERT OR IGNORE INTO changed SELECT '{root}', {table.key_of(row)}, {made};" for row in rows
                    )
                    name = _quoted(f"{event} {table.name}".lower())
                    connection.execute(
                        f"CREATE TEMP TRIGGER {name} AFTER {event} ON main.{_quoted(table.name)} BEGIN {noted} END"
                    )

    def begin(self) -> None:
        """Note where a transaction begins."""
        self._changes = self._connection.total_changes

    def settle(self) -> None:
        """Renew the seals of what the transaction changed, before it is committed."""
        connection, shape = self._connection, self._shape
        if connection.total_changes == self._changes:
            return
        rows = connection.execute("SELECT root, key, max(made) FROM changed WHERE key IS NOT NULL GROUP BY root, key")
        total = _total(connection)
        doubted = []
        for root, key, made in rows.fetchall():
            known = connection.execute("SELECT seal FROM seals WHERE root = ? AND key = ?", (root, key)).fetchone()
            parts = shape.parts(root, key)
            if known is not None and parts is not None and not made:
                if known[0] == parts_text(parts):
                    continue
                doubted.append((root, key))
            total ^= _renew(connection, root, key, None if parts is None else shape.label(root, key), parts)
        if doubted:
            total ^= self._take_back(doubted)
        connection.execute("DELETE FROM changed")
        connection.execute("UPDATE sealed SET total = ?", (f"{total:064x}",))
        rest = parts_text(shape.rest())
        connection.execute("UPDATE sealed SET rest = ? WHERE rest <> ?", (rest, rest))

    def _take_back(self, doubted: list[tuple[str, Key]]) -> int:
        """Give those their seals back that did not have the right ones before; what that changes in the total."""
        change = 0
        with closing(self._before()) as before:
            shape = Shape(before)
            for root, key in doubted:
                was = before.execute("SELECT seal, label FROM seals WHERE root = ? AND key = ?", (root, key)).fetchone()
                try:
                    parts = shape.parts(root, key)
                    sound = was is not None and parts is not None and was[0] == parts_text(parts)
                except (sqlite3.Error, UnicodeError):
                    sound = False
                if not sound:
                    seal, label = ("", "") if was is None else was
                    change ^= _renew(self._connection, root, key, label, seal)
        return change


class Seals:
    """The seals that a catalogue has, as far as they can be read.

    ``complete``: all that were written are there, so nothing is missing that they do not name.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._seals: dict[tuple[str, Key], tuple[str, str]] = {}
        self._sum = 0
        try:
            for root, key, label, seal in connection.execute("SELECT root, key, label, seal FROM seals"):
                self._seals[root, key] = (str(label), str(seal))
                self._sum ^= _weight((root, key, label, seal))
            self._total = _total(connection)
        except (sqlite3.Error, TypeError, UnicodeError):
            self._total = ~0
        self.complete = self._total == self._sum

    def listed(self, root: str, shape: Shape) -> list[tuple[Key, str]]:
        """Key and name of everything that a seal or a row says was there."""
        names = {key: label for (of, key), (label, _) in self._seals.items() if of == root}
        try:
            for key in shape.keys(root):
                if key not in names:
                    names[key] = shape.label(root, key)
        except sqlite3.Error:
            pass  # the seals name them
        return sorted(names.items(), key=str)

    def differing(self, root: str, key: Key, shape: Shape) -> list[str]:
        """The tables that do not fit the seal of a document or segment that was copied; none when all is sound.

        Also where its seal is the only one that is damaged, which the total of all seals tells.
        """
        label, seal = self._seals.get((root, key), ("", ""))
        parts = shape.parts(root, key)
        wrong = differing(seal, parts or {})
        if not wrong or parts is None:
            return wrong if parts is not None else [root]
        mine = _weight((root, key, label, seal)) if (root, key) in self._seals else 0
        right = _weight((root, key, shape.label(root, key), parts_text(parts)))
        return [] if self._sum ^ mine ^ right == self._total else wrong


def has_seals(connection: sqlite3.Connection) -> bool:
    """Whether a catalogue has had the migration that brought them."""
    found = connection.execute(
        "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name IN ('seals', 'sealed')"
    )
    return bool(found.fetchone()[0] == 2)


def seal_all(connection: sqlite3.Connection, but: Collection[tuple[str, Key]] = ()) -> None:
    """Seal everything anew; documents and segments in ``but`` keep what they had, which does not fit them."""
    shape = Shape(connection)
    for root in shape.owned:
        for key in shape.keys(root):
            if (root, key) not in but:
                _renew(connection, root, key, shape.label(root, key), shape.parts(root, key))
    connection.execute("UPDATE sealed SET total = ?", (f"{_sum(connection):064x}",))
    connection.execute("UPDATE sealed SET rest = ?", (parts_text(shape.rest()),))


def keep_manifest(connection: sqlite3.Connection, text: str) -> None:
    """Keep a copy of manifest.json, sealed."""
    connection.execute("UPDATE sealed SET manifest = ?", (text,))
    connection.execute("UPDATE sealed SET rest = ?", (parts_text(Shape(connection).rest()),))


def kept_manifest(connection: sqlite3.Connection) -> str | None:
    """The text of manifest.json as it was written; None where it is not known, or is damaged itself."""
    if not has_seals(connection):
        return None
    rows = connection.execute("SELECT manifest, rest FROM sealed").fetchall()
    if len(rows) != 1 or rows[0][0] is None:
        return None
    sound = f"manifest={Shape(connection).beside('manifest')}" in str(rows[0][1]).split(" ")
    return str(rows[0][0]) if sound else None


def rest_differing(connection: sqlite3.Connection, shape: Shape) -> list[str]:
    """The tables of no document or segment, and what else was hashed with them, that do not fit."""
    rows = connection.execute("SELECT rest FROM sealed").fetchall()
    return differing(str(rows[0][0]) if len(rows) == 1 else "", shape.rest())


def unsound_keys(connection: sqlite3.Connection) -> set[tuple[str, Key]]:
    """Documents and segments that do not fit their seals."""
    shape = Shape(connection)
    found = set()
    for root in shape.owned:
        for key in shape.keys(root):
            if unsound(connection, root, key, shape):
                found.add((root, key))
    return found


def seal_problems(connection: sqlite3.Connection) -> Iterator[tuple[str, str | None]]:
    """Everything that does not fit its seal: a sentence, and the id of the document that suffers from it.

    Args:
        connection: inside a transaction.
    """
    shape = Shape(connection)
    for root in shape.owned:
        known = {
            key: (str(label), str(seal))
            for key, label, seal in connection.execute("SELECT key, label, seal FROM seals WHERE root = ?", (root,))
        }
        what = root.removesuffix("s")
        for key in shape.keys(root):
            label, seal = known.pop(key, (None, ""))
            name = label if label is not None else shape.label(root, key)
            if wrong := differing(seal, shape.parts(root, key) or {}):
                doc_id = name if root == "documents" else None
                yield f"what {', '.join(wrong)} say of {what} {name!r} is not what was written there", doc_id
        for label, _ in known.values():
            yield f"{what} {label!r} is missing", label if root == "documents" else None
    rows = connection.execute("SELECT total, rest FROM sealed").fetchall()
    if len(rows) != 1 or rows[0][0] != f"{_sum(connection):064x}":
        yield "the list of documents and segments is not the one that was written: some may be missing", None
    for name in rest_differing(connection, shape):
        yield f"table {name!r} is not what was written there", None


def unsound(connection: sqlite3.Connection, root: str, key: Key, shape: Shape | None = None) -> list[str]:
    """The tables whose rows of one document or segment are not what was written there; empty when all are."""
    known = connection.execute("SELECT seal FROM seals WHERE root = ? AND key = ?", (root, key)).fetchone()
    parts = (shape or Shape(connection)).parts(root, key) or {}
    return differing(known[0] if known else "", parts)


def differing(text: str, parts: Parts) -> list[str]:
    """The tables whose hashes are not those of a seal's text."""
    kept = set(text.split(" "))
    lost = {part.split("=")[0] for part in kept} - set(parts) - {""}
    return [name for name, digest in parts.items() if f"{name}={digest}" not in kept] + sorted(lost)


def parts_text(parts: Parts) -> str:
    """Hashes by table as ``seals`` and ``sealed`` keep them."""
    return " ".join(f"{name}={digest}" for name, digest in sorted(parts.items()))


def _sum(connection: sqlite3.Connection) -> int:
    """What all rows of ``seals`` amount to."""
    total = 0
    for row in connection.execute("SELECT root, key, label, seal FROM seals"):
        total ^= _weight(row)
    return total


def _total(connection: sqlite3.Connection) -> int:
    text = str(connection.execute("SELECT total FROM sealed").fetchone()[0])
    try:
        return int(text, 16)
    except ValueError:
        return 0  # damaged: it fits nothing, as before


def _renew(connection: sqlite3.Connection, root: str, key: Key, label: str | None, seal: Parts | str | None) -> int:
    """Write one seal, or none; returns what that changes in the total."""
    change = 0
    old = connection.execute("SELECT root, key, label, seal FROM seals WHERE root = ? AND key = ?", (root, key))
    for row in old.fetchall():
        change ^= _weight(row)
    connection.execute("DELETE FROM seals WHERE root = ? AND key = ?", (root, key))
    if seal is not None:
        row = (root, key, label, seal if isinstance(seal, str) else parts_text(seal))
        connection.execute("INSERT INTO seals (root, key, label, seal) VALUES (?, ?, ?, ?)", row)
        change ^= _weight(row)
    return change


def _weight(row: Any) -> int:
    return int.from_bytes(hashlib.sha256(_packed(row)).digest(), "big")


def _digest(columns: tuple[str, ...]) -> Any:
    return hashlib.sha256(_packed(columns))


def _packed(row: Iterable[Any]) -> bytes:
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


def _quoted(name: str) -> str:
    doubled = name.replace('"', '""')
    return f'"{doubled}"'
