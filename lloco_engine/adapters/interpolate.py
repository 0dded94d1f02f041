"""An adapter between two: what further training taught, with some of what it unlearned."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lloco_engine.adapters.loading import read
from lloco_engine.adapters.manifest import FILES, MANIFEST, WEIGHTS, AdapterManifest
from lloco_engine.adapters.writing import new_folder
from lloco_engine.errors import AdapterError, ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["average"]


def average(earlier: Path, later: Path, share: float, out: Path) -> AdapterManifest:
    """Write the weighted mean of an adapter's weights and those of one that was trained on from it.

    Wortsman et al. 2022, Robust fine-tuning of zero-shot models (WiSE-FT): between the weights before and after further
    training lie some that are better than both. Of adapters that do not come from each other the mean is of no use.

    Args:
        earlier: folder of the adapter that the training began with.
        later: folder of the adapter that it made.
        share: of the later one, from 0 to 1.
        out: folder to write, which must not exist.

    Returns:
        the manifest: the later one's, with the share and without losses, which have not been measured.

    Raises:
        ConfigError: the share breaks its rule, or ``out`` exists.
        AdapterError: a folder is damaged, or the later adapter was not trained on from the earlier one, or is of
            another shape.
        LLoCOError: the folder cannot be written.
    """
    from safetensors.torch import load, save_file

    if not 0 <= share <= 1:
        raise ConfigError(f"share must be from 0 (the earlier adapter) to 1 (the later one), not {share}")
    if out.exists():
        raise ConfigError(f"an adapter's folder must be new, and {out} exists: remove it, or name another")
    first, last = read(earlier), read(later)
    begun = (last.config.get("begun_with") or {}).get("sha256")
    if begun != first.weights_sha256:
        raise AdapterError(
            f"{later} must have been trained on from {earlier} (`lloco finetune --from`); it began with weights of "
            f"sha256 {begun or 'none'}, and these are {first.weights_sha256}"
        )
    old, new = (load((folder / WEIGHTS).read_bytes()) for folder in (earlier, later))
    if other := [name for name, value in old.items() if name not in new or new[name].shape != value.shape]:
        raise AdapterError(
            f"the adapters must be of one shape, and {other[0]} of {earlier} is not so in {later}: average others"
        )
    with new_folder(out) as draft:
        mean = {name: _mean(old.get(name), value, share, name) for name, value in new.items()}
        save_file(mean, draft / WEIGHTS, metadata={"format": "pt"})
        for name in FILES:
            if name not in (WEIGHTS, MANIFEST) and (later / name).is_file():
                shutil.copyfile(later / name, draft / name)
        manifest = replace(
            last,
            weights_sha256=hashlib.sha256((draft / WEIGHTS).read_bytes()).hexdigest(),
            config=last.config | {"averaged": {"share": share, "later_sha256": last.weights_sha256}},
            metrics={name: value for name, value in last.metrics.items() if "loss" not in name},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        (draft / MANIFEST).write_text(manifest.dumps(), encoding="utf-8")
    return manifest


def _mean(old: torch.Tensor | None, new: torch.Tensor, share: float, name: str) -> torch.Tensor:
    """The mean of a tensor; of a target that came later, whose low-rank product began as 0, the share of that."""
    if old is None:
        return share * new if "lora_B" in name else new
    return (1 - share) * old + share * new
