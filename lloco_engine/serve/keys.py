"""Keys: who may ask, for which tenant, and what. Kept as hashes in one JSON file.

A key is 32 random bytes, so that one SHA-256 of it cannot be turned back, and none is told from another by how long the
comparison takes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import secrets
import threading
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from filelock import FileLock

from lloco_engine.atomic import write_file
from lloco_engine.errors import ConfigError
from lloco_engine.unicode import require_unicode

__all__ = ["Caller", "Key", "KeyFile", "Scope"]

Scope = Literal["write", "read", "metrics"]
_PREFIX = "lloco-"
_log = logging.getLogger("lloco.serve")


@dataclass(frozen=True)
class Caller:
    """Who sends a request: a tenant, and what it may do. ``"metrics"`` reads the figures of the whole server alone."""

    tenant: str
    scope: Scope = "write"


@dataclass(frozen=True)
class Key:
    """What is kept of a key: a name for it, the hash, whose it is, what it may do, and since when it is there."""

    id: str
    sha256: str
    tenant: str
    scope: Scope
    created: str


class KeyFile:
    """The keys in a file, which is read again when it has changed. Safe for use from several threads.

    A file that cannot be read lets nobody in.

    Args:
        path: of the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._lock = threading.Lock()
        self._seen: tuple[int, int, int] | None = None
        self._keys: list[Key] = []

    def load(self) -> list[Key]:
        """All keys.

        Raises:
            ConfigError: the file is missing or damaged.
        """
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8"))["keys"]
            keys = [Key(**entry) for entry in entries]
            if any(key.scope not in get_args(Scope) or not isinstance(key.tenant, str) for key in keys):
                raise ValueError("an entry has no tenant or an unknown scope")
        except FileNotFoundError:
            fix = f"make the first key by `lloco keys add --keys {self.path} --tenant NAME`"
            raise ConfigError(f"there is no file of keys at {self.path}; {fix}") from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{self.path} must be a file that `lloco keys add` wrote, and it is not: {error}"
            ) from None
        return keys

    def find(self, given: str) -> Caller | None:
        """Who has this key; None where nobody has. All keys are compared, however early one fits."""
        found = None
        digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).hexdigest()
        for key in self._current():
            if hmac.compare_digest(digest, key.sha256):
                found = Caller(key.tenant, key.scope)
        return found

    def add(self, tenant: str, scope: Scope = "write") -> tuple[str, Key]:
        """Make a key.

        Returns:
            the key itself, which is written down nowhere, and what is kept of it.

        Raises:
            ConfigError: the file is damaged, or the tenant is no name.
        """
        require_unicode(tenant=tenant)
        given = _PREFIX + secrets.token_urlsafe(32)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        made = Key(secrets.token_hex(4), hashlib.sha256(given.encode()).hexdigest(), tenant, scope, now)
        with self._changing() as keys:
            self._write([*keys, made])
        return given, made

    def remove(self, key_id: str) -> Key:
        """Take a key out; a server lets it in no more.

        Raises:
            ConfigError: there is none of this id.
        """
        with self._changing() as keys:
            gone = next((key for key in keys if key.id == key_id), None)
            if gone is None:
                known = ", ".join(key.id for key in keys) or "none"
                raise ConfigError(f"an id must be one of {known} (`lloco keys list`), not {key_id!r}")
            self._write([key for key in keys if key.id != key_id])
        return gone

    def _current(self) -> list[Key]:
        with self._lock:
            try:
                state = self.path.stat()
                now = (state.st_mtime_ns, state.st_ino, state.st_size)
                if now != self._seen:
                    self._keys, self._seen = self.load(), now
            except (OSError, ConfigError):
                if self._seen is not None or self._keys:
                    _log.error("the file of keys cannot be read: nobody is let in until it can")
                self._keys, self._seen = [], None
            return self._keys

    def _changing(self) -> _Changing:
        return _Changing(self)

    def _write(self, keys: list[Key]) -> None:
        write_file(self.path, json.dumps({"keys": [asdict(key) for key in keys]}, indent=2) + "\n")
        self.path.chmod(0o600)


class _Changing:
    """Holds the file for one change of it; gives the keys as they are."""

    def __init__(self, file: KeyFile) -> None:
        self._file = file
        file.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(f"{file.path}.lock")

    def __enter__(self) -> list[Key]:
        self._lock.acquire(timeout=10)
        try:
            return self._file.load() if self._file.path.exists() else []
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        self._lock.release()
