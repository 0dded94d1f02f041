"""Segments made by the workers of a cluster, and saved by the one writer (docs/scaling.md)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lloco_engine.cluster.ray import RayCluster
from lloco_engine.cluster.worker import Recipe, without_tokenizer
from lloco_engine.compress import registry
from lloco_engine.errors import ConfigError
from lloco_engine.models import DEFAULT_DECODER
from lloco_engine.plugins import PLUGINS

if TYPE_CHECKING:
    from lloco_engine.jobs import Maker
    from lloco_engine.store import Store
    from lloco_engine.store_setup import Setup

__all__ = ["Cluster", "RayCluster", "maker_on"]


class Cluster(Protocol):
    """Machines with workers."""

    def maker(self, store: Store, recipe: Recipe) -> Maker:
        """What has a store's segments made there."""
        ...


def maker_on(cluster: Cluster | str, store: Store, setup: Setup, device: str | None, dtype: str | None) -> Maker:
    """What has a store's segments made on a cluster, or on the Ray cluster at an address.

    Args:
        cluster: where.
        store: where they go.
        setup: what the store was made with. Workers find decoder and compressor by their names, and refuse them where
            they are not the store's.
        device, dtype: of the workers' decoders.

    Raises:
        ConfigError: a worker could not find decoder or compressor by a name, or there is no such cluster.
    """
    facts, compressor = setup.facts, setup.compressor
    if not facts.name:
        raise ConfigError("workers find the decoder by its name, and this one has none: open the store by decoder=NAME")
    if type(registry.get(compressor.name, **compressor.settings)) is not type(compressor):
        raise ConfigError(
            f"workers find the compressor by its name, and {compressor.name!r} is another one there: register it in a "
            "plugin file (lloco --plugin FILE)"
        )
    place = Path(facts.name).expanduser()
    is_path = facts.name != DEFAULT_DECODER and place.exists()
    recipe = Recipe(
        manifest=store.manifest.to_json(),
        store=str(store.path),
        decoder=str(place.resolve()) if is_path else facts.name,
        template=without_tokenizer(facts.template),
        device=device,
        dtype=dtype,
        plugins=os.environ.get(PLUGINS, ""),
    )
    return (RayCluster(cluster) if isinstance(cluster, str) else cluster).maker(store, recipe)
