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
from lloco_integrations.vllm.reading import Part, live_mass, merge
from lloco_integrations.vllm.shelf import Shelf

__all__ = ["SegmentBackend", "SegmentImpl"]


class SegmentImpl(ReadsSegments, FlashAttentionImpl):
    """See `ReadsSegments`."""

    in_pages = True

    def read_part(
        self,
        shelf: Shelf,
        part: Part,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """See `ReadsSegments`; the cache is (blocks, H, block size, 2 * D), each token's key before its value."""
        heads, size = self.num_kv_heads, kv_cache.shape[2]
        q = part.asked(query, heads)
        read, mass = part.layout.read(self.layer_index(layer), shelf.pool, q, self.scale)
        blocks = block_table[part.rows, : -(-max(part.lives) // size)].long()
        keys = kv_cache[..., : self.head_size][blocks].permute(0, 2, 4, 1, 3).flatten(3)
        alone = live_mass(q, keys, part.ends, part.tokens.shape[1], self.scale)
        flat = output.view(len(output), heads * self.num_queries_per_kv, -1)
        merged = merge(part.asked(flat, heads), alone, read, mass)
        flat[part.tokens] = part.answered(merged).to(flat.dtype)

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
