"""How commands open a store, and an engine on it; tests put doubles here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lloco_engine.config import ChunkConfig, CompressConfig, StoreConfig
from lloco_engine.errors import StoreNotFound

if TYPE_CHECKING:
    from lloco_engine.engine import Engine
    from lloco_engine.store import Manifest, Store

__all__ = ["open_engine", "open_store"]


def open_engine(
    store: Path,
    *,
    create: bool = False,
    decoder: str | None = None,
    embedder: str | None = None,
    ratio: float | None = None,
    segment_tokens: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    compressor: str | None = None,
    settings: Mapping[str, Any] | None = None,
    template: str | None = None,
) -> Engine:
    """An engine on ``store``. What is None is as the store was made, or the default for a new store.

    Raises:
        LLoCOError: as `Engine.open`.
    """
    store = store.expanduser()
    if not create and not store.exists():
        raise StoreNotFound(f"there is no store at {store}; `lloco ingest` makes one, --store names another")
    from lloco_engine.engine import Engine
    from lloco_engine.store_setup import stored_manifest

    stored = stored_manifest(store)
    return Engine.open(
        store,
        decoder=decoder,
        embedder=embedder,
        create=create,
        compress=_compress(stored, compressor, ratio, settings),
        chunk=_chunk(stored, segment_tokens),
        store_config=StoreConfig.from_json({"dtype": dtype}) if dtype else None,
        device=device,
        template=template,
    )


def _compress(
    stored: Manifest | None, compressor: str | None, ratio: float | None, settings: Mapping[str, Any] | None
) -> CompressConfig | None:
    """What is asked for; of what is not, what the store was made with, as far as it was made by this compressor."""
    if compressor is None and ratio is None and not settings:
        return None
    made = CompressConfig(compressor or CompressConfig.name)
    if stored is not None and compressor in (None, stored.compressor):
        made = CompressConfig(stored.compressor, stored.ratio, stored.compressor_settings)
    return CompressConfig(made.name, made.ratio if ratio is None else ratio, {**made.settings, **(settings or {})})


def _chunk(stored: Manifest | None, segment_tokens: int | None) -> ChunkConfig | None:
    """The store's sizes, or the default ones, with segments of other sizes, and windows that fit these."""
    if segment_tokens is None:
        return None
    made = ChunkConfig.from_json({} if stored is None else stored.chunk)
    window = min(made.window_tokens, segment_tokens)
    return ChunkConfig(segment_tokens, window, min(made.window_overlap, window - 1))


def open_store(store: Path) -> Store:
    """The store alone: no decoder is loaded.

    Raises:
        StoreError: as `Store.open`.
    """
    from lloco_engine.store import Store

    return Store.open(store)
