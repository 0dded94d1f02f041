"""The files that hold a model's weights: which they are, and what they hold, without reading them whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["safetensors_header", "sample_file", "weight_files"]


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder; empty when none or, going by the shard index, not all are there."""
    for index, single, pattern in (
        ("model.safetensors.index.json", "model.safetensors", "*.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model*.bin"),
    ):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            shards = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
            files = [folder / shard for shard in shards]
            return files if all(file.is_file() for file in files) else []
        if files := sorted(folder.glob(pattern)):
            return files
    return []


def safetensors_header(file: Path) -> tuple[int, dict[str, tuple[str, list[int], tuple[int, int]]]]:
    """Where the data starts, and each tensor's dtype, shape and byte range in the data."""
    with file.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        if not 2 <= size <= min(100_000_000, file.stat().st_size):
            raise ValueError(f"{file} is not a safetensors file: its header claims {size} bytes")
        header = json.loads(handle.read(size))
    header.pop("__metadata__", None)
    return 8 + size, {
        name: (entry["dtype"], entry["shape"], (entry["data_offsets"][0], entry["data_offsets"][1]))
        for name, entry in header.items()
    }


def sample_file(file: Path, digest: Any, pieces: int = 64) -> None:
    """Add a file's size and ``pieces`` evenly spread stretches of 4 KiB to a running hash."""
    size = file.stat().st_size
    digest.update(str(size).encode())
    with file.open("rb") as handle:
        for piece in range(pieces):
            handle.seek(size * piece // pieces)
            digest.update(handle.read(4096))
