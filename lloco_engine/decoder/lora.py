"""LoRA adapters beside fused products: one low-rank product for all the parts that a fused layer joins.

PEFT adapts each linear layer by itself, with four small operations and a product of its own. For inference the
adapter is read out of PEFT's modules into two matrices for each fused layer, so that an adapted step costs hardly more
than a plain one. The modules stay where they are, and training goes through them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from lloco_engine.decoder.linear import FusedLinear

__all__ = ["PEFT_NAME", "LowRank", "Product", "adapted", "read_adapter"]

PEFT_NAME = "adapter"  # of the only adapter in a module: each has modules of its own
Product = Callable[[torch.Tensor], torch.Tensor]  # (..., in) -> (..., out)


class LowRank:
    """One adapter, for every fused layer.

    ``pairs`` has for each fused layer ``down`` (R, in) and ``up`` (R, out), R the ranks of all its parts together and
    the scaling in ``up``; None where the adapter leaves the layer alone.
    """

    def __init__(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor] | None], weights: Sequence[Any]) -> None:
        self.pairs = pairs
        self._weights = weights
        self._version = self._now()

    @property
    def current(self) -> bool:
        """Whether the adapter's weights are still those that were read: training changes them."""
        return self._version == self._now()

    def _now(self) -> int:
        return sum(weight._version for weight in self._weights)


@torch.no_grad()
def read_adapter(layers: Sequence[FusedLinear]) -> LowRank | None:
    """The adapter whose modules are in place; None where it is more than plain LoRA and only the modules can run it."""
    pairs: list[tuple[torch.Tensor, torch.Tensor] | None] = []
    weights: list[Any] = []
    for layer in layers:
        parts = layer.parts
        if not all(map(_is_plain, parts)):
            return None
        found = [(number, part) for number, part in enumerate(parts) if PEFT_NAME in getattr(part, "lora_A", {})]
        if not found:
            pairs.append(None)
            continue
        downs = [part.lora_A[PEFT_NAME].weight for _, part in found]
        ups = [part.lora_B[PEFT_NAME].weight for _, part in found]
        weights += [*downs, *ups]
        down = torch.cat(downs)
        up = down.new_zeros(down.shape[0], sum(layer.sizes))
        row = 0
        for (number, part), weight in zip(found, ups, strict=True):
            column, rank = sum(layer.sizes[:number]), weight.shape[1]
            up[row : row + rank, column : column + weight.shape[0]] = weight.T * part.scaling[PEFT_NAME]
            row += rank
        # in the decoder's own precision: casting back and forth would double the operations of a step
        pairs.append((down.to(layer.weight.dtype), up.to(layer.weight.dtype)))
    return LowRank(pairs, weights)


def _is_plain(part: Any) -> bool:
    """Whether a module is an unadapted linear layer or adds nothing but a low-rank product."""
    if type(part) is torch.nn.Linear:
        return True
    from peft.tuners.lora import Linear  # loaded by now: something has wrapped the layer

    if type(part) is not Linear or part.merged or part.fan_in_fan_out or PEFT_NAME in part.lora_variant:
        return False
    return PEFT_NAME not in part.lora_B or part.lora_B[PEFT_NAME].bias is None


def adapted(base: Product, pair: tuple[torch.Tensor, torch.Tensor] | None) -> Product:
    """A fused layer's product with an adapter's added to it."""
    if pair is None:
        return base
    down, up = pair

    def product(x: torch.Tensor) -> torch.Tensor:
        out = base(x)
        low = F.linear(x, down)
        out.view(-1, out.shape[-1]).addmm_(low.view(-1, low.shape[-1]), up)  # just made by ``base``: nobody else's
        return out

    return product
