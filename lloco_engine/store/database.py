"""The database that a catalogue is: one SQLite file, its connection and transactions, and what its errors mean."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from lloco_engine.errors import StoreCorrupt, StoreError, StoreFull, StoreLocked
from lloco_engine.store.connecting import connect, connect_reader, file_state, is_writable
from lloco_engine.store.schema import APPLICATION_ID, check_version
from lloco_engine.store.seals import Sealing
from lloco_engine.unicode import not_unicode

__all__ = ["Database", "explained"]

_LEAST_FREE = 64 * 2**10
_TOO_MUCH = re.compile("too (many|large|big|long|deep|complex)|overflow")  # SQLite's words for its limits
_QUICK_CHECK_BYTES = 16 * 2**20  # below this a full structural check costs a few milliseconds


class Database:
    """One connection to ``catalogue.sqlite``.

    Not locked: its owner lets one thread at a time use it. A `transaction` sees one state of the catalogue,
    whatever a writer commits meanwhile.
    """

    def __init__(self, path: Path) -> None:
        """Connect to a catalogue that exists; to one that this process may not write, for reading only.

        Raises:
            StoreCorrupt: missing or damaged.
        """
        self.path = path
        if not path.is_file():
            raise StoreCorrupt(f"{path} is missing; put it back, or repair the store and ingest its documents again")
        self._sealing: Sealing | None = None
        self._open()

    def _open(self) -> None:
        self._state: tuple[object, ...] | None = None  # of the file, where the connection sees no change of it
        with self.errors():
            if is_writable(self.path):
                self.connection = connect(self.path)
                return
            state = file_state(self.path)
            self.connection, follows = connect_reader(self.path)
            self._state = None if follows else state

    def file_and_tables(self) -> tuple[int, ...]:
        """Equal as long as the path is that of the same file, and nobody has changed its tables.

        Raises:
            StoreError: it cannot be read.
        """
        try:
            file = self.path.stat()
        except OSError as error:
            raise StoreCorrupt(f"{self.path} cannot be read ({error.strerror})") from error
        with self.errors():
            (schema,) = self.connection.execute("PRAGMA schema_version").fetchone()
        return file.st_dev, file.st_ino, int(schema)

    def _current(self) -> None:
        """Connect anew where the file has changed under a connection that does not see it."""
        if self._state is not None and self._state != file_state(self.path):
            self.connection.close()
            self._open()

    @classmethod
    def empty(cls, path: Path) -> Self:
        """A database with nothing in it, not even tables, which is gone when it is closed; ``path`` is its name."""
        made = cls.__new__(cls)
        made.path, made._sealing, made._state = path, None, None
        with made.errors():
            made.connection = connect(path, "")
        return made

    def copy(self) -> Self:
        """A copy of what is committed now, which is gone when it is closed. Text that is no UTF-8 has surrogates.

        Raises:
            StoreFull: no room in the system's temporary folder.
        """
        made = self.empty(self.path)
        try:
            with made.errors():
                self.connection.backup(made.connection)
            made.connection.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
        except BaseException:
            made.close()
            raise
        return made

    def close(self) -> None:
        """Let go of the file."""
        self.connection.close()

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Say what SQLite's errors mean for a store."""
        with explained(self.path):
            yield

    @contextmanager
    def transaction(self, *, write: bool = False) -> Iterator[sqlite3.Connection]:
        """One transaction: committed at the end of the block, undone when the block raises.

        What a writing one changes is sealed.
        """
        self._current()
        with self.errors():
            if write and self._sealing is None:
                self._sealing = Sealing(self.connection, lambda: connect(self.path))
            self.connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            if write and self._sealing is not None:
                self._sealing.begin()
            try:
                yield self.connection
                if write and self._sealing is not None:
                    self._sealing.settle()
                self.connection.execute("COMMIT")
            except BaseException:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise

    def check(self) -> None:
        """Look whether this is a readable catalogue of ours; the whole structure when the file is small.

        Raises:
            StoreCorrupt: it is not, or is damaged.
            StoreMismatch: a newer engine made it.
        """
        with self.errors():
            marker = int(self.connection.execute("PRAGMA application_id").fetchone()[0])
            if marker != APPLICATION_ID:
                raise StoreCorrupt(f"{self.path} is not a store's catalogue (application_id {marker:#x}); repair it")
            check_version(self.connection, str(self.path))
            if self._size() <= _QUICK_CHECK_BYTES:
                self.integrity("quick_check")
            else:
                self.connection.execute("SELECT max(doc_key), count(*) FROM documents").fetchone()
                self.connection.execute("SELECT max(window_id) FROM windows").fetchone()

    def _size(self) -> int:
        pages, size = (self.connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
        return int(pages) * int(size)

    def integrity(self, pragma: str = "integrity_check") -> None:
        """Let SQLite check the structure of the file; `StoreCorrupt` names the file and its first complaint."""
        with self.errors():
            first = str(self.connection.execute(f"PRAGMA {pragma}(1)").fetchone()[0])
        if first != "ok":
            raise StoreCorrupt(_damaged(self.path, first))


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Say what SQLite's errors mean for the catalogue at ``path``."""
    try:
        yield
    except sqlite3.Error as error:
        raise _explain(error, path) from error
    except UnicodeEncodeError as error:  # of a name that is looked up: no store holds such
        raise not_unicode(error) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:  # a name or text that nobody wrote
        raise StoreCorrupt(_damaged(path, error)) from error


def _explain(error: sqlite3.Error, path: Path) -> StoreError:
    name = getattr(error, "sqlite_errorname", "") or ""
    refused = name.startswith(("SQLITE_IOERR", "SQLITE_CANTOPEN")) and _is_full(path)
    if refused or name.startswith(("SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE")):
        return StoreFull(f"no room to write {path} ({error}); the store is as it was: free space")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return StoreLocked(f"another program holds {path} ({error}); try again when it is done")
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return StoreError(f"cannot write {path} ({error}); check the permissions of its folder")
    if isinstance(error, sqlite3.ProgrammingError):
        return StoreError(f"the store of {path} was closed ({error})")
    if name in ("SQLITE_TOOBIG", "SQLITE_NOMEM", "SQLITE_INTERRUPT") or _TOO_MUCH.search(str(error)):
        return StoreError(f"SQLite cannot do so much in one statement on {path} ({error}); the store is as it was")
    return StoreCorrupt(_damaged(path, error))


def _is_full(path: Path) -> bool:
    """Whether the disk has no room for the least file that SQLite makes beside a catalogue."""
    try:
        return shutil.disk_usage(path.parent).free < _LEAST_FREE
    except OSError:
        return False


def _damaged(path: Path, why: object) -> str:
    return f"{path} is damaged ({why}); repair the store (`lloco verify --repair`) and ingest its documents again"
