"""vLLM's attention on the CPU, reading segments beside its own cache."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from lloco_integrations.vllm.attention import ReadsSegments

__all__ = ["SegmentBackend", "SegmentImpl"]

_ISA = "vec"  # how vLLM lays keys in float32 blocks of a multiple of 32: [head_dim, block]


class SegmentImpl(ReadsSegments, CPUAttentionBackendImpl):
    """See `ReadsSegments`."""

    def live_keys(self, layer: Any, kv_cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """See `ReadsSegments`; the cache is (blocks, H, 2 * block size, D), keys before values.

        Raises:
            RuntimeError: keys lie in another way.
        """
        if layer.isa != _ISA:
            raise RuntimeError(f"keys must be float32 in blocks of a multiple of 32 ({_ISA!r}), not {layer.isa!r}")
        heads, size = kv_cache.shape[1:3]
        keys = kv_cache.view(len(kv_cache), heads, 2 * size, -1)[:, :, :size][blocks]
        return keys.reshape(*keys.shape[:3], -1, size).permute(0, 2, 3, 1, 4).flatten(3)

    def layer_index(self, layer: Any) -> int:
        """See `ReadsSegments`."""
        return int(extract_layer_index(layer.layer_name))


class SegmentBackend(CPUAttentionBackend):
    """vLLM's own with `SegmentImpl`, which turns keys before they are put into the cache."""

    forward_includes_kv_cache_update = True

    @staticmethod
    def get_impl_cls() -> type[SegmentImpl]:
        """See `SegmentImpl`."""
        return SegmentImpl
