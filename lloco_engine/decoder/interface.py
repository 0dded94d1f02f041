"""Any decoder: an unmodified transformers model, whose attention is a function of ours that is registered by name.

transformers hands that function queries, keys and values after rotary embedding and norms, the factor of the logits,
softcap and sinks; what comes before and after (experts, multipliers, norms, quantised weights, PEFT's modules) is its
own. Compressors read there, and slots join the softmax there as one more block of logits.

A model's masks are made by a function that is registered too. It makes none: it hands on what the model says may be
read of which position, which is then asked of the positions of slots and of live tokens alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from lloco_engine.decoder.attention import Cache, attend, kernels
from lloco_engine.decoder.linear import pack
from lloco_engine.decoder.memory import Memory
from lloco_engine.decoder.rules import Rules, attend_by
from lloco_engine.decoder.runner import Attention, Runner
from lloco_engine.errors import UnsupportedModel
from lloco_engine.shape import DecoderShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["NAME", "Asked", "InterfaceRunner", "Sight", "reading"]

NAME = "lloco"  # of our attention among transformers'
_REFUSED = ("position_bias", "indices", "block_indices", "sinks")  # what attention may be asked with, and ours ignores


class Sight:
    """What a model says may be read: ``(positions of queries, positions of keys) -> bool``, as `rules.Sees`.

    Args:
        function: transformers' own, of (row, head, place of a query, place of a key).
    """

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self._function = function

    def __call__(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        first = torch.zeros((), dtype=torch.int64, device=queries.device)
        return self._function(first, first, queries, keys)

    def __getitem__(self, part: tuple[slice, ...]) -> Sight:
        """All of it, as some families take of a mask when they keep all tokens."""
        if all(isinstance(one, slice) and not one.start and one.stop is None and one.step is None for one in part):
            return self
        raise TypeError("what may be read of a position has no parts")


@dataclass(frozen=True, eq=False)
class Asked:
    """What a layer asks of its attention.

    q : (B, query heads, T, D). k : (B, KV heads, T, D), v : (B, KV heads, T, V) of these tokens alone
    scale, softcap, sinks : see `Rules`. sight : what the model handed on as a mask
    """

    layer: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    softcap: float | None
    sinks: torch.Tensor | None
    sight: Any


Reads = Callable[[Asked], torch.Tensor]  # -> (B, T, query heads, V)
_READS: ContextVar[Reads | None] = ContextVar("lloco_reads", default=None)


@contextmanager
def reading(reads: Reads) -> Iterator[None]:
    """Have ``reads`` answer all attention of this thread within."""
    token = _READS.set(reads)
    try:
        yield
    finally:
        _READS.reset(token)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers asks for it."""
    if foreign := [name for name in _REFUSED if others.get(name) is not None]:
        raise UnsupportedModel(f"its attention is asked with {', '.join(foreign)}, which slots know nothing of")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    asked = Asked(module.layer_idx, query, key, value, scale, softcap or None, s_aux, attention_mask)
    return (_READS.get() or _as_ever)(asked), None


def _as_ever(asked: Asked) -> torch.Tensor:
    """Attention where nothing of ours is read: the model is being used by itself."""
    rows, query_heads, tokens, dim = asked.q.shape
    heads = asked.k.shape[1]
    rules = Rules(asked.softcap, asked.sinks)
    seen = asked.sight if isinstance(asked.sight, torch.Tensor) else asked.q.new_ones(1, 1, 1, 1, dtype=torch.bool)
    added = torch.zeros(seen.shape, dtype=asked.q.dtype, device=seen.device)
    added = added.masked_fill(~seen, torch.finfo(asked.q.dtype).min) if seen.dtype == torch.bool else seen
    added = added.expand(-1, -1, tokens, -1).repeat(1, 1, query_heads // heads, 1)
    read = attend_by(rules, asked.q.reshape(rows, heads, -1, dim), asked.k, asked.v, added, asked.scale)
    return read.view(rows, query_heads, tokens, -1).transpose(1, 2).contiguous()


def _mask(**given: Any) -> Any:
    """What a model makes its masks with: see `Sight`."""
    if _READS.get() is None:
        return sdpa_mask(**given | {"allow_is_causal_skip": False})
    return Sight(given["mask_function"])


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


class _Past(DynamicCache):
    """What a model is told of the tokens before: how many they are. Their keys are none of its business."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return self._length

    def get_query_offset(self, *_: Any, **__: Any) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int, *_: Any, **__: Any) -> tuple[int, int]:
        return self._length + query_length, 0


class _Output(BaseModelOutputWithPast):
    """A body's output of which all else is None that a head may look for, such as what routers say."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _Through(torch.nn.Module):
    """Stands for a model's body where its output is known: gives back the embeddings it is given."""

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> _Output:
        return _Output(last_hidden_state=inputs_embeds)


class InterfaceRunner(Runner):
    """See `Runner`. The probe (`lloco_engine.decoder.probe`) sets ``scale`` and ``rules``.

    Args:
        model: a causal language model in eval mode.

    Raises:
        UnsupportedModel: transformers cannot replace its attention.
    """

    replays = False  # experts, and layers with windows, take other operations at every step
    bf16 = False  # experts are chosen by small differences

    def __init__(self, model: PreTrainedModel) -> None:
        if any(type(part).__module__.startswith("peft.") for part in model.modules()):
            raise UnsupportedModel("it has an adapter in it: load the decoder alone, and adapters with load_adapter")
        self.model = model
        self.shape = DecoderShape.of(model.config)
        body: Any = _body(model)
        self.body, self.embed = body, model.get_input_embeddings()
        self.device, self.dtype = self.embed.weight.device, self.embed.weight.dtype
        self.adapter = None
        self.scale, self.rules = 1.0, (Rules(),) * self.shape.layers
        lists = [part for part in body.modules() if isinstance(part, torch.nn.ModuleList)]
        self.layers: Any = next((part for part in lists if len(part) == self.shape.layers), None)
        if self.layers is None:
            raise UnsupportedModel(f"it must be a list of {self.shape.layers} layers, and {type(body).__name__} is not")
        replace_attention(model, NAME)
        self._head = _with_body(model, body, _Through())

    def pack(self) -> None:
        """Have products of few rows read weights in half precision, where that is as good (see `linear.pack`)."""
        pack(self.model)

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
        """See `Runner.forward`."""
        rows, tokens = inputs.shape[:2]
        positions = positions.expand(rows, -1) if positions.dim() == 2 else positions[None].expand(rows, -1)
        if not self.shape.rotary:
            positions = positions.clamp_min(-1)
        mask = cache.begin(tokens)
        windowed = any(rules.sees is not None for rules in self.rules)
        at = (positions, cache.note(positions)) if windowed else None

        def reads(asked: Asked) -> torch.Tensor:
            with torch.autocast(self.device.type, enabled=False):
                return self._read(asked, cache, mask, at, memory, attention)

        hidden = self.run(inputs, positions, cache.length, reads, recompute, in_bf16 and torch.is_grad_enabled())
        cache.end(tokens)
        return hidden if wanted is None else hidden[:, tokens - wanted :]

    def run(
        self,
        inputs: torch.Tensor,
        positions: torch.Tensor,
        past: int,
        reads: Reads,
        recompute: bool = False,
        in_bf16: bool = False,
    ) -> torch.Tensor:
        """Hidden states (B, T, E) of the model's body, its attention answered by ``reads``."""
        given = {"inputs_embeds" if inputs.is_floating_point() else "input_ids": inputs}
        bf16 = torch.autocast(self.device.type, torch.bfloat16, enabled=in_bf16 or torch.is_autocast_enabled())
        with bf16, reading(reads), kernels(self.device), self._recomputed(reads, recompute):
            made = self.body(**given, position_ids=positions, past_key_values=_Past(past), use_cache=True)
        hidden: torch.Tensor = made.last_hidden_state
        return hidden

    def _read(
        self,
        asked: Asked,
        cache: Cache,
        mask: torch.Tensor | None,
        at: tuple[torch.Tensor, torch.Tensor] | None,
        memory: Memory | None,
        attention: Attention | None,
    ) -> torch.Tensor:
        """Attention of one layer over slots and live tokens, to which its own are added."""
        layer, rules, (rows, heads, tokens, _) = asked.layer, self.rules[asked.layer], asked.q.shape
        q = asked.q if asked.scale == self.scale else asked.q * (asked.scale / self.scale)
        q, k, v = (self.filled(part.to(self.dtype)) for part in (q, asked.k, asked.v))
        keys, values = cache.append(layer, k, v)
        if attention is not None:
            read = attention(layer, q, keys, values)
        else:
            slots = None if memory is None else memory.layer(layer, rules.plain)
            read = attend(q, keys, values, mask, slots, self.scale, rules, at)
        return read.view(rows, tokens, heads, -1)[..., : asked.v.shape[-1]].to(asked.q.dtype)

    def filled(self, part: torch.Tensor) -> torch.Tensor:
        """(..., D) of a layer filled up with zeros to the head size of the largest."""
        less = self.shape.head_dim - part.shape[-1]
        return F.pad(part, (0, less)) if less else part

    @contextmanager
    def _recomputed(self, reads: Reads, recompute: bool) -> Iterator[None]:
        """Have each layer keep for the gradients what goes into it alone, where asked for."""
        if not recompute:
            yield
            return

        def again(forward: Callable[..., Any], *given: Any, **more: Any) -> Any:
            with reading(reads), kernels(self.device):  # gradients are taken when this pass is over
                return forward(*given, **more)

        for layer in self.layers:
            layer.forward = partial(checkpoint, partial(again, layer.forward), use_reentrant=False)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Runner.logits`; through the model's own head, with what it does to logits."""
        with kernels(self.device):
            made = self._head(inputs_embeds=hidden.reshape(1, -1, hidden.shape[-1]), use_cache=False).logits
        logits: torch.Tensor = made.float().view(*hidden.shape[:-1], -1)
        return logits

    def linears(self) -> list[Any]:
        """See `Runner.linears`."""
        return [part for part in self.layers.modules() if isinstance(part, torch.nn.Linear)]


def _body(model: Any) -> Any:
    """What makes hidden states of tokens, inside a model with a head."""
    from transformers import PreTrainedModel

    body = model.get_decoder()
    if body is model:  # transformers looks for the name that a family's other models have it under
        body = next((part for part in model.children() if isinstance(part, PreTrainedModel)), model)
    if body is model:
        raise UnsupportedModel(f"it must be layers with a head, and {type(model).__name__} is not")
    return body


def replace_attention(model: Any, name: str) -> None:
    """Have a model use the attention that transformers knows by ``name``.

    Raises:
        UnsupportedModel: the model computes it itself.
    """
    from lloco_engine.pretrained import quiet

    with quiet():
        try:
            model.set_attn_implementation(name)
        except (ValueError, ImportError) as error:
            raise UnsupportedModel(f"its attention cannot be replaced: {error}") from error
    if model.config.get_text_config()._attn_implementation != name:
        raise UnsupportedModel(
            f"its attention cannot be replaced: transformers' {type(model).__name__} computes it itself, not by "
            "AttentionInterface"
        )


def _with_body(model: Any, body: Any, other: torch.nn.Module) -> Any:
    """The model with ``other`` in its body's place: all other modules are the model's own."""
    place = next(name for name, module in model.named_modules() if module is body)
    made = held = _copied(model)
    *outer, last = place.split(".")
    for name in outer:
        held._modules[name] = _copied(held._modules[name])
        held = held._modules[name]
    held._modules[last] = other
    return made


def _copied(module: Any) -> Any:
    made = copy.copy(module)
    made.__dict__["_modules"] = dict(module._modules)
    return made
