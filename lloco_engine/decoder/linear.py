"""Linear layers that read the same input, as one matrix product, with weights in full or in half precision."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["FusedLinear", "PackedLinear", "is_plain", "pack"]

_ROWS = 64
_FEW = 256  # rows of a product up to which packed weights are quicker than plain ones (docs/decisions/0001)
_FINEST = 2.0**-25  # half of float16's finest step: how far bfloat16's smallest weights may be off


def is_plain(part: Any) -> bool:
    """Whether a layer is torch's own, by its weights alone: neither quantised nor with an adapter around it."""
    return type(part) is torch.nn.Linear and part.weight.is_floating_point() and part.weight.element_size() >= 2


class FusedLinear:
    """Joined linear layers.

    The parts' own weights become views of the joined one, so nothing is stored twice and the modules go on working.

    Where the processor has a kernel for it and float16 holds the weights, a second copy is packed in float16: exactly,
    or, for releases in bfloat16, to half of float16's finest grid, 2**-25. The product with it multiplies and adds in
    float32, so it differs from the plain one in the order of the sums and by that, but it reads half the bytes: that
    is what a step of few tokens waits for (docs/decisions/0001).

    Args:
        owner: the module that holds the parts.
        names: the parts' names, in the order in which their outputs lie side by side.
    """

    def __init__(self, owner: Any, names: tuple[str, ...]) -> None:
        self.owner, self.names = owner, names
        parts = [getattr(owner, name) for name in names]
        self.sizes = [part.weight.shape[0] for part in parts]
        self.weight, self.bias = parts[0].weight.data, parts[0].bias
        if len(parts) > 1:
            self._join(parts)
        self._packed = _packed(self.weight, self.bias)
        if self._packed is not None:
            self._packed_product = torch.ops.quantized.linear_dynamic_fp16.default

    @torch.no_grad()
    def _join(self, parts: list[Any]) -> None:
        self.weight = torch.cat([part.weight for part in parts])
        self.bias = torch.cat([part.bias for part in parts]) if parts[0].bias is not None else None
        for part, weight in zip(parts, self.weight.split(self.sizes), strict=True):
            part.weight.data = weight
        if self.bias is not None:
            for part, bias in zip(parts, self.bias.split(self.sizes), strict=True):
                part.bias.data = bias

    @property
    def parts(self) -> list[Any]:
        """The modules that are there now under the parts' names: PEFT puts its own around the decoder's."""
        return [getattr(self.owner, name) for name in self.names]

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., sum of the parts' outputs), differentiable."""
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            return self._in_few_shapes(x)
        return F.linear(x, self.weight, self.bias)

    def _in_few_shapes(self, x: torch.Tensor) -> torch.Tensor:
        """`plain` with its rows filled up to a multiple of 64.

        For bfloat16 oneDNN compiles a program for every number of rows, and keeps it: without this, memory grows with
        the number of different lengths of chunks that a process has compressed, some megabytes each.
        """
        rows = x.shape[:-1].numel()
        filled = F.pad(x.reshape(rows, x.shape[-1]), (0, 0, 0, -rows % _ROWS))
        return F.linear(filled, self.weight, self.bias)[:rows].view(*x.shape[:-1], len(self.weight))

    def quick(self, x: torch.Tensor) -> torch.Tensor:
        """The same for few rows and without gradients, from the packed copy where there is one."""
        if self._packed is None:
            return self.plain(x)
        return self._packed_product(x.float(), self._packed)  # type: ignore[no-any-return]

    def modules(self, x: torch.Tensor) -> torch.Tensor:
        """The same through the modules that are there now, adapters, dropout and gradients included."""
        return torch.cat([part(x) for part in self.parts], dim=-1)


def _packed(weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """The weights as the half-precision kernel reads them; None where it is missing or would not be exact."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    if torch.backends.quantized.engine not in ("fbgemm", "x86"):
        return None
    # row by row, for a copy of a large vocabulary's weights would be the most memory that loading takes
    if not all(bool(((part.half().float() - part).abs() <= _FINEST).all()) for part in torch.split(weight, _ROWS)):
        return None  # also where a weight overflows
    try:
        return torch.ops.quantized.linear_prepack_fp16(weight.detach(), None if bias is None else bias.detach())
    except (RuntimeError, AttributeError):  # a build or a processor without it
        return None


class PackedLinear(torch.nn.Linear):
    """A linear layer whose weights are held in half precision too, for products of few rows without gradients."""

    packed: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        if torch.is_grad_enabled() or x.shape[:-1].numel() > _FEW:
            return super().forward(x)
        product: Any = torch.ops.quantized.linear_dynamic_fp16.default
        made: torch.Tensor = product(x.float(), self.packed)
        return made


def pack(model: torch.nn.Module) -> None:
    """Make the plain linear layers of a model that is not trained `PackedLinear`, where float16 holds their weights."""
    for module in model.modules():
        if type(module) is torch.nn.Linear and (packed := _packed(module.weight, module.bias)) is not None:
            module.__class__ = PackedLinear
            module.packed = packed
