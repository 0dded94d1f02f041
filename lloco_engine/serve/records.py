"""What the server knows of uploads: files, vector stores, and which file is in which. One SQLite file beside the store.

What a call has written is on the disk when it returns.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["Attachment", "FileRecord", "Records", "Status", "VectorStore"]

Status = Literal["in_progress", "completed", "failed", "cancelled", "deleting"]

_TABLES = """
CREATE TABLE IF NOT EXISTS files (
    id       TEXT PRIMARY KEY,
    tenant   TEXT NOT NULL,
    filename TEXT NOT NULL,
    purpose  TEXT NOT NULL,
    bytes    INTEGER NOT NULL,
    created  INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS files_of_tenant ON files (tenant, created);
CREATE TABLE IF NOT EXISTS vector_stores (
    tenant   TEXT NOT NULL,
    id       TEXT NOT NULL,
    name     TEXT NOT NULL,
    metadata TEXT NOT NULL,
    created  INTEGER NOT NULL,
    PRIMARY KEY (tenant, id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS attachments (      -- a file in a vector store
    number     INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant     TEXT NOT NULL,
    store      TEXT NOT NULL,
    file       TEXT NOT NULL,
    status     TEXT NOT NULL,
    attributes TEXT NOT NULL,
    error      TEXT NOT NULL DEFAULT '',      -- of a failed one, or what was left out
    code       TEXT NOT NULL DEFAULT '',
    batch      TEXT NOT NULL DEFAULT '',
    created    INTEGER NOT NULL,
    UNIQUE (tenant, store, file)
);
CREATE INDEX IF NOT EXISTS attachments_by_status ON attachments (status, number);
"""
_VERSION = 1


@dataclass(frozen=True)
class FileRecord:
    """An uploaded file. ``created`` is in seconds since 1970."""

    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    created: int


@dataclass(frozen=True)
class VectorStore:
    """A group of documents, as it was named here."""

    tenant: str
    id: str
    name: str
    metadata: Mapping[str, Any]
    created: int


@dataclass(frozen=True)
class Attachment:
    """A file in a vector store, and how far it is. ``error`` says why it failed, or what of it was left out."""

    number: int
    tenant: str
    store: str
    file: str
    status: Status
    attributes: Mapping[str, Any]
    error: str
    code: str
    batch: str
    created: int

    @property
    def name(self) -> str:
        """How its documents are named: this, or this and more after a slash."""
        return f"{self.file}@{self.store}"


class Records:
    """The tables, open. Safe for use from several threads.

    Args:
        path: of the file; made where it is missing.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.executescript(_TABLES)
        self._connection.execute(f"PRAGMA user_version = {_VERSION}")

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def _rows(self, query: str, *values: Any) -> list[Any]:
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    # -- files --------------------------------------------------------------------------------------------------

    def add_file(self, record: FileRecord) -> None:
        """Keep what is known of a file whose bytes are on the disk."""
        values = (record.id, record.tenant, record.filename, record.purpose, record.bytes, record.created)
        with self._changing() as connection:
            connection.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?)", values)

    def files(self, tenant: str, file_id: str | None = None) -> list[FileRecord]:
        """A tenant's files, newest first; or the one of this id, if there is one."""
        rows = self._rows(
            "SELECT id, tenant, filename, purpose, bytes, created FROM files WHERE tenant = ? AND (? IS NULL OR id = ?)"
            " ORDER BY created DESC, rowid DESC",
            tenant,
            file_id,
            file_id,
        )
        return [FileRecord(*row) for row in rows]

    def all_ids(self) -> set[str]:
        """Ids of all files of all tenants."""
        return {row[0] for row in self._rows("SELECT id FROM files")}

    def remove_file(self, tenant: str, file_id: str) -> None:
        """Forget a file that is in no vector store any more."""
        with self._changing() as connection:
            connection.execute("DELETE FROM files WHERE tenant = ? AND id = ?", (tenant, file_id))

    # -- vector stores ------------------------------------------------------------------------------------------

    def put_store(self, store: VectorStore) -> None:
        """Keep a vector store, in place of what was known of it."""
        values = (store.tenant, store.id, store.name, json.dumps(dict(store.metadata)), store.created)
        with self._changing() as connection:
            connection.execute("INSERT OR REPLACE INTO vector_stores VALUES (?, ?, ?, ?, ?)", values)

    def stores(self, tenant: str) -> list[VectorStore]:
        """A tenant's vector stores that were made or named here, newest first."""
        rows = self._rows(
            "SELECT tenant, id, name, metadata, created FROM vector_stores WHERE tenant = ? ORDER BY created DESC, id",
            tenant,
        )
        return [VectorStore(row[0], row[1], row[2], json.loads(row[3]), row[4]) for row in rows]

    def remove_store(self, tenant: str, store: str) -> None:
        """Forget a vector store, whose documents are gone."""
        with self._changing() as connection:
            connection.execute("DELETE FROM vector_stores WHERE tenant = ? AND id = ?", (tenant, store))

    # -- files in vector stores ---------------------------------------------------------------------------------

    def attach(self, tenant: str, store: str, files: Mapping[str, Mapping[str, Any]], batch: str = "") -> bool:
        """Put files into a vector store, to be compressed: all of them, or none where one is there already.

        Args:
            tenant, store: where to.
            files: attributes by file id.
            batch: under which they are asked about together.
        """
        now = int(time.time())
        try:
            with self._changing() as connection:
                for file, attributes in files.items():
                    values = (tenant, store, file, json.dumps(dict(attributes)), batch, now)
                    connection.execute(
                        "INSERT INTO attachments (tenant, store, file, status, attributes, batch, created)"
                        " VALUES (?, ?, ?, 'in_progress', ?, ?, ?)",
                        values,
                    )
        except sqlite3.IntegrityError:
            return False
        return True

    def attachments(self, tenant: str, **wanted: str) -> list[Attachment]:
        """A tenant's files in vector stores, newest first, without those that are being taken out.

        Args:
            tenant: whose.
            wanted: ``store``, ``file``, ``batch`` or ``status`` that they must have.
        """
        names = [name for name in ("store", "file", "batch", "status") if name in wanted]
        condition = "".join(f" AND {name} = ?" for name in names)
        return self._attachments(
            f"WHERE tenant = ? AND status != 'deleting'{condition} ORDER BY number DESC",
            tenant,
            *(wanted[name] for name in names),
        )

    def next_to_do(self) -> Attachment | None:
        """The oldest that is to be compressed or taken out, of all tenants."""
        found = self._attachments("WHERE status IN ('deleting', 'in_progress') ORDER BY status, number LIMIT 1")
        return found[0] if found else None

    def to_do(self, tenant: str | None = None) -> int:
        """How many are to be compressed."""
        rows = self._rows(
            "SELECT count(*) FROM attachments WHERE status = 'in_progress' AND (? IS NULL OR tenant = ?)",
            tenant,
            tenant,
        )
        return int(rows[0][0])

    def settle(self, number: int, status: Status, *, error: str = "", code: str = "") -> bool:
        """Say what became of one that was to be compressed; False where it is to be taken out meanwhile."""
        with self._changing() as connection:
            done = connection.execute(
                "UPDATE attachments SET status = ?, error = ?, code = ? WHERE number = ? AND status = 'in_progress'",
                (status, error, code, number),
            )
            return done.rowcount == 1

    def doom(self, tenant: str, **wanted: str) -> list[Attachment]:
        """Mark files in vector stores (as `attachments` finds them) to be taken out; they are listed no more."""
        names = [name for name in ("store", "file") if name in wanted]
        condition = "tenant = ?" + "".join(f" AND {name} = ?" for name in names)
        values = (tenant, *(wanted[name] for name in names))
        with self._changing() as connection:
            connection.execute(f"UPDATE attachments SET status = 'deleting' WHERE {condition}", values)
        return self._attachments(f"WHERE {condition}", *values)

    def forget(self, number: int) -> None:
        """Forget one whose documents are gone."""
        with self._changing() as connection:
            connection.execute("DELETE FROM attachments WHERE number = ? AND status = 'deleting'", (number,))

    def still_wanted(self, number: int) -> bool:
        """Whether one that is being compressed is not to be taken out."""
        return bool(self._rows("SELECT 1 FROM attachments WHERE number = ? AND status = 'in_progress'", number))

    def _attachments(self, rest: str, *values: Any) -> list[Attachment]:
        rows = self._rows(
            "SELECT number, tenant, store, file, status, attributes, error, code, batch, created FROM attachments "
            + rest,
            *values,
        )
        return [Attachment(*(json.loads(value) if n == 5 else value for n, value in enumerate(row))) for row in rows]
