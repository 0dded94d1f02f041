"""Which adapter answers a question: the one that was asked for, or that of its hits' group."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lloco_engine.adapters.loading import DEFAULT, default_folder, facts_of, load, load_named
from lloco_engine.adapters.manifest import MUST_AGREE, AdapterManifest
from lloco_engine.adapters.registry import Registry
from lloco_engine.errors import AdapterError
from lloco_engine.store import Store
from lloco_engine.types import Hit

if TYPE_CHECKING:
    from lloco_engine.decoder.answering import AnsweringDecoder

__all__ = ["GROUP", "Adapters", "group_of", "name_of"]

GROUP = "group"  # the metadata that says which group a document belongs to


def group_of(hits: Sequence[Hit]) -> str:
    """The group whose adapter reads these hits together.

    The best hit's group; of several that score the same, the group with most hits among all; of those, the first by
    name. A document without a group belongs to ``"default"``.
    """
    if not hits:
        return DEFAULT
    named = [(hit.score, str(hit.metadata.get(GROUP) or DEFAULT)) for hit in hits]
    best = max(score for score, _ in named)
    count = Counter(group for _, group in named)
    return min({group for score, group in named if score == best}, key=lambda group: (-count[group], group))


def name_of(group: str, version: int, tenant: str = "") -> str:
    """What a decoder, which serves all tenants, calls a store's adapter."""
    named = f"{group}@{version}"
    return f"{named}-{hashlib.sha256(tenant.encode()).hexdigest()[:16]}" if tenant else named


class Adapters:
    """The adapters of an engine: its store's, and the one that the package ships. Loaded when first needed.

    Args:
        store: whose adapters.
        decoder: gives the decoder.
    """

    def __init__(self, store: Store, decoder: Callable[[], AnsweringDecoder]) -> None:
        self.registry = Registry(store)
        self._manifest, self._decoder = store.manifest, decoder
        self._memory = store.manifest.memory
        self._of_store: set[str] = set()  # names in the decoder of adapters that belong to a tenant
        self._lock = threading.Lock()
        self._ships: bool | None = None  # whether the shipped adapter is for this decoder

    def check(self, wanted: str, tenant: str = "") -> None:
        """Refuse, before anything is read, an adapter that a tenant does not have."""
        loaded = [name for name in self._decoder().adapters if name not in self._of_store]
        if wanted in ("auto", "none", DEFAULT, *loaded):
            return
        if self.registry.current(wanted, tenant) is None:
            known = dict.fromkeys(["none", *self.registry.groups(tenant), *loaded])
            raise AdapterError(
                f"an adapter is 'auto', 'none', a group with an adapter in the store, or one that was loaded, and "
                f"{wanted!r} is none of them; there is {', '.join(known)}"
            )

    def choose(self, wanted: str, hits: Sequence[Hit], tenant: str = "") -> str | None:
        """The adapter to answer with, loaded; None for the base weights.

        Args:
            wanted: a group, the name of a loaded adapter, ``"default"`` or ``"none"``; ``"auto"`` leaves it to the
                hits: their `group_of`, else the tenant's ``default``, else the shipped one if it fits.
            hits: what is read.
            tenant: who asks; only adapters of its own answer, besides those that the caller loaded.

        Raises:
            AdapterError: there is none of that name, it is damaged, or it was made for something else; names what.
        """
        if wanted == "none":
            return None
        with self._lock:
            if wanted == "auto":
                for group in dict.fromkeys((group_of(hits), DEFAULT)):
                    if (found := self._stored(group, tenant)) is not None:
                        return found
                return self._shipped()
            return self._stored(wanted, tenant) or load_named(self._decoder(), wanted, self._memory)

    def folders(self) -> dict[str, Path]:
        """Folders of all that may answer, by the names that a decoder has them under; nothing is loaded.

        These are the adapters of every group of every tenant, and the one that the package ships where it is for this
        decoder.
        """
        rows = [kept for kept in self.registry.kept() if kept.current]
        found = {name_of(kept.group, kept.version, kept.tenant): kept.folder for kept in rows}
        made = {name: getattr(self._manifest, name) for name in MUST_AGREE}
        if (shipped := default_folder()) is not None and AdapterManifest.load(shipped).fits(made):
            found[DEFAULT] = shipped
        return found

    def load_all(self) -> None:
        """Load all that may answer, instead of each when it is first needed.

        Raises:
            AdapterError: one of them cannot be had.
        """
        decoder = self._decoder()
        with self._lock:
            for kept in self.registry.kept():
                if kept.current:
                    self._stored(kept.group, kept.tenant)
            if DEFAULT in self.folders():
                load_named(decoder, DEFAULT, self._memory)

    def _stored(self, group: str, tenant: str) -> str | None:
        current = self.registry.current(group, tenant)
        if current is None:
            return None
        version, decoder = current[0], self._decoder()
        name = name_of(group, version, tenant)
        if name not in decoder.adapters:
            opened = self.registry.open(group, tenant)
            if opened is None or opened[0] != version:  # changed in between
                return self._stored(group, tenant)
            load(decoder, opened[1], name, self._memory)
            self._of_store.add(name)
        return name

    def _shipped(self) -> str | None:
        """The shipped adapter's name; None where it is for another decoder, which is no error."""
        decoder, folder = self._decoder(), default_folder()
        if self._ships is None:
            self._ships = False
            if folder is not None:
                self._ships = AdapterManifest.load(folder).fits(facts_of(decoder) | {"memory": self._memory})
        return load_named(decoder, DEFAULT, self._memory) if self._ships else None
