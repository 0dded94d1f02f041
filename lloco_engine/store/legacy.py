"""Adapters found by their folders alone: in stores made before the catalogue knew them, and after it was lost."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["OWNER", "adapter_folders", "legacy_adapters"]

OWNER = "owner.json"  # in an adapter's folder: {"tenant": ...}; former stores had none
_VERSION = re.compile(r"(\d{1,9})(-[0-9a-f]{8})?")
_log = logging.getLogger(__name__)


def adapter_folders(home: Path) -> list[Path]:
    """The folders in ``home`` but for those of runs at work, whose names begin with a dot."""
    if not home.is_dir():
        return []
    return sorted(entry for entry in home.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def legacy_adapters(root: Path) -> str:
    """The adapters in a store's folder, as JSON for the migration that makes rows of them.

    A list of groups: ``{"tenant": str or null (every tenant), "name", "current", "newest", "versions": [{"version",
    "folder", "files"}]}``. In former stores ``current.json`` of a group said which version answers; elsewhere, and
    where it cannot be read, the newest does. What a killed process left half written is left out.
    """
    groups = []
    for home in adapter_folders(root / "adapters"):
        versions: dict[str | None, dict[int, dict[str, Any]]] = {}
        for folder in adapter_folders(home):
            if (number := _VERSION.fullmatch(folder.name)) is None or (found := _sound(folder)) is None:
                continue
            tenant, files = found
            version = int(number[1])
            versions.setdefault(tenant, {})[version] = {
                "version": version,
                "folder": f"{home.name}/{folder.name}",
                "files": json.dumps(files),
            }
        for tenant, kept in versions.items():
            current = newest = max(kept)
            if tenant is None:
                with suppress(OSError, ValueError, KeyError, TypeError):
                    state = json.loads((home / "current.json").read_bytes())
                    newest = max(newest, int(state["newest"]))
                    current = int(state["current"]) if int(state["current"]) in kept else current
            groups.append(
                {
                    "tenant": tenant,
                    "name": home.name,
                    "current": current,
                    "newest": newest,
                    "versions": list(kept.values()),
                }
            )
    return json.dumps(groups)


def _sound(folder: Path) -> tuple[str | None, dict[str, tuple[int, str]]] | None:
    """Owner and files of an adapter's folder; None where its weights are not those that its manifest names."""
    try:
        data = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
        wanted = json.loads(data["lloco.json"])["weights_sha256"]
        if hashlib.sha256(data["adapter_model.safetensors"]).hexdigest() != wanted:
            raise ValueError("the weights are damaged")
        tenant = str(json.loads(data[OWNER])["tenant"]) if OWNER in data else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s is left out of the store's adapters: %s", folder, error)
        return None
    return tenant, {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in data.items()}
