"""What vLLM's attention does beside its own on every device: it turns, and merges what is read of segments."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch

from lloco_integrations.vllm.reading import Part, live_mass, merge
from lloco_integrations.vllm.shelf import Shelf, Step, active

__all__ = ["ReadsSegments"]

if TYPE_CHECKING:
    _Base = Any
else:
    _Base = object


class ReadsSegments(_Base):
    """Goes before an attention implementation of vLLM's among a class's bases.

    vLLM's own kernel serves all rows as ever. It says no weight of what it read, so that of the rows with a memory is
    found again from the live keys; theirs are short, since what is long are the segments.
    """

    reads_segments = True
    in_pages = True  # whether it reads segments where `Shelf` has put them into pages

    def live_keys(self, layer: Any, kv_cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """Keys (R, H, D, N) of blocks (R, N / block size) int64 of the cache, where segments lie in pages."""
        raise NotImplementedError

    @abstractmethod
    def layer_index(self, layer: Any) -> int:
        """Number of a layer."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionImpl.forward`; queries (tokens, H * G, D), keys and values (tokens, H, D)."""
        own: Any = super()
        if attn_metadata is None:  # warming up
            own.forward(layer, query, key, value, kv_cache, None, output)
            return output
        shelf, tokens = active(), attn_metadata.num_actual_tokens
        step = None if shelf is None else _step(shelf, attn_metadata)
        if step is not None:
            query, key = step.turn(query), step.turn(key)
        self.do_kv_cache_update(layer, key[:tokens], value[:tokens], kv_cache, attn_metadata.slot_mapping)
        own.forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        if step is not None and shelf is not None:
            for part in step.parts:
                self.read_part(shelf, part, layer, query, kv_cache, attn_metadata.block_table, output)
        return output

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
        """Merge what some rows read of segments, which lie in pages, into ``output``."""
        heads, size = self.num_kv_heads, kv_cache.shape[2]
        q = part.asked(query, heads)
        read, mass = part.layout.read(self.layer_index(layer), shelf.pool, q, self.scale)
        blocks = block_table[part.rows, : -(-max(part.lives) // size)].long()
        keys = self.live_keys(layer, kv_cache, blocks)
        alone = live_mass(q, keys, part.ends, part.tokens.shape[1], self.scale)
        flat = output.view(len(output), heads * self.num_queries_per_kv, -1)
        merged = merge(part.asked(flat, heads), alone, read, mass)
        flat[part.tokens] = part.answered(merged).to(flat.dtype)


def _step(shelf: Shelf, metadata: Any) -> Step | None:
    """What this pass reads, found once for all layers."""
    if not hasattr(metadata, "lloco_step"):
        starts, ends = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
        first = metadata.block_table[: len(ends), 0].tolist()
        metadata.lloco_step = shelf.step(first, starts, ends)
    made: Step | None = metadata.lloco_step
    return made
