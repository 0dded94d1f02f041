"""A lean loop over the layers of decoders of Llama's shape: what `interface` computes, with less between the products.

The weights, the tokenizer, the adapters and the rotary embedding stay transformers' and PEFT's own. One token through
transformers' own modules spends more time between the matrix products than in them (docs/decisions/0001). The loop is
held to `interface` when a decoder is loaded (`lloco_engine.decoder.probe`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lloco_engine.decoder.attention import Cache, attend, kernels
from lloco_engine.decoder.linear import FusedLinear
from lloco_engine.decoder.lora import LowRank, Product, adapted, read_adapter
from lloco_engine.decoder.memory import Memory
from lloco_engine.decoder.rules import PLAIN
from lloco_engine.decoder.runner import Attention, Runner, turns
from lloco_engine.decoder.slots import LayerSlots
from lloco_engine.shape import SHAPED, DecoderShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LeanRunner", "serves"]

_FEW = 256  # rows of a product up to which the packed weights are quicker than the plain ones (docs/decisions/0001)


def serves(config: Any) -> bool:
    """Whether a decoder of this configuration is of Llama's shape: no layer reads a window of what lies before."""
    if config.model_type not in SHAPED:
        return False
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    windowed = sliding and getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    return not windowed


class _Layer:
    """What the loop needs of one decoder layer, looked up once."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = FusedLinear(attention, ("q_proj", "k_proj", "v_proj"))
        self.o = FusedLinear(attention, ("o_proj",))
        self.gate_up = FusedLinear(mlp, ("gate_proj", "up_proj"))
        self.down = FusedLinear(mlp, ("down_proj",))
        self.activation = mlp.act_fn
        self.weight_in, self.weight_out = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.epsilon = float(layer.input_layernorm.variance_epsilon)
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.scale = float(attention.scaling)

    @property
    def fused(self) -> tuple[FusedLinear, FusedLinear, FusedLinear, FusedLinear]:
        """The products in the order in which they are taken."""
        return self.qkv, self.o, self.gate_up, self.down


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """``x`` over its root mean square, times ``weight``; on the CPU in few operations: a step has 61 of them."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return F.rms_norm(x, (x.shape[-1],), weight, epsilon)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * weight * torch.addcmul(_as_tensor(epsilon), length, length, value=1 / x.shape[-1]).rsqrt()


@cache
def _as_tensor(number: float) -> torch.Tensor:
    """A number as torch adds it to others without converting it each time; on the CPU, float32."""
    with torch.inference_mode(False):
        return torch.tensor(number, dtype=torch.float32, device="cpu")


def _in_bfloat16(product: Product) -> Product:
    """A product taken in bfloat16, its result in single precision."""

    def taken(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            made: torch.Tensor = product(x)
        return made.float()

    return taken


class LeanRunner(Runner):
    """See `Runner`.

    Args:
        model: a causal language model that `serves` says yes to, in eval mode, whose linear layers are plain.
    """

    replays = True
    bf16 = True

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.shape = DecoderShape.of(model.config)
        body: Any = model.model
        self.embed, self.norm, self.rotary, self.head = body.embed_tokens, body.norm, body.rotary_emb, model.lm_head
        self.layers = [_Layer(layer) for layer in body.layers]
        self.device, self.dtype = self.embed.weight.device, self.embed.weight.dtype
        self.scale, self.rules = self.layers[0].scale, (PLAIN,) * len(self.layers)
        self.adapter: str | None = None
        self._head = FusedLinear(model, ("lm_head",))
        self._fused = [product for layer in self.layers for product in layer.fused]
        self._low_rank: dict[str, LowRank | None] = {}
        self._made: dict[tuple[str | None, bool], list[Product]] = {}
        self._probe = torch.zeros(1, device=self.device, dtype=self.dtype)

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
        """See `Runner.forward`; the last layer is run to its end for the tokens that are wanted alone."""
        shape = self.shape
        rows, tokens = inputs.shape[:2]
        products = self._products(few=rows * tokens <= _FEW)
        if in_bf16 and torch.is_grad_enabled():
            products = list(map(_in_bfloat16, products))
        if positions.dim() == 1:
            positions = positions[None]
        cos, sin = self._rotary(positions)
        mask = cache.begin(tokens)

        def through(index: int, hidden: torch.Tensor) -> torch.Tensor:
            layer = self.layers[index]
            qkv_product, o_product, gate_up_product, down_product = products[4 * index : 4 * index + 4]
            x = _rms_norm(hidden, layer.weight_in, layer.epsilon)
            qkv = qkv_product(x).view(rows, tokens, -1, shape.head_dim)
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = qkv[:, :, : shape.query_heads], qkv[:, :, shape.query_heads : -shape.kv_heads]
                qk = torch.cat((layer.q_norm(q), layer.k_norm(k)), dim=2)
            else:
                qk = qkv[:, :, : -shape.kv_heads]
            qk = torch.addcmul(qk * cos, torch.roll(qk, shape.head_dim // 2, -1), sin).transpose(1, 2)
            q = qk[:, : shape.query_heads]
            keys, values = cache.append(index, qk[:, shape.query_heads :], qkv[:, :, -shape.kv_heads :].transpose(1, 2))
            slots = None if memory is None else memory.layer(index)
            hidden, read = self._read(index, hidden, q, keys, values, mask, slots, attention, wanted)
            hidden = hidden + o_product(read)
            x = _rms_norm(hidden, layer.weight_out, layer.epsilon)
            gate, up = torch.chunk(gate_up_product(x), 2, dim=-1)
            return hidden + down_product(layer.activation(gate) * up)

        hidden = inputs if inputs.is_floating_point() else self.embed(inputs)
        hidden = self._through_all(through, hidden, recompute)
        cache.end(tokens)
        return F.rms_norm(hidden, (shape.hidden,), self.norm.weight, self.norm.variance_epsilon)

    def _read(
        self,
        index: int,
        hidden: torch.Tensor,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        slots: LayerSlots | None,
        attention: Attention | None,
        wanted: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states that a layer goes on with and what its attention read for them: in the last, those wanted."""
        first = 0 if wanted is None or index < self.shape.layers - 1 else q.shape[2] - wanted
        if attention is not None:
            return hidden[:, first:], attention(index, q, keys, values)[:, first:]
        mask = None if mask is None else mask[:, :, first:]
        return hidden[:, first:], attend(q[:, :, first:], keys, values, mask, slots, self.scale)

    def _through_all(
        self, through: Callable[[int, torch.Tensor], torch.Tensor], hidden: torch.Tensor, recompute: bool
    ) -> torch.Tensor:
        """Hidden states after all layers, each of which ``through`` runs by its number."""

        def run(index: int, hidden: torch.Tensor) -> torch.Tensor:
            with kernels(self.device):  # here, so that it holds where a layer is run again too
                return through(index, hidden)

        for index in range(self.shape.layers):
            hidden = checkpoint(run, index, hidden, use_reentrant=False) if recompute else run(index, hidden)
        return hidden

    def _products(self, few: bool) -> list[Product]:
        """What multiplies by the fused layers' weights in this pass, in the order in which it is called."""
        name = self.adapter
        if torch.is_grad_enabled():
            return [layer.plain if name is None else layer.modules for layer in self._fused]
        if name is not None and not self._is_read(name):
            return [layer.modules for layer in self._fused]
        if (name, few) not in self._made:
            products: list[Product] = [layer.quick if few else layer.plain for layer in self._fused]
            if name is not None and (low_rank := self._low_rank[name]) is not None:
                products = list(map(adapted, products, low_rank.pairs))
            self._made[name, few] = products
        return self._made[name, few]

    def _is_read(self, name: str) -> bool:
        """Have an adapter's weights as they are now in ``_low_rank``; False where only PEFT's modules can run it."""
        low_rank = self._low_rank.get(name)
        if low_rank is None or not low_rank.current:
            low_rank = self._low_rank[name] = read_adapter(self._fused)
            for few in (True, False):
                self._made.pop((name, few), None)
        return low_rank is not None

    def linears(self) -> list[Any]:
        """See `Runner.linears`."""
        return [part for layer in self._fused for part in layer.parts]

    def low_rank(self, name: str | None) -> LowRank | None:
        """See `Runner.low_rank`."""
        return None if name is None else self._low_rank.get(name)

    def forget(self, name: str) -> None:
        """See `Runner.forget`."""
        self._low_rank.pop(name, None)
        for few in (True, False):
            self._made.pop((name, few), None)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Runner.logits`."""
        few = hidden.shape[:-1].numel() <= _FEW and not torch.is_grad_enabled()
        return (self._head.quick(hidden) if few else self.head(hidden)).float()

    def _rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (B, T, 1, D), as `turns` gives them."""
        cos, sin = turns(self.rotary, self._probe, positions)
        return cos[:, :, None], sin[:, :, None]
