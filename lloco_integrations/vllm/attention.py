"""What vLLM's attention does beside its own on every device: it turns, and merges what is read of segments."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch

from lloco_integrations.vllm.reading import Part
from lloco_integrations.vllm.shelf import Shelf, Step, active

__all__ = ["ReadsSegments"]

if TYPE_CHECKING:
    _Base = Any
else:
    _Base = object


class ReadsSegments(_Base):
    """Goes before an attention implementation of vLLM's among a class's bases.

    vLLM's own kernel serves all rows as ever. It says no weight of what it read, so the live tokens of the rows with a
    memory are read again; theirs are few, since what is long are the segments.
    """

    reads_segments = True
    in_pages: bool  # whether it reads segments where `Shelf` has put them into pages

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

    @abstractmethod
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
        """Merge what some rows read of segments into ``output``."""


def _step(shelf: Shelf, metadata: Any) -> Step | None:
    """What this pass reads, found once for all layers."""
    if not hasattr(metadata, "lloco_step"):
        starts, ends = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
        first = metadata.block_table[: len(ends), 0].tolist()
        metadata.lloco_step = shelf.step(first, starts, ends)
    made: Step | None = metadata.lloco_step
    return made
