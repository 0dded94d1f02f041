"""vLLM's FlashAttention on GPUs, reading segments beside its own cache: experimental.

By the same parts as on the CPU, which are tested there; nothing of this has run on a GPU. Rows with a memory take some
thirty launches a layer more until one kernel does it all.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from lloco_integrations.vllm.attention import ReadsSegments

__all__ = ["SegmentBackend", "SegmentImpl"]


class SegmentImpl(ReadsSegments, FlashAttentionImpl):
    """See `ReadsSegments`."""

    def live_keys(self, layer: Any, kv_cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """See `ReadsSegments`; the cache is (blocks, H, block size, 2 * D), each token's key before its value."""
        keys = kv_cache[..., : self.head_size][blocks]
        return keys.permute(0, 2, 4, 1, 3).flatten(3)

    def layer_index(self, layer: Any) -> int:
        """See `ReadsSegments`."""
        return int(extract_layer_index(layer.layer_name))


class SegmentMetadataBuilder(FlashAttentionMetadataBuilder):
    """vLLM's own; attention runs between captured graphs, since other pages are read at every pass."""

    _cudagraph_support = AttentionCGSupport.NEVER


class SegmentBackend(FlashAttentionBackend):
    """vLLM's own with `SegmentImpl`, which turns keys before they are put into the cache."""

    forward_includes_kv_cache_update = True

    @staticmethod
    def get_impl_cls() -> type[SegmentImpl]:
        """See `SegmentImpl`."""
        return SegmentImpl

    @staticmethod
    def get_builder_cls() -> type[SegmentMetadataBuilder]:
        """See `SegmentMetadataBuilder`."""
        return SegmentMetadataBuilder
