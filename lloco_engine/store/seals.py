"""Seals: hashes over everything that the catalogue says, so that no row and no cell changes unseen.

::

    seals     one row a document and one a segment: for each table that has rows of it, a hash of those rows
    sealed    one row: the sum of all rows of ``seals``, and for each table that belongs to neither its hash, with
              those of the schema; and the text of manifest.json

Which rows are a document's or a segment's, `lloco_engine.store.tables` says. Hashes are renewed in the transaction that
changes the rows (`Sealing`), by triggers of that connection alone: what another program changes stays without a seal,
and what was damaged before a transaction, or a migration, is not sealed by it.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from lloco_engine.store.tables import Key, Parts, Shape, packed, quoted

__all__ = [
    "Doubts",
    "Sealing",
    "Seals",
    "doubts",
    "keep_manifest",
    "kept_manifest",
    "rest_differing",
    "seal_all",
    "seal_problems",
    "unsound",
]

_COUNTERS = ("generation", "index_file", "sqlite_sequence")  # which every commit writes, and no answer depends on


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
        script = ["CREATE TEMP TABLE changed (root TEXT, key, made INTEGER, PRIMARY KEY (root, key, made))"]
        for root, tables in self._shape.owned.items():
            for table in tables:
                for event, rows in {"INSERT": ("new",), "DELETE": ("old",), "UPDATE": ("old", "new")}.items():
                    made = int(event == "INSERT" and table.name == root)
                    noted = " ".join(
                        f"INSERT OR IGNORE INTO changed SELECT '{root}', {table.key_of(row)}, {made};" for row in rows
                    )
                    script.append(_trigger(event, table.name, noted))
        for name in self._shape.others:
            if name not in _COUNTERS:
                for event in ("INSERT", "DELETE", "UPDATE"):
                    script.append(_trigger(event, name, f"INSERT OR IGNORE INTO changed VALUES ('', '{name}', 0);"))
        connection.executescript(";".join(script))

    def begin(self) -> None:
        """Note where a transaction begins."""
        self._changes = self._connection.total_changes

    def settle(self) -> None:
        """Renew the seals of what the transaction changed, before it is committed."""
        connection, shape = self._connection, self._shape
        if connection.total_changes == self._changes:
            return
        rows = connection.execute(
            "SELECT root, key, max(made) FROM changed WHERE root <> '' AND key IS NOT NULL GROUP BY root, key"
        )
        total = _total(connection)
        doubted = []
        for root, key, made in rows.fetchall():
            known = _kept(connection, root, key)
            parts = shape.parts(root, key)
            if known and parts is not None and not made:
                if known[0][3] == parts_text(parts):
                    continue
                doubted.append((root, key))
            label = None if parts is None else shape.label(root, key)
            total ^= _renew(connection, root, key, label, parts, known)
        if doubted:
            total ^= self._take_back(doubted)
        rest = parts_text(self._rest())
        connection.execute("UPDATE sealed SET total = ?, rest = ?", (f"{total:064x}", rest))
        connection.execute("DELETE FROM changed")

    def _rest(self) -> Parts:
        """The hashes of the tables of neither root: new ones of those that were changed and were right before."""
        renewed = {str(name) for (name,) in self._connection.execute("SELECT key FROM changed WHERE root = ''")}
        if renewed:
            with closing(self._before()) as before:
                renewed -= set(rest_differing(before, Shape(before)))
        return _kept_rest(self._connection) | self._shape.rest({*renewed, *_COUNTERS})

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


def _trigger(event: str, table: str, noted: str) -> str:
    name = quoted(f"{event} {table}".lower())
    return f"CREATE TEMP TRIGGER {name} AFTER {event} ON main.{quoted(table)} BEGIN {noted} END"


def _has_seals(connection: sqlite3.Connection) -> bool:
    """Whether a catalogue has had the migration that brought them."""
    found = connection.execute(
        "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name IN ('seals', 'sealed')"
    )
    return bool(found.fetchone()[0] == 2)


@dataclass(frozen=True)
class Doubts:
    """What does not fit its seal: documents and segments, tables of neither, the list of all seals."""

    keys: frozenset[tuple[str, Key]] = frozenset()
    tables: frozenset[str] = frozenset()
    listed: bool = False


def doubts(connection: sqlite3.Connection) -> Doubts:
    """What in a catalogue does not fit its seal; of one without seals nothing is known."""
    if not _has_seals(connection):
        return Doubts()
    shape = Shape(connection)
    keys = {(root, key) for root in shape.owned for key in shape.keys(root) if unsound(connection, root, key, shape)}
    return Doubts(frozenset(keys), frozenset(rest_differing(connection, shape)), _sum(connection) != _total(connection))


def seal_all(connection: sqlite3.Connection, but: Doubts | None = None) -> None:
    """Seal everything anew; what is in ``but`` goes on not to fit."""
    but, shape = but or Doubts(), Shape(connection)
    for root in shape.owned:
        for key in shape.keys(root):
            if (root, key) not in but.keys:
                _renew(connection, root, key, shape.label(root, key), shape.parts(root, key))
    connection.execute("UPDATE sealed SET total = ?", (f"{_sum(connection) ^ but.listed:064x}",))
    rest = {name: "" if name in but.tables else digest for name, digest in shape.rest().items()}
    connection.execute("UPDATE sealed SET rest = ?", (parts_text(rest),))


def keep_manifest(connection: sqlite3.Connection, text: str) -> None:
    """Keep a copy of manifest.json, sealed."""
    connection.execute("UPDATE sealed SET manifest = ?", (text,))
    rest = _kept_rest(connection) | {"manifest": Shape(connection).beside("manifest")}
    connection.execute("UPDATE sealed SET rest = ?", (parts_text(rest),))


def kept_manifest(connection: sqlite3.Connection) -> str | None:
    """The text of manifest.json as it was written; None where it is not known, or is damaged itself."""
    if not _has_seals(connection):
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


def _kept_rest(connection: sqlite3.Connection) -> Parts:
    """The hashes that were kept of the tables of neither root, as far as they can be read."""
    rows = connection.execute("SELECT rest FROM sealed").fetchall()
    parts = str(rows[0][0]).split(" ") if len(rows) == 1 else []
    return {name: digest for name, _, digest in (part.partition("=") for part in parts) if name}


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


def _kept(connection: sqlite3.Connection, root: str, key: Key) -> list[Any]:
    """The rows of ``seals`` for a document or segment: one, or none."""
    found = connection.execute("SELECT root, key, label, seal FROM seals WHERE root = ? AND key = ?", (root, key))
    return found.fetchall()


def _renew(
    connection: sqlite3.Connection,
    root: str,
    key: Key,
    label: str | None,
    seal: Parts | str | None,
    known: list[Any] | None = None,
) -> int:
    """Write one seal, or none, in the place of what `_kept` found; returns what that changes in the total."""
    change = 0
    for row in _kept(connection, root, key) if known is None else known:
        change ^= _weight(row)
        connection.execute("DELETE FROM seals WHERE root = ? AND key = ?", (root, key))
    if seal is not None:
        row = (root, key, label, seal if isinstance(seal, str) else parts_text(seal))
        connection.execute("INSERT INTO seals (root, key, label, seal) VALUES (?, ?, ?, ?)", row)
        change ^= _weight(row)
    return change


def _weight(row: Any) -> int:
    return int.from_bytes(hashlib.sha256(packed(row)).digest(), "big")
