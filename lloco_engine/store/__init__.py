"""The store: one folder of compressed documents. `store.store` is the door; what it hands out is here too."""

from __future__ import annotations

from lloco_engine.store.adapters import AdapterRow, StoredAdapters
from lloco_engine.store.manifest import FORMAT_VERSION, Manifest
from lloco_engine.store.records import DocumentInfo, Problem, SegmentStats
from lloco_engine.store.repair import repair_store
from lloco_engine.store.store import Store
from lloco_engine.store.verify import verify_store
from lloco_engine.store.writer import Writer

__all__ = [
    "FORMAT_VERSION",
    "AdapterRow",
    "DocumentInfo",
    "Manifest",
    "Problem",
    "SegmentStats",
    "Store",
    "StoredAdapters",
    "Writer",
    "repair_store",
    "verify_store",
]
