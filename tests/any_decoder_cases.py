"""Tiny random models of many architectures, every weight random: norms of 1 and biases of 0 would hide faults."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lloco_engine.models import quiet
from lloco_engine.testing import tiny_tokenizer

WINDOW = 48
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_ROPE = {"rope_theta": 10000.0}
_LONG = {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 512} | _ROPE
ROPES: dict[str, dict[str, Any]] = {
    "default": _ROPE,
    "linear": {"rope_type": "linear", "factor": 4.0} | _ROPE,
    "dynamic": {"rope_type": "dynamic", "factor": 4.0} | _ROPE,
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256} | _ROPE,
    "longrope": _LONG | {"short_factor": [1.0 + n / 9 for n in range(8)], "long_factor": [2.0 + n for n in range(8)]},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    | _ROPE,
}
GRANITE = {"embedding_multiplier": 12.0, "logits_scaling": 4.0, "residual_multiplier": 0.22}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
# by what a test calls it: the architecture, and what its configuration changes
SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"llama, {name}": ("llama", {"rope_parameters": rope}) for name, rope in ROPES.items()},
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, sliding": ("mistral", {"sliding_window": WINDOW}),
    "ministral3": ("ministral3", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, some layers sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _MIXED},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", MOE | {"decoder_sparse_step": 1}),
    "mixtral": ("mixtral", MOE),
    "phi3": ("phi3", {"sliding_window": WINDOW, "partial_rotary_factor": 0.5}),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": WINDOW,
            "layer_types": _MIXED,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
        },
    ),
    "gemma3_text": ("gemma3_text", {"sliding_window": WINDOW, "layer_types": _MIXED, "query_pre_attn_scalar": 24}),
    "granite": ("granite", GRANITE | {"attention_multiplier": 0.08}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 0, 1], "use_sliding_window": False, "sliding_window": None}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": WINDOW, "layer_types": _MIXED}),
    "cohere2": ("cohere2", {"sliding_window": WINDOW, "layer_types": _MIXED, "logit_scale": 0.25}),
    "glm4": ("glm4", {"partial_rotary_factor": 0.5}),
    "gpt_oss": ("gpt_oss", MOE | {"sliding_window": WINDOW, "layer_types": _MIXED}),
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.25, "use_qkv_bias": True}),
    "starcoder2": ("starcoder2", {"sliding_window": WINDOW}),
    "exaone4": ("exaone4", {"sliding_window": WINDOW, "sliding_window_pattern": 4, "layer_types": _MIXED}),
    "opt": ("opt", {"word_embed_proj_dim": 64}),
    "opt, projected": ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    # beyond what was asked for: chunks of positions; layers that differ in head size; keys larger than values
    "llama4_text": (
        "llama4_text",
        MOE | {"attention_chunk_size": WINDOW, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 96},
    ),
    "gemma4_text": (
        "gemma4_text",
        {
            "sliding_window": WINDOW,
            "layer_types": _MIXED,
            "global_head_dim": 32,
            "num_global_key_value_heads": 2,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 284,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "head_dim": 8,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 40,
            "num_experts_per_tok": 2,
        },
    ),
}
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "attention_dropout": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
}


def tiny_of(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A model of four layers in float32, with transformers' own attention of plain products."""
    tokenizer, make = tiny_tokenizer(), CONFIG_MAPPING[kind]
    names = set(inspect.signature(make.__init__).parameters) | set(getattr(make, "attribute_map", {}))
    names |= {field.name for field in dataclasses.fields(make)} if dataclasses.is_dataclass(make) else set()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    fields = _SIZES | {"vocab_size": len(tokenizer)} | ids
    with quiet():
        config = make(**{name: value for name, value in fields.items() if name in names} | changes)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    spice(model, seed)
    model.tie_weights()
    return model.train(False).requires_grad_(False)


def spice(model: Any, seed: int) -> None:
    """Make every weight random."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.data = noise * (0.5 if "embed" in name else 1.2 / parameter.shape[-1] ** 0.5)
        else:  # norms begin at 1, or at 0 where they are 1 more
            parameter.data = 0.3 * noise + (1.0 if "norm" in name and float(parameter.detach().mean()) > 0.5 else 0.0)


def save(model: Any, folder: Path) -> Path:
    """As a folder that any ``decoder=`` takes."""
    with quiet():
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return folder
