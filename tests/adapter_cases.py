"""Adapters of random weights, as training would have written them."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from decoder_cases import save_adapter

from lloco_engine import __version__
from lloco_engine.adapters import loading
from lloco_engine.adapters.manifest import FORMAT_VERSION, AdapterManifest
from lloco_engine.decoder.local import LocalDecoder


def adapter(folder: Path, decoder: LocalDecoder, seed: int = 1, **changes) -> Path:
    """A folder such as finetune writes, of random weights."""
    save_adapter(folder, seed)
    digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    manifest = AdapterManifest(
        format_version=FORMAT_VERSION,
        group="law",
        decoder="tiny",
        **loading.facts_of(decoder),
        memory="compact_kv",
        compressor="attention_matching",
        compressor_settings={},
        ratios=[16.0],
        data=[{"name": "qa.jsonl", "questions": 12}],
        config={},
        weights_sha256=digest,
        metrics={"held_out_loss_before": 2.0, "held_out_loss": 1.0},
        versions={"lloco": __version__},
    )
    (folder / "lloco.json").write_text(replace(manifest, **changes).dumps(), encoding="utf-8")
    return folder
