"""Changes of a store, drawn at random, and what it holds after each: for trials that cut them off or refuse them.

A change is a list, its kind first: ``["put", doc_id, text, title]``, ``["file", name, text]``, ``["delete", doc_id]``,
``["remove", doc_ids]``, ``["refine", doc_id]``, ``["adapter", "add" | "rm" | "back"]``, ``["backup"]``,
``["restore"]``, ``["repair"]``.
"""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from lloco_engine import Document, Engine
from lloco_engine.adapters.registry import Registry
from lloco_engine.config import ChunkConfig, CompressConfig, RefineConfig
from lloco_engine.decoder.local import LocalDecoder
from lloco_engine.errors import AdapterError, NotInStore
from lloco_engine.store import Store
from lloco_engine.testing import HashingEmbedder

CHUNK = ChunkConfig(32, 16, 4)
WORDS = ("the", "pump", "of", "hall", "nine", "needs", "oil", "before", "crane", "Orne", "lifts", "green", "tram")
OFTEN = {"put": 5, "file": 3, "delete": 2, "remove": 1, "adapter": 3, "refine": 1}  # of what changes a store
AT_REST = {"backup": 1, "restore": 1, "repair": 2}  # of what is done to one as a whole

Change = list
State = tuple


def open_engine(store: Path, decoder: LocalDecoder | str) -> Engine:
    """The engine of the trials: small chunks, kept whole, so that little time goes into compressing."""
    return Engine.open(
        store, decoder=decoder, embedder=HashingEmbedder(), chunk=CHUNK, compress=CompressConfig("uncompressed", 1)
    )


@dataclass(frozen=True)
class Site:
    """Where changes are made: the store, the files that are ingested and the copies that are taken beside it."""

    store: Path
    files: Path
    copy: Path
    decoder: LocalDecoder | str
    adapter: Path

    def make(self) -> None:
        """Make an empty store."""
        self.files.mkdir(parents=True)
        open_engine(self.store, self.decoder).close()

    def take(self, change: Change) -> None:
        """Make one change."""
        kind, *rest = change
        if kind in ("backup", "restore") and self.copy.exists():
            before = self.copy.with_name(f"{self.copy.name}.before")
            shutil.rmtree(before, ignore_errors=True)
            shutil.rmtree(self.copy.rename(before))
        if kind == "restore":
            Store.restore(self.store, self.copy)
        elif kind == "repair":
            lose_words(self.store)
            Store.repair(self.store)
        else:
            with open_engine(self.store, self.decoder) as engine:
                self._change(engine, kind, *rest)

    def _change(self, engine: Engine, kind: str, *rest) -> None:
        if kind == "put":
            engine.ingest([Document(*rest)])
        elif kind == "file":
            name, text = rest
            (self.files / name).write_text(text)
            assert not engine.ingest([self.files / name]).failed
        elif kind == "delete":
            with suppress(NotInStore):
                engine.delete(*rest)
        elif kind == "remove":
            engine.delete_all(*rest)
        elif kind == "refine":
            with suppress(NotInStore):
                assert not engine.refine(rest, config=RefineConfig(steps=1)).failed
        elif kind == "backup":
            engine.backup(self.copy)
        else:
            registry = engine.adapters.registry
            with suppress(AdapterError):  # there is none to remove, or none before
                if rest[0] == "add":
                    registry.add(self.adapter, "law")
                elif rest[0] == "rm":
                    registry.remove("law")
                else:
                    registry.rollback("law")


def lose_words(store: Path) -> None:
    """Damage what is derived from the documents: nothing is lost by it."""
    with suppress(sqlite3.Error), closing(sqlite3.connect(store / "catalogue.sqlite")) as connection, connection:
        connection.execute("DELETE FROM words_data WHERE id > 10")


class Expected:
    """What the store holds after each change."""

    def __init__(self) -> None:
        self.documents: dict[str, tuple[str, str]] = {}
        self.versions: tuple[int, ...] = ()
        self.current = self.newest = 0

    def state(self) -> State:
        return tuple(sorted(self.documents.items())), self.versions, self.current

    def take(self, change: Change) -> None:
        kind, *rest = change
        if kind == "put":
            self.documents[rest[0]] = (rest[1], rest[2])
        elif kind == "file":
            self.documents[rest[0]] = (rest[1], Path(rest[0]).stem)
        elif kind == "delete":
            self.documents.pop(rest[0], None)
        elif kind == "remove":
            for doc_id in rest[0]:
                self.documents.pop(doc_id, None)
        elif rest == ["add"]:
            self.newest += 1
            self.versions, self.current = (*self.versions, self.newest), self.newest
        elif rest == ["rm"]:
            self.versions, self.current = (), 0
        elif rest == ["back"] and (earlier := [number for number in self.versions if number < self.current]):
            self.current = earlier[-1]


def actual(store: Store) -> State:
    """What a store holds, as `Expected.state` tells it."""
    documents = {info.doc_id: (store.document_text(info.doc_id, info.tenant), info.title) for info in store.documents()}
    kept = Registry(store).kept()
    current = next((one.version for one in kept if one.current), 0)
    return tuple(sorted(documents.items())), tuple(one.version for one in kept), current


def drawn(rng: random.Random, expected: Expected, often: Mapping[str, int] = OFTEN) -> Change:
    """A change that suits what is there."""
    kind = rng.choices(tuple(often), tuple(often.values()))[0]
    text = " ".join(rng.choices(WORDS, k=rng.randrange(5, 120)))
    there = [doc_id for doc_id in sorted(expected.documents) if not doc_id.endswith(".txt")] or ["d0"]
    if kind == "put":
        return ["put", f"d{rng.randrange(8)}", text, rng.choice(("", "A title", "Another"))]
    if kind == "file":
        return ["file", f"f{rng.randrange(6)}.txt", text]
    if kind == "remove":
        return ["remove", rng.sample(there, min(3, len(there)))]
    if kind in ("delete", "refine"):
        return [kind, rng.choice(there)]
    return [kind, rng.choice(("add", "add", "rm", "back"))] if kind == "adapter" else [kind]
