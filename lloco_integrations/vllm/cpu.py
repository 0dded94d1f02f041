"""vLLM's attention on the CPU, reading segments beside its own cache."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from lloco_integrations.vllm.attention import ReadsSegments
from lloco_integrations.vllm.reading import Part, live_rows
from lloco_integrations.vllm.shelf import Shelf

__all__ = ["SegmentBackend", "SegmentImpl"]

_ISA = "vec"  # how vLLM lays keys in float32 blocks of a multiple of 32: [head_dim, block]


class SegmentImpl(ReadsSegments, CPUAttentionBackendImpl):
    """See `ReadsSegments`. The engine's own kernel reads rows with a memory again, slots and live tokens at once."""

    in_pages = False

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
        """See `ReadsSegments`; the cache is (blocks, H, 2 * block size, D), keys before values.

        Raises:
            RuntimeError: keys lie in another way.
        """
        if layer.isa != _ISA:
            raise RuntimeError(f"keys must be float32 in blocks of a multiple of 32 ({_ISA!r}), not {layer.isa!r}")
        index, (_, heads, size, _) = self.layer_index(layer), kv_cache.shape
        pairs = kv_cache.view(len(kv_cache), heads, 2 * size, -1)
        new, flat = part.tokens.shape[1], output.view(len(output), heads * self.num_queries_per_kv, -1)
        for row, tokens, live, recall in zip(part.rows.tolist(), part.tokens, part.lives, part.recalls, strict=True):
            keys, values = live_rows(pairs.index_select(0, block_table[row, : -(-live // size)].long()), live)
            q = query.index_select(0, tokens).transpose(0, 1)[None]
            read = recall.slots.layer(index).attend(q, keys, values, _mask(new, live), self.scale)
            flat.index_copy_(0, tokens, read.view(new, *flat.shape[1:]))

    def layer_index(self, layer: Any) -> int:
        """See `ReadsSegments`."""
        return int(extract_layer_index(layer.layer_name))


@lru_cache(maxsize=4)
def _mask(new: int, live: int) -> torch.Tensor | None:
    """Additive (1, 1, T, S): each of the last T of S tokens sees what lies before it and itself; None for one."""
    if new == 1:
        return None
    later = torch.arange(live) > torch.arange(live - new, live)[:, None]
    return torch.zeros(1, 1, new, live).masked_fill_(later, torch.finfo(torch.float32).min)


class SegmentBackend(CPUAttentionBackend):
    """vLLM's own with `SegmentImpl`, which turns keys before they are put into the cache."""

    forward_includes_kv_cache_update = True

    @staticmethod
    def get_impl_cls() -> type[SegmentImpl]:
        """See `SegmentImpl`."""
        return SegmentImpl
