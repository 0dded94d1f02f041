"""The numbers of a decoder that the rest of the engine needs, and the families it can run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lloco_engine.errors import UnsupportedModel

__all__ = ["FAMILIES", "DecoderShape"]

FAMILIES = ("llama", "mistral", "opt", "qwen2", "qwen3")


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder.

    ``window`` is the largest number of positions it can attend over; ``embedding`` the numbers of one input embedding
    (and of a final hidden state), which is not ``hidden`` where a family projects them; ``rotary`` whether positions
    turn queries and keys, rather than being learned embeddings added to the input.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    window: int
    vocabulary: int
    embedding: int
    rotary: bool

    @classmethod
    def of(cls, config: Any) -> DecoderShape:
        """The shape written in a transformers configuration.

        Raises:
            UnsupportedModel: the family is not one of `FAMILIES`, or its rotary embedding changes with the length.
        """
        if config.model_type not in FAMILIES:
            raise UnsupportedModel(
                f"a decoder must be of one of the families {', '.join(FAMILIES)}, not {config.model_type!r}"
            )
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type", "default") in ("dynamic", "longrope"):
            raise UnsupportedModel(
                f"the rotary embedding must not change with the prompt's length, as {rope['rope_type']!r} does: "
                "stored keys would no longer match"
            )
        window = int(config.max_position_embeddings)
        if rope.get("rope_type") == "yarn":  # the window that the scaling makes, as vLLM computes it
            original = rope.get("original_max_position_embeddings") or window
            window = int(float(rope["factor"]) * int(original))
        sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
        if sliding and getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None):
            window = min(window, int(config.sliding_window))
        return cls(
            layers=int(config.num_hidden_layers),
            query_heads=int(config.num_attention_heads),
            kv_heads=int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads),
            head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads),
            hidden=int(config.hidden_size),
            intermediate=int(config.ffn_dim if config.model_type == "opt" else config.intermediate_size),
            window=window,
            vocabulary=int(config.vocab_size),
            embedding=int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size),
            rotary=config.model_type != "opt",
        )
