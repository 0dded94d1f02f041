"""How commands come by an engine or a store; tests put doubles here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lloco_engine.config import ChunkConfig, CompressConfig, StoreConfig
from lloco_engine.errors import StoreNotFound
from lloco_engine.models import DEFAULT_DECODER, DEFAULT_EMBEDDER

if TYPE_CHECKING:
    from lloco_engine.engine import Engine
    from lloco_engine.store import Store

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
    if not create and not store.exists():
        raise StoreNotFound(f"there is no store at {store}; `lloco ingest` makes one, --store names another")
    from lloco_engine.engine import Engine

    made = _made_with(store)
    chunk = dict(made.get("chunk") or {})
    if segment_tokens is not None:
        chunk["segment_tokens"] = segment_tokens
        chunk["window_tokens"] = min(chunk.get("window_tokens", ChunkConfig.window_tokens), segment_tokens)
        chunk["window_overlap"] = min(
            chunk.get("window_overlap", ChunkConfig.window_overlap), chunk["window_tokens"] - 1
        )
    return Engine.open(
        store,
        decoder=decoder or made.get("decoder") or DEFAULT_DECODER,
        embedder=embedder or made.get("embedder") or DEFAULT_EMBEDDER,
        create=create,
        compress=_compress(made, compressor, ratio, settings),
        chunk=ChunkConfig.from_json(chunk) if chunk else None,
        store_config=StoreConfig.from_json({"dtype": dtype or made.get("dtype") or "auto"}),
        device=device,
        template=template,
    )


def _compress(
    made: dict[str, Any], compressor: str | None, ratio: float | None, settings: Mapping[str, Any] | None
) -> CompressConfig:
    """What is asked for; of what is not, what the store was made with, as far as it was made by this compressor."""
    name = compressor or made.get("compressor") or CompressConfig.name
    own = made if made.get("compressor") == name else {}
    return CompressConfig(
        name=name,
        ratio=ratio if ratio is not None else own.get("ratio") or CompressConfig.ratio,
        settings=dict(own.get("compressor_settings") or {}) | dict(settings or {}),
    )


def _made_with(store: Path) -> dict[str, Any]:
    """The store's manifest; empty where there is none, or none to read (opening the store says what is wrong)."""
    try:
        values = json.loads((store / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def open_store(store: Path) -> Store:
    """The store alone: no decoder is loaded.

    Raises:
        StoreError: as `Store.open`.
    """
    from lloco_engine.store import Store

    return Store.open(store)
