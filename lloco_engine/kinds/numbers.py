"""Rows of numbers as segment files keep them: float16, or int8 with a symmetric scale for each channel of each head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lloco_engine.errors import StoreError

if TYPE_CHECKING:
    import torch

__all__ = ["packed", "shapes", "unpacked"]


def packed(
    name: str, rows: torch.Tensor, lengths: torch.Tensor, dtype: str, segment_id: str
) -> dict[str, torch.Tensor]:
    """(N, D) numbers of heads that lie one after another, ``lengths`` (L, H) rows each, in the type on disk.

    Raises:
        StoreError: one is not finite in float16.
    """
    import torch

    half = rows.detach().to("cpu", torch.float16).contiguous()
    if not bool(torch.isfinite(half).all()):
        raise StoreError(f"{name} of a segment must be finite in float16; segment {segment_id} has others")
    if dtype == "float16":
        return {name: half}
    quantised, scales = _quantise(rows.detach().to("cpu", torch.float32), lengths)
    return {name: quantised, f"{name}.scale": scales}


def shapes(name: str, shape: list[int], scale: list[int], dtype: str) -> dict[str, tuple[str, list[int]]]:
    """The tensors that `packed` makes of rows of a shape: type as safetensors calls it, and shape."""
    return {name: ("F16", shape)} if dtype == "float16" else {name: ("I8", shape), f"{name}.scale": ("F32", scale)}


def unpacked(name: str, tensors: dict[str, torch.Tensor], lengths: torch.Tensor) -> torch.Tensor:
    """The rows that `packed` was given, in float16."""
    rows, scales = tensors[name], tensors.get(f"{name}.scale")
    return rows if scales is None else _dequantise(rows, scales, lengths)


def _quantise(rows: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, D) float32 -> (N, D) int8 and the scales (L, H, D) that turn it back."""
    import torch

    heads = lengths.flatten().tolist()
    owner = torch.arange(len(heads)).repeat_interleave(torch.tensor(heads))
    peak = torch.stack(
        [part.abs().amax(0) if len(part) else rows.new_zeros(rows.shape[1]) for part in rows.split_with_sizes(heads)]
    )
    scales = peak.clamp_min(torch.finfo(torch.float32).tiny) / 127
    quantised = (rows / scales[owner]).round().clamp_(-127, 127).to(torch.int8)
    return quantised, scales.reshape(*lengths.shape, rows.shape[1])


def _dequantise(rows: torch.Tensor, scales: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    import torch

    by_row = scales.flatten(0, 1).repeat_interleave(lengths.flatten().long(), dim=0)
    return by_row.mul_(rows).to(torch.float16)
