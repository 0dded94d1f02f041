"""Tiny decoders and segments that the tests of the decoder and of the compressors share."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from lloco_engine.compress.uncompressed import Uncompressed
from lloco_engine.config import PrefixConfig
from lloco_engine.decoder.local import LocalDecoder
from lloco_engine.prefix import Room, assemble
from lloco_engine.testing import tiny_decoder, tiny_tokenizer
from lloco_engine.tokenizing import encode
from lloco_engine.types import Prefix, Segment

# every family, and grouped-query, multi-head and multi-query attention
SHAPES = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1}),
    ("llama", {"attention_bias": True, "mlp_bias": False, "tie_word_embeddings": False}),
    ("mistral", {}),
    ("opt", {}),
    ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    ("qwen2", {}),
    ("qwen2", {"num_key_value_heads": 1}),
    ("qwen3", {}),
    ("qwen3", {"num_key_value_heads": 4, "head_dim": 16}),
]
TEXT = "The mill at Orne has three wheels. Its keeper, Ada Brandt, came from the north in 1874 and never left."
OTHERS = (
    "A tram of the green line carries forty people and a dog; on Sundays it carries none.",
    "Under the hill lies salt. The firm Kessler dug it for a century, then sold the holes to a bank.",
)


def tiny(family: str = "llama", *, seed: int = 0, **changes) -> LocalDecoder:
    """A decoder of its own: what a test does to it reaches no other."""
    return LocalDecoder(spiced(tiny_decoder(family, seed=seed, **changes)), tiny_tokenizer(), "tiny")


def spiced(model):
    """The model with biases and norms that are not the 0 and 1 they start with, so that a skipped one is noticed."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        elif "norm" in name:
            parameter.data.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def tokens(decoder: LocalDecoder, text: str) -> list[int]:
    return encode(decoder.tokenizer, text)


def whole(decoder: LocalDecoder, text: str = TEXT) -> Segment:
    """A text's whole KV cache as a segment."""
    return Uncompressed().compress(decoder, tokens(decoder, text), [1])[0]


def place(decoder: LocalDecoder, segments: Sequence[Segment], placement: str = "parallel") -> Prefix:
    config = PrefixConfig(placement=placement)
    return assemble(segments, config, room=Room.of(decoder, 0)).prefix


def ragged(seed: int, lengths: Sequence[Sequence[int]], dim: int = 8, source_tokens: int = 50) -> Segment:
    """A segment of random slots, ``lengths`` (layers, heads) of them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(lengths, dtype=torch.int64)
    count = int(sizes.sum())
    keys, values = (torch.randn(count, dim, generator=generator) for _ in range(2))
    return Segment(keys, values, torch.randn(count, generator=generator), sizes, source_tokens)


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def save_adapter(folder, seed: int, *, targets=TARGETS, **changes):
    """A LoRA adapter of random weights, saved; returns the model with it merged in."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
        with warnings.catch_warnings():  # PEFT reads an attribute that transformers has renamed
            warnings.simplefilter("ignore", FutureWarning)
            model = get_peft_model(spiced(tiny_decoder(**changes)), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.2)
        model.train(False)
        with warnings.catch_warnings():  # PEFT says so when it saves an embedding or head along
            warnings.simplefilter("ignore", UserWarning)
            model.save_pretrained(str(folder))
        return model.merge_and_unload().requires_grad_(False)
