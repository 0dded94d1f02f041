"""The contract of a decoder's forward pass: `interface` runs any decoder, `lean` those of Llama's shape with less."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lloco_engine.decoder.attention import Cache
from lloco_engine.decoder.lora import LowRank
from lloco_engine.decoder.memory import Memory
from lloco_engine.decoder.rules import Rules
from lloco_engine.errors import ConfigError
from lloco_engine.shape import DecoderShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Attention", "Runner", "turns"]

# (layer, queries (B, query heads, T, D), keys (B, KV heads, S, D), values) -> (B, T, query heads * D)
Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def turns(rotary: Any, like: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (B, T, D) of positions (B, T) by a decoder's rotary embedding, of device and dtype of ``like``.

    The rotation's sign is folded into sin, so that a roll by half of D replaces rotate-half.
    """
    cos, sin = rotary(like, positions)
    half = sin.shape[-1] // 2
    return cos, torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)


class Runner(ABC):
    """Runs token ids through a model, reading a compressed prefix and a cache of live tokens.

    ``scale`` is the factor of the attention logits, and ``rules`` what else each layer does to them; ``embed`` makes
    input embeddings of ids; ``adapter`` names the adapter to run with, whose modules are in place, or is None;
    ``replays`` says whether a step of one token is the same operations every time, so that it can be captured.
    """

    model: PreTrainedModel
    shape: DecoderShape
    embed: Any
    device: torch.device
    dtype: torch.dtype
    scale: float
    rules: Sequence[Rules]
    adapter: str | None
    replays: bool
    bf16: bool  # whether the linear layers may be run in bfloat16 where that is quicker

    @abstractmethod
    def forward(
        self,
        inputs: torch.Tensor,
        positions: torch.Tensor,
        cache: Cache,
        memory: Memory | None = None,
        attention: Attention | None = None,
        *,
        wanted: int | None = None,
        recompute: bool = False,
        in_bf16: bool = False,
    ) -> torch.Tensor:
        """One pass; the new keys and values are appended to ``cache``.

        Args:
            inputs: (B, T) int64 token ids, or (B, T, E) input embeddings.
            positions: (T,) or (B, T) int64; where they are learned, a negative one is none.
            cache: live keys and values before these tokens, of the same B.
            memory: compressed prefix that every token attends to, or None.
            attention: what reads the live keys and values in place of `attend`; it sees to causality and to the layer's
                rules itself.
            wanted: 1 or 0 tokens, the last, whose hidden states are asked for. None: all of them.
            recompute: keep what goes into each layer alone for the gradients, and run the layer again to take them
                (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"); the cache must bear being
                appended to twice.
            in_bf16: with gradients, run a float32 decoder's linear layers in bfloat16.

        Returns:
            (B, T or wanted, hidden) states that `logits` takes.
        """

    @abstractmethod
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits (..., vocabulary) in float32 from hidden states (..., hidden)."""

    def rotate(self, keys: torch.Tensor, offset: int) -> torch.Tensor:
        """Keys (N, D) moved ``offset`` positions on, as if the rotary embedding had been applied there.

        Raises:
            ConfigError: this decoder's keys cannot be moved.
        """
        if self.shape.immovable:
            raise ConfigError(self.shape.immovable)
        model: Any = self.model
        rotary = model.get_decoder().rotary_emb
        keys = keys.to(self.device, torch.float32)
        turned = turns(rotary, keys, torch.tensor([[offset]], device=self.device))
        cos, sin = (part[0, 0].float() / rotary.attention_scaling for part in turned)
        return torch.addcmul(keys * cos, torch.roll(keys, keys.shape[-1] // 2, -1), sin)

    @abstractmethod
    def linears(self) -> list[Any]:
        """The layers' linear modules, which an adapter may change: they are read as they are when a pass begins."""

    def low_rank(self, name: str | None) -> LowRank | None:
        """An adapter's matrices as they were last read, or None: what a pass with it multiplies by."""
        return None

    def forget(self, name: str) -> None:  # noqa: B027
        """Let go of what was read of an adapter: another may come under its name."""
