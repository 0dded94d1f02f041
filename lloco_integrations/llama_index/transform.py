"""Compression as a step of an ingestion pipeline."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Self

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode, TransformComponent

from lloco_engine import ConfigError, Engine
from lloco_integrations.handles import Handles
from lloco_integrations.llama_index.documents import ingest_nodes

__all__ = ["LLoCOTransform"]


class LLoCOTransform(TransformComponent):
    """Compresses the nodes that pass through an `IngestionPipeline` into the engine's store. Put it after the splitter.

    The pipeline's cache skips it only while the store holds exactly what it held then. Upserts and deletes reach the
    segments when the pipeline's vector store is a `LLoCOVectorStore`, which may stand before any other.

    Args:
        engine: whose store is written.
        tenant: whose nodes they are. Give each tenant a ``cache_collection`` of its own: the cache of the steps before
            this one knows no tenants.
        handles: takes turns with other writers; by default what all classes on the engine share.
    """

    tenant: str = Field(default="", description="Whose nodes they are.")

    _engine: Engine = PrivateAttr()
    _handles: Handles = PrivateAttr()

    def __init__(self, engine: Engine, *, tenant: str = "", handles: Handles | None = None) -> None:
        fields: dict[str, Any] = {"tenant": tenant}
        super().__init__(**fields)
        self._engine = engine
        self._handles = Handles.of(engine) if handles is None else handles

    @classmethod
    def class_name(cls) -> str:
        return "LLoCOTransform"

    def for_scope(self, tenant: str) -> Self:
        """The same for another tenant."""
        return self.model_copy(update={"tenant": tenant})

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """What the pipeline's cache knows a step by: here also the store and its state."""
        store = self._engine.store
        state = [str(store.path), self._engine.manifest.created, store.generation()]
        return super().to_dict(**kwargs) | {"store": state}

    def __getstate__(self) -> dict[str, Any]:
        raise ConfigError(
            "compression runs in the process that holds the store, so this step cannot be sent to others; run the "
            "pipeline without num_workers"
        )

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Compress what is not in the store yet; returns the nodes as they came.

        A node that cannot be stored is named in a warning, and the others are stored.

        Raises:
            DocumentError: none of several, or the only one, could be stored, and not because they were blank.
            StoreError: as `Engine.ingest`.
        """
        ingest_nodes(self._engine, nodes, self.tenant, self._handles)
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """The same in a thread."""
        return await asyncio.to_thread(self, nodes, **kwargs)
