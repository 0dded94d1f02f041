"""Weight-free doubles for tests, yours included: nothing is downloaded and everything is made in milliseconds.

::

    folder = save_tiny_decoder(tmp_path / "tiny")        # a seeded decoder of any supported family
    engine = Engine.open(tmp_path / "store", decoder=str(folder), ...)

A tiny decoder speaks nonsense, but it is a real model: shapes, caches and attention are those of its family.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

__all__ = [
    "FAMILIES",
    "HashingEmbedder",
    "save_tiny_decoder",
    "tiny_config",
    "tiny_decoder",
    "tiny_tokenizer",
]

FAMILIES = ("llama", "mistral", "opt", "qwen2", "qwen3")

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer (256 bytes, some pairs, three control tokens) with a chat template; no text is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [("Ġ", letter) for letter in "abcdefghilmnoprstw"]
    merges += [("t", "h"), ("th", "e"), ("i", "n"), ("e", "r"), ("a", "n"), ("r", "e"), ("o", "n")]
    pieces += ["".join(pair) for pair in merges]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    make: Any = PreTrainedTokenizerFast  # untyped
    made: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer,
        bos_token=_SPECIAL[1],
        eos_token=_SPECIAL[2],
        unk_token=_SPECIAL[0],
        pad_token=_SPECIAL[0],
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = _CHAT_TEMPLATE
    return made


def tiny_config(family: str = "llama", **changes: Any) -> PretrainedConfig:
    """The config of a decoder with two layers and grouped-query attention (4 query heads on 2 KV heads of 8; OPT: 4).

    Args:
        family: one of `FAMILIES`.
        changes: any field of the family's config, e.g. ``num_key_value_heads=1``.

    Raises:
        ValueError: the family is none of `FAMILIES`.
    """
    from transformers import AutoConfig

    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, not {family!r}")
    tokenizer = tiny_tokenizer()
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,  # large enough that the attention is not flat
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "mistral":
        fields["sliding_window"] = None
    if family == "opt":
        for name in ("num_key_value_heads", "head_dim"):  # every query head has its own KV head, of hidden / heads
            del fields[name]
        fields |= {"ffn_dim": fields.pop("intermediate_size"), "init_std": fields.pop("initializer_range")}
        fields |= {"dropout": 0.0}
    made: PretrainedConfig = AutoConfig.for_model(family, **(fields | changes))
    return made


def tiny_decoder(family: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A decoder of `tiny_config` with seeded weights: float32, on the CPU, in eval mode, frozen.

    Args:
        family: one of `FAMILIES`.
        seed: the same one gives the same weights; the caller's random state is left as it was.
        changes: as in `tiny_config`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(family, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make: Any = AutoModelForCausalLM  # untyped
        model: PreTrainedModel = make.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    model.train(False)
    model.requires_grad_(False)
    return model


def save_tiny_decoder(folder: str | Path, family: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """Save `tiny_decoder` with its tokenizer, as a folder that any ``decoder=`` or ``--decoder`` takes.

    Returns:
        the folder.
    """
    from lloco_engine.models import quiet

    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    with quiet():
        tiny_decoder(family, seed=seed, **changes).save_pretrained(place)
        tiny_tokenizer().save_pretrained(place)
    return place


class HashingEmbedder:
    """An `Embedder` without a model: texts that share words are near, and the same text has always the same vector.

    Args:
        dim: numbers per vector.
    """

    def __init__(self, dim: int = 64) -> None:
        self.name = f"hashing-{dim}"
        self.dim = dim
        self.fingerprint = hashlib.sha256(self.name.encode()).hexdigest()[:16]

    def encode(self, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """Vectors of ``texts``: (len(texts), dim) float32, each of length 1."""
        import numpy as np

        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()):
                digest = int.from_bytes(hashlib.blake2b(word.encode("utf-8"), digest_size=8).digest(), "little")
                vectors[row, digest % self.dim] += 1.0 if digest >> 63 else -1.0
            if not vectors[row].any():
                vectors[row, 0] = 1.0
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)
