"""Rows of numbers as segment files keep them, by their type on disk.

float16 : as they are
int8    : in 127 steps to either side of 0, as wide as the largest number of a channel of a head needs (``scale``)
int4    : two to a byte, in 15 steps from the ``least`` number of a channel of a head to its largest, ``step`` apart

Keys have channels whose numbers are all large, or all of one sign, so steps are a channel's own, from its least number
to its largest: so quantises KIVI (Liu et al. 2024, arXiv 2402.02750) its keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lloco_engine.errors import StoreError

if TYPE_CHECKING:
    import torch

    from lloco_engine.config import DType

__all__ = ["fake_quantize", "fault", "packed", "shapes", "unpacked"]

_TOO_LARGE = 65520.0  # for float16, once rounded
_STEPS = 15  # of int4


def packed(
    name: str, rows: torch.Tensor, lengths: torch.Tensor, dtype: DType, segment_id: str
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
    quantise = _to_int8 if dtype == "int8" else _to_int4
    made = quantise(rows.detach().to("cpu", torch.float32), lengths)
    tensors = {name + suffix: tensor for suffix, tensor in made.items()}
    if fault(name, tensors):  # of numbers so large that their steps round to beyond the largest
        raise StoreError(f"{name} of a segment must be finite in float16; segment {segment_id} has others in {dtype}")
    return tensors


def shapes(name: str, shape: list[int], channels: list[int], dtype: DType) -> dict[str, tuple[str, list[int]]]:
    """The tensors that `packed` makes of rows of a shape: type as safetensors calls it, and shape.

    Args:
        name: of the rows.
        shape: [N, D].
        channels: [L, H, D].
        dtype: on disk.
    """
    if dtype == "float16":
        return {name: ("F16", shape)}
    if dtype == "int8":
        return {name: ("I8", shape), f"{name}.scale": ("F32", channels)}
    half = [shape[0], -(-shape[1] // 2)]
    return {name: ("U8", half), f"{name}.least": ("F16", channels), f"{name}.step": ("F16", channels)}


def fault(name: str, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """What is wrong with what the rows of a name are turned back by: all of them would not be finite."""
    if (scale := tensors.get(f"{name}.scale")) is not None:
        sound = (scale >= 0) & (scale * 127 < _TOO_LARGE)
    elif (step := tensors.get(f"{name}.step")) is not None:
        least = tensors[f"{name}.least"].float()
        sound = (step >= 0) & (least > -_TOO_LARGE) & (least + step.float() * _STEPS < _TOO_LARGE)
    else:
        return None
    return None if bool(sound.all()) else f"the steps of its {name} are not finite in float16, or below 0"


def unpacked(name: str, tensors: Mapping[str, torch.Tensor], lengths: torch.Tensor) -> torch.Tensor:
    """The rows that `packed` was given, in float16, as near as their type on disk comes."""
    import torch

    rows, heads = tensors[name], lengths.flatten().tolist()
    # in one place, head by head: to allocate what all rows are multiplied by takes longer than to multiply
    if (scale := tensors.get(f"{name}.scale")) is not None:
        read = rows.float()
        for head, by in zip(read.split_with_sizes(heads), scale.flatten(0, 1), strict=True):
            head.mul_(by)
        return read.half()
    if (step := tensors.get(f"{name}.step")) is not None:
        half, width = rows.shape[1], step.shape[-1]
        read = torch.empty(len(rows), width)
        read[:, :half] = rows & 15
        read[:, half:] = rows[:, : width - half] >> 4
        channels = (tensors[f"{name}.least"].float().flatten(0, 1), step.float().flatten(0, 1))
        for head, least, by in zip(read.split_with_sizes(heads), *channels, strict=True):
            torch.addcmul(least, head, by, out=head)
        return read.half()
    return rows


def fake_quantize(rows: torch.Tensor, lengths: torch.Tensor, dtype: DType) -> torch.Tensor:
    """(N, D) rows as they will be read from disk, for whoever trains them: gradients pass as if nothing were rounded.

    The straight-through estimator (Bengio et al. 2013, arXiv 1308.3432). Rows that are not finite in float16 stay so.

    Args:
        rows: float32, of any device.
        lengths: (L, H) rows of each head.
        dtype: on disk.

    Returns:
        rows of the same dtype and device.
    """
    import torch

    given = rows.detach()
    if not bool((given.abs() < _TOO_LARGE).all()):
        return rows
    kept = packed("rows", given, lengths.cpu(), dtype, "")
    read = unpacked("rows", kept, lengths.cpu()).to(rows.device, torch.float32)
    return rows + (read - given)


def _to_int8(rows: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
    """(N, D) float32 -> int8, and the scales (L, H, D) that turn it back."""
    import torch

    # the largest as float16 has it, so that rows that were read from disk are packed into the same bytes again
    largest = _of_heads(rows.abs(), lengths, "amax").half().float()
    scale = largest.clamp_min_(torch.finfo(torch.float32).tiny) / 127
    quantised = (rows / _by_row(scale, lengths)).round_().clamp_(-127, 127).to(torch.int8)
    return {"": quantised, ".scale": scale}


def _to_int4(rows: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
    """(N, D) float32 -> (N, D / 2) bytes, the lower halves for the first half of D, and what turns them back."""
    import torch

    least, largest = (_of_heads(rows, lengths, which) for which in ("amin", "amax"))
    least, step = least.half(), ((largest - least.half().float()).clamp_min(0) / _STEPS).half()
    by = _by_row(step.float().clamp_min(torch.finfo(torch.float16).tiny), lengths)
    codes = ((rows - _by_row(least.float(), lengths)) / by).round_().clamp_(0, _STEPS).to(torch.uint8)
    half = -(-rows.shape[1] // 2)
    upper = torch.nn.functional.pad(codes[:, half:], (0, 2 * half - rows.shape[1]))
    return {"": codes[:, :half] | (upper << 4), ".least": least, ".step": step}


def _of_heads(rows: torch.Tensor, lengths: torch.Tensor, which: str) -> torch.Tensor:
    """(L, H, D): the ``"amin"`` or ``"amax"`` of each channel of each head; 0 for heads without rows."""
    import torch

    heads = lengths.numel()
    owner = torch.arange(heads).repeat_interleave(lengths.flatten().long())[:, None].expand_as(rows)
    made = rows.new_zeros(heads, rows.shape[1]).scatter_reduce_(0, owner, rows, which, include_self=False)
    return made.reshape(*lengths.shape, rows.shape[1])


def _by_row(of_heads: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """(L, H, D) -> (N, D): for each row what its head has."""
    return of_heads.flatten(0, 1).repeat_interleave(lengths.flatten().long(), dim=0)
