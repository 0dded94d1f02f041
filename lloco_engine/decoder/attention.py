"""Attention over two kinds of keys at once: the compressed prefix (ragged, biased) and the live tokens (dense, causal).

Shapes: ``B`` rows, ``H`` KV heads, ``G`` query heads per KV head, ``T`` new tokens, ``S`` live tokens, ``D`` head dim.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lloco_engine.decoder.rules import PLAIN, Rules, attend_by
from lloco_engine.decoder.slots import LayerSlots

__all__ = ["Cache", "attend", "causal_mask", "kernels", "masked"]

_FEW = 16  # queries, those of a token's query heads: no more than that are read by plain products

_QUICK_TO_BEGIN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def kernels(device: torch.device) -> AbstractContextManager[None]:
    """What torch's own attention may use within: on CUDA all but cuDNN.

    That plans anew for every shape it is given, which takes it some tenths of a second; torch prefers it on Hopper and
    later. Hardly two prompts have one shape, and a layer's heads differ in length from the next one's.
    """
    made: AbstractContextManager[None] = sdpa_kernel(_QUICK_TO_BEGIN) if device.type == "cuda" else nullcontext()
    return made


class Cache:
    """Keys and values of the live tokens: template prefix, question and what was generated.

    Args:
        layers, rows, kv_heads, head_dim: sizes.
        capacity: live tokens per row that fit.
        pad: (B,) int64, unused places of each row from place ``pad_from`` on (rows of different lengths end
            together), or None.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        pad: torch.Tensor | None = None,
        pad_from: int = 0,
    ) -> None:
        size = (rows, kv_heads, capacity, head_dim)
        self.keys = [torch.empty(size, device=device, dtype=dtype) for _ in range(layers)]
        self.values = [torch.empty(size, device=device, dtype=dtype) for _ in range(layers)]
        self.length = 0
        self.capacity = capacity
        self.pad = pad
        self.pad_from = pad_from
        self._positions: torch.Tensor | None = None

    @cached_property
    def addresses(self) -> np.ndarray:
        """(layers, 4) int64 of the first row on the CPU: where a layer's keys and values begin, how many numbers lie
        between two of their heads, and room for one number more."""
        layers = zip(self.keys, self.values, strict=True)
        return np.array([[k.data_ptr(), v.data_ptr(), k.stride(1), 0] for k, v in layers], np.int64)

    def note(self, positions: torch.Tensor) -> torch.Tensor:
        """Keep the positions (B or 1, T) of the next tokens; returns those of all live tokens, (B, S)."""
        rows = len(self.keys[0])
        positions = positions.expand(rows, -1)
        before = positions[:, :0] if self._positions is None else self._positions[:, : self.length]
        self._positions = torch.cat((before, positions), dim=1)
        return self._positions

    def spread_from(self, read: Cache) -> None:
        """Hold in every row what the one row of ``read``, which is no longer than this, does."""
        for mine, its in zip((*self.keys, *self.values), (*read.keys, *read.values), strict=True):
            mine[:, :, : read.length] = its[:, :, : read.length]
        self.length = read.length
        if read._positions is not None:
            self._positions = read._positions.expand(len(self.keys[0]), -1)

    def begin(self, tokens: int) -> torch.Tensor | None:
        """The mask of the next ``tokens``: additive (B or 1, 1, T, S), or None when plain causality says it all."""
        past = self.length
        if past + tokens > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, not {past + tokens}")
        if self.pad is None and (tokens == 1 or past == 0):
            return None
        device, dtype = self.keys[0].device, self.keys[0].dtype
        mask = causal_mask(tokens, past + tokens, device, dtype)
        if self.pad is not None:
            unused = self.unused(self.pad, torch.arange(past + tokens, device=device))
            # a finite minimum, so that a row of nothing but padding gives no NaN
            mask = mask.masked_fill(unused[:, None, None], torch.finfo(dtype).min)
        return mask

    def unused(self, pad: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """(B, S) bool: which of the places (S,) are padding, by rows' ``pad`` (B,)."""
        from_start = places - self.pad_from
        return (from_start >= 0) & (from_start < pad[:, None])

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add (B, H, T, D) of one layer; returns all live keys and values (B, H, S, D)."""
        start, end = self.length, self.length + keys.shape[2]
        if torch.is_grad_enabled() and keys.requires_grad:  # writing into the buffer would lose the graph
            return (
                torch.cat((self.keys[layer][:, :, :start], keys), dim=2),
                torch.cat((self.values[layer][:, :, :start], values), dim=2),
            )
        self.keys[layer][:, :, start:end] = keys
        self.values[layer][:, :, start:end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def reorder(self, origins: torch.Tensor, begin: int) -> None:
        """Give each row what the row ``origins`` (B,) has from place ``begin`` on; before it all rows are the same."""
        here = slice(begin, self.length)
        for held in (*self.keys, *self.values):
            held[:, :, here] = held[:, :, here].index_select(0, origins)

    def end(self, tokens: int) -> None:
        """All layers have appended."""
        self.length += tokens


def causal_mask(tokens: int, live: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask (1, 1, T, S) of the last T of S tokens: each sees what lies before it and itself."""
    later = torch.arange(live, device=device) > torch.arange(live - tokens, live, device=device)[:, None]
    return torch.zeros(later.shape, device=device, dtype=dtype).masked_fill_(later, torch.finfo(dtype).min)[None, None]


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    slots: LayerSlots | None,
    scale: float,
    rules: Rules = PLAIN,
    at: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Softmax attention of the new tokens over the prefix's slots and the live tokens together.

    Args:
        q: (B, H*G, T, D); keys, values: (B, H, S, D); mask: additive (B or 1, 1, T, S) or None.
        slots: the prefix's slots in this layer, or None.
        scale: factor of the logits.
        rules: of the layer; its sinks are of the H*G query heads.
        at: positions of the new tokens (B or 1, T) and of the live ones (B or 1, S), where the layer has a window.

    Returns:
        (B, T, H*G*D), ready for the output projection.
    """
    tokens = q.shape[2]
    if not rules.plain:
        return _attend_by(rules, q, keys, values, mask, slots, scale, at)
    if slots is None and mask is not None and q.device.type == "cuda":
        return _grouped(q, keys, values, mask, scale).transpose(1, 2).flatten(2)
    if slots is None:
        causal = mask is None and tokens > 1
        read = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
        )
        return read.transpose(1, 2).flatten(2)
    if mask is None and tokens > 1:
        mask = causal_mask(tokens, tokens, q.device, q.dtype)
    return slots.attend(q, keys, values, mask, scale)


def _attend_by(
    rules: Rules,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    slots: LayerSlots | None,
    scale: float,
    at: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """As `attend`, by rules."""
    (rows, query_heads, tokens, dim), (heads, live) = q.shape, keys.shape[1:3]
    if mask is None:
        mask = causal_mask(tokens, live, q.device, q.dtype)
    if rules.sees is not None:
        if at is None:
            raise ValueError("a layer with a window must be told the positions of its tokens")
        hidden = rules.hidden(at[0][:, None, :, None], at[1][:, None, None])
        if hidden is not None:
            mask = mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
    if slots is not None:
        return slots.attend(q, keys, values, mask, scale, rules, None if at is None else at[0])
    q = q.reshape(rows, heads, -1, dim)
    read = attend_by(rules, q, keys, values, mask.repeat(1, 1, query_heads // heads, 1), scale)
    return read.view(rows, query_heads, tokens, dim).transpose(1, 2).flatten(2)


def _grouped(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of (B, H*G, T, D) over (B, H, S, D) with a mask, for a kernel that knows no groups.

    Torch would give groups with a mask to its plain products, which hold all T * S weights of every head.
    """
    rows, query_heads, tokens, dim = q.shape
    heads = keys.shape[1]
    if tokens == 1:  # the query heads of one KV head read the same
        return masked(q.reshape(rows, heads, -1, dim), keys, values, mask, scale).reshape(q.shape)
    keys, values = (part.repeat_interleave(query_heads // heads, 1) for part in (keys, values))
    return masked(q, keys, values, mask, scale)


def masked(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, added: torch.Tensor, scale: float
) -> torch.Tensor:
    """Softmax attention of (B, H, M, D) over (B, H, S, D) with ``added`` (B or 1, H or 1, M or 1, S) to the logits.

    A few queries on a GPU are read by plain products. Of torch's own kernels only the memory-efficient one takes a mask
    there (see `kernels`), and it took eleven times as long over 6,200 keys (docs/decisions/0011-gpu.md).
    """
    if q.device.type == "cuda" and q.shape[2] <= _FEW and not torch.is_grad_enabled():
        return _by_products(q, keys, values, added, scale)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=added, scale=scale)


def _by_products(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, added: torch.Tensor, scale: float
) -> torch.Tensor:
    """As `masked`; all M * S weights of every head are held at once."""
    logits = torch.matmul(q, keys.transpose(-1, -2)).float() * scale + added
    return torch.matmul(torch.softmax(logits, dim=-1).to(values.dtype), values)
