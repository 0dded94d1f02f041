"""The whole KV cache of a chunk as a segment: what reading the text in context would attend to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lloco_engine.compress.base import Compressor
from lloco_engine.compress.eviction import keep_slots
from lloco_engine.types import Segment

if TYPE_CHECKING:
    from lloco_engine.decoder.local import LocalDecoder

__all__ = ["Uncompressed"]


class Uncompressed(Compressor):
    """Keeps every slot with bias 0, whatever the ratio; the reference that compression is measured against."""

    name = "uncompressed"

    @torch.inference_mode()
    def make(self, decoder: LocalDecoder, token_ids: Sequence[int], ratios: Sequence[float]) -> list[Segment]:
        """The same full segment for every ratio."""
        shape = decoder.shape
        everything = torch.ones(shape.layers, shape.kv_heads, len(token_ids), dtype=torch.bool)
        segment = keep_slots(decoder.prefill(token_ids), decoder.template_tokens, everything)
        return [segment for _ in ratios]
