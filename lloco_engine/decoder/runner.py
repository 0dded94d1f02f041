"""The decoder's forward pass: one lean loop over the layers of a Hugging Face causal language model.

The weights, the tokenizer, the adapters and the rotary embedding stay transformers' and PEFT's own. The loop exists
because a prefix of ragged, biased slots does not fit transformers' caches, and because one token through
transformers' own modules spends more time between the matrix products than in them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from lloco_engine.decoder.attention import Cache, attend
from lloco_engine.decoder.memory import Memory
from lloco_engine.decoder.shape import DecoderShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Attention", "Runner"]

# (layer, queries (B, query heads, T, D), keys (B, KV heads, S, D), values) -> (B, T, query heads * D)
Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class _Fused:
    """Linear layers that read the same input, as one matrix product.

    The parts' own weights become views of the joined one, so nothing is stored twice and the modules go on working.
    """

    def __init__(self, owner: Any, names: tuple[str, ...]) -> None:
        self.owner, self.names = owner, names
        parts = [getattr(owner, name) for name in names]
        with torch.no_grad():
            self.weight = torch.cat([part.weight for part in parts])
            self.bias = torch.cat([part.bias for part in parts]) if parts[0].bias is not None else None
            start = 0
            for part in parts:
                end = start + part.weight.shape[0]
                part.weight.data = self.weight[start:end]
                if self.bias is not None:
                    part.bias.data = self.bias[start:end]
                start = end

    def __call__(self, x: torch.Tensor, adapted: bool) -> torch.Tensor:
        if adapted:  # PEFT has put its own modules under the owner's names
            return torch.cat([getattr(self.owner, name)(x) for name in self.names], dim=-1)
        return F.linear(x, self.weight, self.bias)


class _Layer:
    """What the loop needs of one decoder layer, looked up once."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = _Fused(attention, ("q_proj", "k_proj", "v_proj"))
        self.o = _Fused(attention, ("o_proj",))
        self.gate_up = _Fused(mlp, ("gate_proj", "up_proj"))
        self.down = _Fused(mlp, ("down_proj",))
        self.activation = mlp.act_fn
        self.norm_in, self.norm_out = layer.input_layernorm, layer.post_attention_layernorm
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.scale = float(attention.scaling)


class Runner:
    """Runs token ids through the model, reading a compressed prefix and a cache of live tokens.

    Args:
        model: a causal language model of the Llama, Mistral, Qwen2 or Qwen3 family, in eval mode.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.shape = DecoderShape.of(model.config)
        body: Any = model.model
        self.embed, self.norm, self.rotary, self.head = body.embed_tokens, body.norm, body.rotary_emb, model.lm_head
        self.layers = [_Layer(layer) for layer in body.layers]
        self.device, self.dtype = self.embed.weight.device, self.embed.weight.dtype
        self.scale = self.layers[0].scale  # of the attention logits
        self.adapted = False  # True: go through the modules, where PEFT has put the adapter
        self._probe = torch.zeros(1, device=self.device, dtype=self.dtype)

    def forward(
        self,
        inputs: torch.Tensor,
        positions: torch.Tensor,
        cache: Cache,
        memory: Memory | None = None,
        attention: Attention | None = None,
    ) -> torch.Tensor:
        """One pass; the new keys and values are appended to ``cache``.

        Args:
            inputs: (B, T) int64 token ids, or (B, T, E) input embeddings.
            positions: (T,) or (B, T) int64 rotary positions.
            cache: live keys and values before these tokens, of the same B.
            memory: compressed prefix that every token attends to, or None.
            attention: what reads the live keys and values in place of `attend`; it sees to causality itself.

        Returns:
            (B, T, hidden) hidden states after the final norm.
        """
        shape, adapted = self.shape, self.adapted
        rows, tokens = inputs.shape[:2]
        if positions.dim() == 1:
            positions = positions[None]
        cos, sin = self._rotary(positions)
        mask = cache.begin(tokens)
        hidden = inputs if inputs.is_floating_point() else self.embed(inputs)
        for index, layer in enumerate(self.layers):
            x = F.rms_norm(hidden, (shape.hidden,), layer.norm_in.weight, layer.norm_in.variance_epsilon)
            qkv = layer.qkv(x, adapted).view(rows, tokens, -1, shape.head_dim)
            q, k = qkv[:, :, : shape.query_heads], qkv[:, :, shape.query_heads : -shape.kv_heads]
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = layer.q_norm(q), layer.k_norm(k)
                qk = torch.cat((q, k), dim=2)
            else:
                qk = qkv[:, :, : -shape.kv_heads]
            qk = torch.addcmul(qk * cos, torch.roll(qk, shape.head_dim // 2, -1), sin).transpose(1, 2)
            q = qk[:, : shape.query_heads]
            keys, values = cache.append(index, qk[:, shape.query_heads :], qkv[:, :, -shape.kv_heads :].transpose(1, 2))
            if attention is not None:
                read = attention(index, q, keys, values)
            else:
                read = attend(q, keys, values, mask, None if memory is None else memory.layer(index), layer.scale)
            hidden = hidden + layer.o(read, adapted)
            x = F.rms_norm(hidden, (shape.hidden,), layer.norm_out.weight, layer.norm_out.variance_epsilon)
            gate, up = torch.chunk(layer.gate_up(x, adapted), 2, dim=-1)
            hidden = hidden + layer.down(layer.activation(gate) * up, adapted)
        cache.end(tokens)
        return F.rms_norm(hidden, (shape.hidden,), self.norm.weight, self.norm.variance_epsilon)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits (..., vocabulary) in float32 from hidden states (..., hidden)."""
        return self.head(hidden).float()  # type: ignore[no-any-return]

    def rotate(self, keys: torch.Tensor, offset: int) -> torch.Tensor:
        """Keys (N, D) moved ``offset`` positions on, as if the rotary embedding had been applied there."""
        position = torch.tensor([[offset]], device=self.device)
        cos, sin = (part[0, 0] / self.rotary.attention_scaling for part in self._rotary(position))
        keys = keys.to(self.device, torch.float32)
        return torch.addcmul(keys * cos.float(), torch.roll(keys, self.shape.head_dim // 2, -1), sin.float())

    def _rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (B, T, 1, D); the rotation's sign is folded into sin, so that a roll replaces rotate-half."""
        cos, sin = self.rotary(self._probe, positions)
        half = self.shape.head_dim // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        return cos[:, :, None], sin[:, :, None]
