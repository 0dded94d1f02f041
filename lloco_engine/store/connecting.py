"""Connections to ``catalogue.sqlite``: of those who may write, and of those who may only read.

A reader of a folder that it cannot write, or of a read-only mount, writes nothing, not even SQLite's own side files:

* where a writer is at work, or left its side files readable, SQLite reads along with it (``mode=ro``);
* where there are none, the file alone is the catalogue, and nobody changes it without making them (``immutable=1``);
* what can be read neither way (side files that only a writer could put in order, or a catalogue that is older than this
  engine) is read from a copy in memory, which is put in order and brought up to date there.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from pathlib import Path
from urllib.parse import quote

from lloco_engine.errors import StoreError
from lloco_engine.store.legacy import legacy_adapters
from lloco_engine.store.schema import FUNCTIONS, check_version, is_latest, migrate

__all__ = ["connect", "connect_reader", "file_state", "is_writable"]

_SIDE_FILES = ("-wal", "-shm")
_FIRST = "SELECT count(*) FROM sqlite_master"  # a connection shows with its first query whether it can read at all


def is_writable(path: Path) -> bool:
    """Whether this process may change a catalogue, and make the side files that changing it takes."""
    files = (path, *(Path(f"{path}{suffix}") for suffix in _SIDE_FILES))
    return os.access(path.parent, os.W_OK) and all(os.access(file, os.W_OK) for file in files if file.exists())


def connect(path: Path, database: str | None = None) -> sqlite3.Connection:
    """A connection in autocommit mode; its owner sees to one thread at a time.

    Args:
        path: of the catalogue.
        database: another one to connect to in its place; "" is a new one, which goes when the connection is closed.
    """
    connection = _opened(str(path) if database is None else database, path.parent)
    try:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA temp_store = MEMORY")  # what a full disk needs for making room
        # Files of replaced segments go after the commit, so the commit must survive a power cut first.
        connection.execute("PRAGMA synchronous = FULL")
    except BaseException:
        connection.close()
        raise
    return connection


def connect_reader(path: Path) -> tuple[sqlite3.Connection, bool]:
    """A connection that writes nothing; and whether it sees what is written from now on.

    Where it does not, `file_state` tells when to connect anew.

    Raises:
        StoreError: a copy is needed and there is nowhere to make it.
    """
    wal = Path(f"{path}-wal")
    if wal.exists():
        try:
            return _read_along(path), True
        except sqlite3.OperationalError:
            return _copied(path), False
    connection = _opened(_uri(path, "immutable=1"), path.parent)
    try:
        if check_version(connection, str(path)) and not is_latest(connection, str(path)):
            older, connection = connection, _in_memory(connection, path)
            older.close()
    except BaseException:
        connection.close()
        raise
    return connection, False


def file_state(path: Path) -> tuple[object, ...]:
    """Equal as long as nobody has written to a catalogue, or begun to."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, Path(f"{path}-wal").exists()


def _read_along(path: Path) -> sqlite3.Connection:
    connection = _opened(_uri(path, "mode=ro"), path.parent)
    try:
        connection.execute(_FIRST).fetchone()
        if not is_latest(connection, str(path)):
            raise sqlite3.OperationalError("an older catalogue cannot be read as it is")
    except BaseException:
        connection.close()
        raise
    return connection


def _copied(path: Path) -> sqlite3.Connection:
    """What a catalogue and its side file hold, put together in a folder of our own and read into memory."""
    try:
        with tempfile.TemporaryDirectory(prefix="lloco-") as folder:
            copy = Path(folder) / path.name
            for suffix in ("", "-wal"):
                shutil.copyfile(f"{path}{suffix}", f"{copy}{suffix}")
            connection = _opened(str(copy), path.parent)
            try:
                return _in_memory(connection, path)
            finally:
                connection.close()
    except OSError as error:
        raise StoreError(
            f"{path} was left by a writer that was cut off, this process may not write there, and a copy could not be "
            f"made ({error.strerror}): open the store once with write permission, or set TMPDIR to a writable folder"
        ) from error


def _in_memory(connection: sqlite3.Connection, path: Path) -> sqlite3.Connection:
    memory = _opened(":memory:", path.parent)
    try:
        connection.backup(memory)
        migrate(memory, str(path))
        memory.execute("PRAGMA query_only = ON")
    except BaseException:
        memory.close()
        raise
    return memory


def _uri(path: Path, how: str) -> str:
    return f"file:{quote(str(path.absolute()))}?{how}"


def _opened(name: str, folder: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        name, timeout=10.0, isolation_level=None, check_same_thread=False, uri=name.startswith("file:")
    )
    for function in FUNCTIONS:
        connection.create_function(function.__name__, -1, function, deterministic=True)
    connection.create_function("legacy_adapters", 0, lambda: legacy_adapters(folder))
    return connection
