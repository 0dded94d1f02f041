"""The numbers of a decoder that the rest of the engine needs, as its configuration says them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lloco_engine.errors import UnsupportedModel

__all__ = ["SHAPED", "DecoderShape"]

SHAPED = ("llama", "mistral", "qwen2", "qwen3")  # families whose layers are, operation by operation, Llama's
_IMMOVABLE = (
    "placement must be 'parallel' with a decoder of {!r}: keys can be moved to other positions only in decoders of "
    "Llama's shape"
)


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder.

    ``head_dim`` is the largest, where layers differ, or keys and values; ``window`` is the largest number of positions
    it can attend over; ``embedding`` the numbers of one input embedding (and of a final hidden state), which is not
    ``hidden`` where a family projects them; ``rotary`` whether positions turn queries and keys, rather than being
    learned embeddings added to the input; ``immovable`` why keys cannot be moved to other positions, "" where they can.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    window: int
    vocabulary: int
    embedding: int
    rotary: bool
    immovable: str = ""

    @classmethod
    def of(cls, config: Any) -> DecoderShape:
        """The shape written in a transformers configuration.

        Raises:
            UnsupportedModel: it has layers without attention, or says no number of positions.
        """
        config = config.get_text_config()
        kinds = [str(kind) for kind in getattr(config, "layer_types", None) or ()]
        if others := sorted({kind for kind in kinds if "attention" not in kind or "linear" in kind}):
            raise UnsupportedModel(
                f"each of its {len(kinds)} layers must ask for attention, and it has some of {', '.join(others)}: what "
                "these keep of what they have read is a state that moves on with every token, and no keys and values "
                "that segments could hold"
            )
        if not isinstance(getattr(config, "max_position_embeddings", None), int):
            raise UnsupportedModel(
                "its config.json must say max_position_embeddings, since positions that it has no number of are none "
                "that slots could have"
            )
        each = list(getattr(config, "per_layer_config", None) or [config])  # where layers differ in their heads
        ropes = list(_ropes(getattr(config, "rope_parameters", None) or {}))
        return cls(
            layers=int(config.num_hidden_layers),
            query_heads=int(config.num_attention_heads),
            kv_heads=int(getattr(each[0], "num_key_value_heads", None) or config.num_attention_heads),
            head_dim=max(map(_head_dim, each)),
            hidden=int(config.hidden_size),
            window=min([_window(config, rope) for rope in ropes], default=int(config.max_position_embeddings)),
            vocabulary=int(config.vocab_size),
            embedding=int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size),
            rotary=bool(ropes),
            immovable="" if _turns_alike(config, ropes) else _IMMOVABLE.format(config.model_type),
        )


def _turns_alike(config: Any, ropes: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every layer turns whole keys, halves against each other, by one rotary embedding: Llama's shape."""
    return config.model_type in SHAPED and len(ropes) == 1 and ropes[0].get("partial_rotary_factor", 1) in (None, 1)


def _head_dim(config: Any) -> int:
    """Numbers of the largest key or value of a head."""
    latent = getattr(config, "qk_nope_head_dim", None)  # keys of two parts, beside values of a size of their own
    if latent:
        return max(int(latent) + int(config.qk_rope_head_dim), int(config.v_head_dim))
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _ropes(parameters: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The rotary embeddings that a configuration says: one, or one for each kind of layer."""
    nested = [part for part in parameters.values() if isinstance(part, Mapping)]
    yield from nested or ([parameters] if parameters else [])


def _window(config: Any, rope: Mapping[str, Any]) -> int:
    """Positions up to which a rotary embedding is fixed, so that stored keys match those of any prompt."""
    kind, positions = rope.get("rope_type", "default"), int(config.max_position_embeddings)
    original = int(rope.get("original_max_position_embeddings") or positions)
    if kind == "yarn":  # the window that the scaling makes, as vLLM computes it
        return int(float(rope["factor"]) * original)
    if kind == "longrope":  # beyond these it is another one for every position
        return min(positions, original)
    return positions  # also of "dynamic", which changes beyond them
