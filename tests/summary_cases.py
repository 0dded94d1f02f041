"""A tiny seeded compressor to summary embeddings, in the layout of the published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lloco_engine.testing import tiny_decoder, tiny_tokenizer


def save_tiny_autocompressor(
    folder: str | Path,
    family: str = "llama",
    *,
    summary_length: int = 4,
    accumulate: bool = True,
    safetensors: bool = True,
    shards: int = 1,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Save a seeded summary compressor in the layout of the published AutoCompressors, with a tokenizer.

    Args:
        folder: where to.
        family: ``"llama"`` or ``"opt"``, or another of `FAMILIES`.
        summary_length, accumulate: as config.json has them.
        safetensors: else pytorch_model.bin.
        shards: files that the weights are spread over.
        seed, changes: as in `tiny_decoder`.

    Returns:
        the folder.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    model = tiny_decoder(family, seed=seed, **changes)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    generator = torch.Generator().manual_seed(seed + 1)
    embedding: Any = model.get_input_embeddings()
    width = embedding.weight.shape[1]
    weights["embed_summary.weight"] = 0.2 * torch.randn(summary_length, width, generator=generator)
    published = {"llama": "LlamaAutoCompressorModel", "opt": "OPTAutoCompressorModel"}
    config = model.config.to_dict() | {
        "architectures": [published.get(family, "AutoCompressorModel")],
        "summary_length": summary_length,
        "accumulate_summary": accumulate,
        "segment_gradient_checkpointing": False,
    }
    (place / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    stem, suffix = ("model", "safetensors") if safetensors else ("pytorch_model", "bin")
    names = sorted(weights)
    files = {f"{stem}-{n + 1:05d}-of-{shards:05d}.{suffix}": names[n::shards] for n in range(shards)}
    if shards == 1:
        files = {f"{stem}.{suffix}": names}
    else:
        index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
        (place / f"{stem}.{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")
    for file, held in files.items():
        part = {name: weights[name] for name in held}
        if safetensors:
            save_file(part, place / file, metadata={"format": "pt"})
        else:
            torch.save(part, place / file)
    tiny_tokenizer().save_pretrained(place)
    return place
