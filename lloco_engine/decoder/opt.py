"""The forward pass of the OPT family, and which runner a family has.

OPT (Zhang et al. 2022, arXiv 2205.01068) adds learned position embeddings to its input, where the other families turn
queries and keys. Its published AutoCompressors give summary vectors no position of their own.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from lloco_engine.decoder.attention import Cache
from lloco_engine.decoder.linear import FusedLinear, check_linear
from lloco_engine.decoder.memory import Memory
from lloco_engine.decoder.runner import Attention, Runner, in_bfloat16
from lloco_engine.errors import ConfigError
from lloco_engine.shape import DecoderShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["OptRunner", "runner_of"]


class _Linear:
    """A linear layer by its own weights, or through the module that PEFT has put in its place."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name
        check_linear(name, getattr(owner, name))
        self.weight, self.bias = getattr(owner, name).weight, getattr(owner, name).bias

    def __call__(self, x: torch.Tensor, adapted: bool) -> torch.Tensor:
        return getattr(self.owner, self.name)(x) if adapted else F.linear(x, self.weight, self.bias)


class _Layer:
    """What the loop needs of one decoder layer, looked up once."""

    def __init__(self, layer: Any) -> None:
        self.q, self.k, self.v, self.o = (
            _Linear(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj", "out_proj")
        )
        self.up, self.down = _Linear(layer, "fc1"), _Linear(layer, "fc2")
        self.activation = layer.activation_fn
        self.norm_attention, self.norm_mlp = layer.self_attn_layer_norm, layer.final_layer_norm
        self.norm_first = bool(layer.do_layer_norm_before)
        self.parts = (self.q, self.k, self.v, self.o, self.up, self.down)


class OptRunner(Runner):
    """Runs an OPT model as `Runner` does the other families. A negative position is none: the embedding of padding.

    Args:
        model: a causal language model of the OPT family, in eval mode.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.shape = DecoderShape.of(model.config)
        body: Any = model.model.decoder
        self.body = body
        self.embed, self.head = body.embed_tokens, model.lm_head
        self.blocks = [_Layer(layer) for layer in body.layers]
        self.device, self.dtype = self.embed.weight.device, self.embed.weight.dtype
        self.scale = self.shape.head_dim**-0.5
        self.adapter = None
        self._low_rank, self._made = {}, {}
        self._head = FusedLinear(model, ("lm_head",))

    def forward(
        self,
        inputs: torch.Tensor,
        positions: torch.Tensor,
        cache: Cache,
        memory: Memory | None = None,
        attention: Attention | None = None,
        *,
        wanted: int | None = None,
        recompute: bool = False,
        in_bf16: bool = False,
    ) -> torch.Tensor:
        """One pass, as `Runner.forward`; returns (B, T, E) states after the final norm and the output projection."""
        shape, adapted, body = self.shape, self.adapter is not None, self.body
        rows, tokens = inputs.shape[:2]
        mask = cache.begin(tokens)
        halved = in_bf16 and torch.is_grad_enabled()

        def run(part: _Linear, x: torch.Tensor) -> torch.Tensor:
            return in_bfloat16(partial(part, adapted=adapted))(x) if halved else part(x, adapted)

        def through(index: int, hidden: torch.Tensor) -> torch.Tensor:
            layer = self.blocks[index]
            x = layer.norm_attention(hidden) if layer.norm_first else hidden
            q, k, v = (
                run(part, x).view(rows, tokens, -1, shape.head_dim).transpose(1, 2)
                for part in (layer.q, layer.k, layer.v)
            )
            keys, values = cache.append(index, k, v)
            slots = None if memory is None else memory.layer(index)
            hidden, read = self._read(index, hidden, q, keys, values, mask, slots, attention, wanted)
            hidden = hidden + run(layer.o, read)
            hidden = hidden if layer.norm_first else layer.norm_attention(hidden)
            x = layer.norm_mlp(hidden) if layer.norm_first else hidden
            hidden = hidden + run(layer.down, layer.activation(run(layer.up, x)))
            return hidden if layer.norm_first else layer.norm_mlp(hidden)

        hidden = inputs if inputs.is_floating_point() else self.embed(inputs)
        if body.project_in is not None:
            hidden = body.project_in(hidden)
        # The table begins with two rows more than there are positions; the second of them is that of padding.
        hidden = hidden + F.embedding(positions.clamp_min(-1) + 2, body.embed_positions.weight)
        hidden = self._through_all(through, hidden, recompute)
        cache.end(tokens)
        if body.final_layer_norm is not None:
            hidden = body.final_layer_norm(hidden)
        return hidden if body.project_out is None else body.project_out(hidden)

    def linears(self) -> list[Any]:
        """As of `Runner`."""
        parts = (part for layer in self.blocks for part in layer.parts)
        return [getattr(part.owner, part.name) for part in parts]

    def rotate(self, keys: torch.Tensor, offset: int) -> torch.Tensor:
        """Not for this family: its keys cannot be moved.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("placement must be 'parallel' with an OPT decoder, whose positions are learned")


def runner_of(model: PreTrainedModel) -> Runner:
    """The runner for a model's family.

    Raises:
        UnsupportedModel: the family is not one that the engine can run.
    """
    return (OptRunner if model.config.model_type == "opt" else Runner)(model)
