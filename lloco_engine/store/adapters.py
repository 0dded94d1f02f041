"""The adapters that a store keeps: rows of the catalogue, which name the folders that hold their files.

A row is what makes an adapter be there. Its folder is written before and removed after, so that a process that is
killed leaves at most a folder that no row names, and the next change clears it away.

::

    adapters/<group>/<version>-<random>/     one adapter: PEFT's files, lloco.json, log.jsonl, owner.json
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lloco_engine.errors import StoreError
from lloco_engine.store.catalogue import Catalogue
from lloco_engine.store.files import Layout, write_atomic
from lloco_engine.store.legacy import OWNER, adapter_folders
from lloco_engine.store.lock import write_lock
from lloco_engine.store.records import Problem

__all__ = ["AdapterRow", "StoredAdapters", "adapter_files", "adapter_problems", "remove_damaged_adapters"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterRow:
    """One adapter of a store.

    Args:
        tenant: whose documents it reads.
        group: of which documents.
        version: counts up in a group, and is never given twice.
        current: it answers for its group.
        folder: holds its files.
        files: name to size in bytes and SHA-256 of each.
        run: key of the run that trained it, or empty.
    """

    tenant: str
    group: str
    version: int
    current: bool
    folder: Path
    files: Mapping[str, tuple[int, str]]
    run: str = ""

    def damage(self) -> str | None:
        """What is wrong with its files, if anything; reads every byte."""
        for name, (size, digest) in self.files.items():
            path = self.folder / name
            try:
                data = path.read_bytes()
            except OSError as error:
                return f"{path} cannot be read ({error.strerror})"
            if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
                return f"{path} is damaged: its {len(data)} bytes do not match the checksum of the {size} written"
        return None


class StoredAdapters:
    """The adapters of one store, by tenant and group. Changes are made under the store's write lock, all or nothing.

    Args:
        layout: of the store.
        reading: gives the catalogue inside a transaction.
    """

    def __init__(self, layout: Layout, reading: Callable[[], AbstractContextManager[Catalogue]]) -> None:
        self._layout, self._reading = layout, reading

    def rows(self, tenant: str | None = None, group: str | None = None) -> list[AdapterRow]:
        """Adapters by tenant, group and version; of all tenants, or groups, where none is named."""
        with self._reading() as catalogue:
            return _rows(catalogue, self._layout, tenant, group)

    def current(self, tenant: str, group: str) -> AdapterRow | None:
        """The adapter that answers for a group of a tenant; None where it has none."""
        return next((row for row in self.rows(tenant, group) if row.current), None)

    def add(self, files: Mapping[str, bytes], tenant: str, group: str, run: str = "") -> AdapterRow:
        """Keep an adapter as its group's newest version, which answers from then on.

        Args:
            files: name to content.
            tenant: whose.
            group: becomes part of a path: see `lloco_engine.adapters.registry.check_group`.
            run: key of the run that trained it.

        Raises:
            StoreFull: no room; the store is as it was.
            StoreLocked: another writer holds the store.
        """
        with self._writing() as catalogue:
            newest = catalogue.connection.execute(
                "SELECT newest FROM adapter_groups WHERE tenant = ? AND name = ?", (tenant, group)
            ).fetchone()
            version = 1 if newest is None else int(newest[0]) + 1
            folder = self._layout.adapters / group / f"{version}-{secrets.token_hex(4)}"
            files = {**files, OWNER: json.dumps({"tenant": tenant}).encode()}
            try:
                for name, data in files.items():
                    write_atomic(folder / name, data, self._layout.temporary)
                listed = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}
                with catalogue.transaction(write=True) as connection:
                    connection.execute(
                        "INSERT INTO adapters VALUES (?, ?, ?, ?, ?, ?)",
                        (tenant, group, version, f"{group}/{folder.name}", json.dumps(listed), run),
                    )
                    connection.execute(
                        "INSERT OR REPLACE INTO adapter_groups VALUES (?, ?, ?, ?)", (tenant, group, version, version)
                    )
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):
                    folder.parent.rmdir()
                raise
        return AdapterRow(tenant, group, version, True, folder, listed, run)

    def remove(self, tenant: str, group: str, version: int | None = None) -> list[int]:
        """Remove one version, or all of a group; the newest of those left answers if the one that did is gone.

        Returns:
            the versions that were there; none where there is no such adapter.
        """
        with self._writing() as catalogue:
            rows = _rows(catalogue, self._layout, tenant, group)
            gone = [row for row in rows if version in (None, row.version)]
            left = [row.version for row in rows if row not in gone]
            with catalogue.transaction(write=True) as connection:
                connection.executemany(
                    "DELETE FROM adapters WHERE tenant = ? AND name = ? AND version = ?",
                    [(tenant, group, row.version) for row in gone],
                )
                if any(row.current for row in gone):
                    self._point(catalogue, tenant, group, max(left, default=0))
            self._clear(catalogue)
        return [row.version for row in gone]

    def answer_with(self, tenant: str, group: str, version: int) -> bool:
        """Let a version answer for its group; False where it is not there."""
        with self._writing() as catalogue, catalogue.transaction(write=True):
            there = version in [row.version for row in _rows(catalogue, self._layout, tenant, group)]
            if there:
                self._point(catalogue, tenant, group, version)
        return there

    def _point(self, catalogue: Catalogue, tenant: str, group: str, version: int) -> None:
        catalogue.connection.execute(
            "UPDATE adapter_groups SET current = ? WHERE tenant = ? AND name = ?", (version, tenant, group)
        )

    @contextmanager
    def _writing(self) -> Iterator[Catalogue]:
        with write_lock(self._layout.lock, timeout=10.0):
            catalogue = Catalogue(self._layout.catalogue)
            try:
                self._clear(catalogue)
                yield catalogue
            finally:
                catalogue.close()

    def _clear(self, catalogue: Catalogue) -> None:
        """Remove what no row names: of a killed process, for the lock is ours, or of an adapter that is gone."""
        known = {row.folder for row in _rows(catalogue, self._layout)}
        for home in adapter_folders(self._layout.adapters):
            for entry in set(home.iterdir()) - known:
                try:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
                except OSError as error:
                    _log.warning("%s is no longer used but could not be removed: %s", entry, error)
            with suppress(OSError):  # it still holds something
                home.rmdir()


def adapter_problems(layout: Layout, catalogue: Catalogue) -> list[Problem]:
    """Adapters whose files are missing or damaged. The catalogue must be outside a transaction."""
    with catalogue.transaction():
        rows = _rows(catalogue, layout)
    found = [(row, damage) for row in rows if (damage := row.damage()) is not None]
    with catalogue.transaction():  # a writer may have removed meanwhile what was looked for
        still = {row.folder for row in _rows(catalogue, layout)}
    advice = "add it again, roll back, or remove it (`lloco adapters`)"
    return [
        Problem("adapter", layout.relative(row.folder), f"{damage}: {advice}")
        for row, damage in found
        if row.folder in still
    ]


def adapter_files(layout: Layout, catalogue: Catalogue) -> list[Path]:
    """Every file of every adapter."""
    with catalogue.transaction():
        return [row.folder / name for row in _rows(catalogue, layout) for name in row.files]


def remove_damaged_adapters(layout: Layout, catalogue: Catalogue) -> list[str]:
    """Remove adapters whose files are damaged; the caller holds the write lock. What was done, a sentence each."""
    done = []
    with catalogue.transaction():
        rows = _rows(catalogue, layout)
    for row in rows:
        if (damage := row.damage()) is None:
            continue
        with catalogue.transaction(write=True) as connection:
            where = "tenant = ? AND name = ?"
            connection.execute(
                f"DELETE FROM adapters WHERE {where} AND version = ?", (row.tenant, row.group, row.version)
            )
            connection.execute(
                f"UPDATE adapter_groups SET current = (SELECT coalesce(max(version), 0) FROM adapters WHERE {where})"
                f" WHERE {where} AND current = ?",
                (row.tenant, row.group, row.tenant, row.group, row.version),
            )
        done.append(f"{damage}: version {row.version} of group {row.group!r} was removed; add or train it again")
    return done


def _rows(
    catalogue: Catalogue, layout: Layout, tenant: str | None = None, group: str | None = None
) -> list[AdapterRow]:
    wanted = {"tenant": tenant, "name": group}
    terms = [f"a.{name} = :{name}" for name, value in wanted.items() if value is not None]
    found = catalogue.connection.execute(
        "SELECT a.tenant, a.name, a.version, a.version = g.current, a.folder, a.files, a.run"
        " FROM adapters a JOIN adapter_groups g USING (tenant, name)"
        f"{' WHERE ' + ' AND '.join(terms) if terms else ''} ORDER BY a.tenant, a.name, a.version",
        wanted,
    )
    return [_row(layout, *row) for row in found]


def _row(
    layout: Layout, tenant: str, group: str, version: int, current: int, folder: str, files: str, run: str
) -> AdapterRow:
    place = layout.adapters / folder
    if len(Path(folder).parts) != 2 or ".." in Path(folder).parts or not place.is_relative_to(layout.adapters):
        raise StoreError(f"an adapter's folder lies below {layout.adapters}, and the catalogue names {folder!r}")
    try:
        listed = {str(name): (int(size), str(digest)) for name, (size, digest) in json.loads(files).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise StoreError(f"the catalogue's list of the files of adapter {group!r} is damaged: {error}") from error
    return AdapterRow(tenant, group, version, bool(current), place, listed, run)
