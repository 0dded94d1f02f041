"""Decoders of well-known shapes with random weights, and segments as uneven as compressed ones: for speed alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lloco_engine.decoder.local import LocalDecoder
from lloco_engine.errors import ConfigError
from lloco_engine.shape import DecoderShape
from lloco_engine.types import Prefix, Segment

__all__ = ["CHUNK", "SHAPES", "document", "lengths", "random_decoder"]

CHUNK = 1536  # tokens of a chunk
_WINDOW = 196_608  # positions: a source of 128k tokens, what is asked, and room

# Slots of a KV head over their mean, from the head that keeps most to the one that keeps least, at equal steps: of a
# chunk of 1,536 tokens that the embedded decoder compressed at 16x. How uneven a larger one's heads are is not known.
_SHARES = (15.12, 6.51, 3.11, 0.74, 0.37, 0.1, *[0.09] * 13)


def _llama(**sizes: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**sizes, max_position_embeddings=_WINDOW, tie_word_embeddings=False)


def _llama_2_7b() -> Any:
    return _llama(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    )


def _llama_31_8b() -> Any:
    return _llama(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )


def _qwen3_4b() -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=_WINDOW,
        tie_word_embeddings=True,
    )


def _tiny() -> Any:
    return _llama(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )


SHAPES: dict[str, Callable[[], Any]] = {
    "llama-2-7b": _llama_2_7b,
    "llama-3.1-8b": _llama_31_8b,
    "qwen3-4b": _qwen3_4b,
    "tiny": _tiny,
}


def random_decoder(shape: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> LocalDecoder:
    """A decoder of a shape with random weights, made on the device. Its tokenizer knows bytes alone.

    Args:
        shape: of `SHAPES`.
        device, dtype: where and in what.
        seed: of the weights.

    Raises:
        ConfigError: there is no such shape.
    """
    import transformers

    from lloco_engine.testing import tiny_tokenizer

    if shape not in SHAPES:
        raise ConfigError(f"shape must be one of {', '.join(SHAPES)}, not {shape!r}")
    torch.manual_seed(seed)
    auto: Any = transformers.AutoModelForCausalLM
    with device:
        model = auto.from_config(SHAPES[shape](), dtype=dtype)
    return LocalDecoder(model.to(device).eval(), tiny_tokenizer(), shape)


def lengths(shape: DecoderShape, tokens: int, ratio: float, seed: int = 0) -> npt.NDArray[np.int64]:
    """Slots of each KV head, in a random order, of a chunk of so many tokens."""
    heads = shape.layers * shape.kv_heads
    steps = np.linspace(0, len(_SHARES) - 1, heads)
    shares = np.random.default_rng(seed).permutation(np.interp(steps, np.arange(len(_SHARES)), _SHARES))
    kept: npt.NDArray[np.int64] = np.clip(np.round(shares / shares.mean() * tokens / ratio), 0, tokens).astype(np.int64)
    return kept


def document(decoder: LocalDecoder, source_tokens: int, ratio: float, focus: int, seed: int = 0) -> Prefix:
    """A document of random segments in half precision on the CPU, placed as one of chunks of `CHUNK` tokens is.

    Args:
        decoder: of whose sizes.
        source_tokens: of the document.
        ratio: source tokens for each slot.
        focus: see `lloco_engine.types.Prefix`.
        seed: of which heads keep how much, and of the numbers.
    """
    shape, source = decoder.shape, torch.Generator().manual_seed(seed)
    segments = []
    for begin in range(0, source_tokens, CHUNK):
        tokens = min(CHUNK, source_tokens - begin)
        kept = lengths(shape, tokens, ratio, seed)
        slots = int(kept.sum())
        keys, values = (
            torch.empty(slots, shape.head_dim, dtype=torch.float16).normal_(generator=source) for _ in range(2)
        )
        told = torch.from_numpy(kept.reshape(shape.layers, shape.kv_heads))
        segments.append(Segment(keys, values, torch.zeros(slots), told, tokens))
    start = decoder.template_tokens + min(CHUNK, source_tokens)
    return Prefix(tuple(segments), (0,) * len(segments), start, focus=focus)
