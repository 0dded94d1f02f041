"""The adapters that a store keeps, by group and version.

::

    adapters/<group>/<version>/     one adapter: PEFT's files, lloco.json, log.jsonl
    adapters/<group>/current.json   which version answers, and the highest number that was ever given
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lloco_engine.adapters.loading import read
from lloco_engine.adapters.manifest import FILES, WEIGHTS, AdapterManifest
from lloco_engine.errors import AdapterError, ConfigError
from lloco_engine.store.files import Layout, write_atomic
from lloco_engine.store.lock import write_lock

__all__ = ["Kept", "Shelf", "check_group"]

_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_CURRENT = "current.json"


def check_group(name: str) -> str:
    """Return ``name``, which becomes part of a path, if it can be a group's.

    Raises:
        ConfigError: it cannot, or is ``"none"`` or ``"auto"``.
    """
    if not _GROUP.fullmatch(name) or name in ("none", "auto"):
        raise ConfigError(
            f"a group's name must be up to 64 letters, digits, - and _, and neither 'none' nor 'auto', not {name!r}"
        )
    return name


@dataclass(frozen=True)
class Kept:
    """One adapter of a store. ``current`` says that it answers for its group; ``bytes`` are those of its weights."""

    group: str
    version: int
    current: bool
    folder: Path
    manifest: AdapterManifest

    @property
    def bytes(self) -> int:
        """Size of the weights on disk."""
        return (self.folder / WEIGHTS).stat().st_size


class Shelf:
    """The adapters of one store. Safe beside other processes: changes are made under the store's write lock.

    Args:
        store: the store's folder.
    """

    def __init__(self, store: Path) -> None:
        self.root = store / "adapters"
        self._layout = Layout(store)

    def groups(self) -> list[str]:
        """Groups that have an adapter, by name."""
        if not self.root.is_dir():
            return []
        return sorted(
            entry.name for entry in self.root.iterdir() if _GROUP.fullmatch(entry.name) and self._state(entry.name)[0]
        )

    def current(self, group: str) -> tuple[int, Path] | None:
        """Version and folder of the adapter that answers for a group; None when it has none."""
        version = self._state(group)[0] if _GROUP.fullmatch(group) else 0
        return (version, self.root / group / str(version)) if version else None

    def kept(self) -> list[Kept]:
        """Every adapter, by group and version.

        Raises:
            AdapterError: the manifest of one cannot be read.
        """
        return [
            Kept(group, version, version == self._state(group)[0], folder, AdapterManifest.load(folder))
            for group in self.groups()
            for version, folder in self._versions(group)
        ]

    def add(self, folder: Path, group: str) -> int:
        """Copy an adapter's folder in as the group's newest version, which answers from then on.

        Raises:
            AdapterError: the folder holds no sound adapter.
            ConfigError: the group's name cannot be one.
            StoreLocked: another writer holds the store.
        """
        read(folder)
        with self._writing(check_group(group)) as draft:
            draft.mkdir()
            for name in FILES:
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, draft / name)
            return self._publish(draft, group)

    def remove(self, group: str, version: int | None = None) -> list[int]:
        """Remove one version, or all of a group; the newest of those left answers if the one that did is gone.

        Returns:
            the versions that were removed.

        Raises:
            AdapterError: there is no such adapter.
        """
        with self._writing(check_group(group)):
            there = [number for number, _ in self._versions(group)]
            gone = there if version is None else [number for number in there if number == version]
            if not gone:
                raise AdapterError(self._missing(group, version))
            current, newest = self._state(group)
            left = [number for number in there if number not in gone]
            if current in gone:
                self._point(group, max(left, default=0), newest)
            for number in gone:
                shutil.rmtree(self.root / group / str(number))
        return gone

    def rollback(self, group: str, version: int | None = None) -> int:
        """Let an earlier version answer: the given one, else the one before that which answers now.

        Returns:
            the version that answers.

        Raises:
            AdapterError: there is no such version.
        """
        with self._writing(check_group(group)):
            current, newest = self._state(group)
            there = [number for number, _ in self._versions(group)]
            before = [number for number in there if number < current] if version is None else [version]
            if not before or before[-1] not in there:
                raise AdapterError(self._missing(group, version, earlier=version is None and bool(there)))
            self._point(group, before[-1], newest)
        return before[-1]

    def _missing(self, group: str, version: int | None, earlier: bool = False) -> str:
        have = ", ".join(str(number) for number, _ in self._versions(group)) or "none"
        what = "earlier version" if earlier else "adapter" if version is None else f"version {version}"
        return f"group {group!r} has no {what}; it has versions: {have} (`lloco adapters ls` lists them)"

    def _versions(self, group: str) -> list[tuple[int, Path]]:
        home = self.root / group
        entries = home.iterdir() if home.is_dir() else ()
        return sorted((int(entry.name), entry) for entry in entries if entry.name.isdecimal())

    def _state(self, group: str) -> tuple[int, int]:
        """The version that answers, 0 for none, and the highest number that was ever given."""
        path = self.root / group / _CURRENT
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            return int(state["current"]), int(state["newest"])
        except FileNotFoundError:
            return 0, 0
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AdapterError(
                f"{path} is damaged ({error}); `lloco adapters rollback` cannot help: write it anew"
            ) from error

    def _point(self, group: str, current: int, newest: int) -> None:
        text = json.dumps({"current": current, "newest": newest}) + "\n"
        write_atomic(self.root / group / _CURRENT, text.encode(), self._layout.temporary)

    def _publish(self, draft: Path, group: str) -> int:
        home = self.root / group
        home.mkdir(exist_ok=True)
        version: int = max([self._state(group)[1], *(number for number, _ in self._versions(group))]) + 1
        for file in draft.iterdir():
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        os.replace(draft, home / str(version))
        self._point(group, version, version)
        return version

    @contextmanager
    def _writing(self, group: str) -> Iterator[Path]:
        """Hold the store's write lock; yields a folder that may be made, and is gone afterwards."""
        with write_lock(self._layout.lock, timeout=10.0):
            self.root.mkdir(exist_ok=True)
            for left_over in self.root.glob(".draft-*"):  # of a killed process: the lock is ours
                shutil.rmtree(left_over)
            draft = self.root / f".draft-{group}-{secrets.token_hex(4)}"
            try:
                yield draft
            except OSError as error:
                raise AdapterError(f"the adapters at {self.root} cannot be changed: {error.strerror}") from error
            finally:
                shutil.rmtree(draft, ignore_errors=True)
