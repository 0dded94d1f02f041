"""The adapters that a store keeps for its groups of documents, by tenant and version."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lloco_engine.adapters.loading import read
from lloco_engine.adapters.manifest import FILES, AdapterManifest
from lloco_engine.errors import AdapterError, ConfigError

if TYPE_CHECKING:
    from lloco_engine.store import AdapterRow, Store

__all__ = ["Kept", "Registry", "check_group"]

_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


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
    """One adapter of a store. ``current`` says that it answers for its group; ``bytes`` are those of its files."""

    tenant: str
    group: str
    version: int
    current: bool
    folder: Path
    bytes: int
    manifest: AdapterManifest

    @classmethod
    def of(cls, row: AdapterRow) -> Kept:
        """A row of the catalogue with the manifest that lies in its folder; `AdapterError` where it is unreadable."""
        size = sum(size for size, _ in row.files.values())
        return cls(row.tenant, row.group, row.version, row.current, row.folder, size, AdapterManifest.load(row.folder))


class Registry:
    """The adapters of one store. Each belongs to one tenant, and reads no other's documents.

    Safe beside other processes: a change is made under the store's write lock, wholly or not at all.

    Args:
        store: which.
    """

    def __init__(self, store: Store) -> None:
        self._rows = store.adapters
        self.root = store.adapters_folder

    def groups(self, tenant: str = "") -> list[str]:
        """Groups of a tenant that have an adapter, by name."""
        return [row.group for row in self._rows.rows(tenant) if row.current]

    def current(self, group: str, tenant: str = "") -> tuple[int, Path] | None:
        """Version and folder of the adapter that answers for a group of a tenant; None when it has none."""
        row = self._rows.current(tenant, group)
        return None if row is None else (row.version, row.folder)

    def open(self, group: str, tenant: str = "") -> tuple[int, Path] | None:
        """`current`, after every byte of its files was compared with the checksums that the store took of them.

        Raises:
            AdapterError: a file is missing or damaged; names it.
        """
        row = self._rows.current(tenant, group)
        if row is None:
            return None
        if (damage := row.damage()) is not None:
            raise AdapterError(
                f"{damage}; let another version answer (`lloco adapters rollback {group}`), add it again, or ask with "
                "--adapter none"
            )
        return row.version, row.folder

    def kept(self, tenant: str | None = None) -> list[Kept]:
        """Every adapter of a tenant, or of all tenants, by tenant, group and version.

        Raises:
            AdapterError: the manifest of one cannot be read.
        """
        return [Kept.of(row) for row in self._rows.rows(tenant)]

    def add(self, folder: Path, group: str, tenant: str = "", *, run: str = "") -> Kept:
        """Copy an adapter's folder in as the group's newest version, which answers from then on.

        Args:
            folder: as `lloco finetune` writes it.
            group: of the documents that it reads.
            tenant: whose documents.
            run: key of the run that trained it.

        Raises:
            AdapterError: the folder holds no sound adapter.
            ConfigError: the group's name cannot be one.
            StoreFull: no room; the store is as it was.
            StoreLocked: another writer holds the store.
        """
        check_group(group)
        read(folder)
        try:
            files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        except OSError as error:
            raise AdapterError(f"the adapter at {folder} cannot be read: {error.strerror}") from error
        return Kept.of(self._rows.add(files, tenant, group, run))

    def made_by(self, run: str, group: str, tenant: str = "") -> Kept | None:
        """The adapter that a finetuning run added; None where it has added none."""
        made = [row for row in self._rows.rows(tenant, group) if row.run == run]
        return Kept.of(made[-1]) if made else None

    def remove(self, group: str, version: int | None = None, tenant: str = "") -> list[int]:
        """Remove one version, or all of a group; the newest of those left answers if the one that did is gone.

        Returns:
            the versions that were removed.

        Raises:
            AdapterError: there is no such adapter.
        """
        gone = self._rows.remove(tenant, check_group(group), version)
        if not gone:
            raise AdapterError(self._missing(group, tenant, version))
        return gone

    def rollback(self, group: str, version: int | None = None, tenant: str = "") -> int:
        """Let an earlier version answer: the given one, else the one before that which answers now.

        Returns:
            the version that answers.

        Raises:
            AdapterError: there is no such version.
        """
        rows = self._rows.rows(tenant, check_group(group))
        current = next((row.version for row in rows if row.current), 0)
        wanted = [row.version for row in rows if (row.version < current if version is None else row.version == version)]
        if not wanted or not self._rows.answer_with(tenant, group, wanted[-1]):
            raise AdapterError(self._missing(group, tenant, version, earlier=version is None and bool(rows)))
        return wanted[-1]

    def _missing(self, group: str, tenant: str, version: int | None, earlier: bool = False) -> str:
        have = ", ".join(str(row.version) for row in self._rows.rows(tenant, group)) or "none"
        what = "earlier version" if earlier else "adapter" if version is None else f"version {version}"
        return f"group {group!r} has no {what}; it has versions: {have} (`lloco adapters ls` lists them)"
