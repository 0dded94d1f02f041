"""Which runner serves a decoder: found out by running it on a few tokens when it is loaded, and not by its name.

Each layer must ask for attention once, and what it asks with says its rules. Then the model is run with its own
attention, with ours, and with ours where the first part is slots: all must give the same logits.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lloco_engine.decoder.attention import Cache
from lloco_engine.decoder.interface import NAME, Asked, InterfaceRunner, Sight, replace_attention
from lloco_engine.decoder.lean import LeanRunner, serves
from lloco_engine.decoder.linear import is_plain
from lloco_engine.decoder.memory import Memory
from lloco_engine.decoder.rules import Rules, Sees, attend_by
from lloco_engine.decoder.runner import Runner
from lloco_engine.errors import UnsupportedModel
from lloco_engine.types import Prefix, Segment

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["runner_of"]

_log = logging.getLogger(__name__)
_TOKENS = 64
# how far logits may be apart, relative to how far they spread, at the median token: experts may be chosen otherwise
_NEAR, _NEAR_IN_HALF = 1e-3, 0.1


@torch.no_grad()
def runner_of(model: PreTrainedModel) -> Runner:
    """The runner for a model: the lean loop where it gives what the model does, else the model itself.

    Raises:
        UnsupportedModel: segments cannot be read by this decoder; says why in one sentence.
    """
    kind = model.config.model_type
    own = model.config.get_text_config()._attn_implementation
    try:
        if serves(model.config) and (lean := _lean(model, own)) is not None:
            return lean
        runner = InterfaceRunner(model)
        ids = _some_ids(runner)
        replace_attention(model, own)
        expected = model(ids, use_cache=False).logits[0].float()
        replace_attention(model, NAME)
        _probe(runner, ids, expected)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"a decoder of {kind!r} cannot be run: {error}") from error
    except Exception as error:  # a model's own code raises many kinds where it is used otherwise than it expects
        raise UnsupportedModel(
            f"a decoder of {kind!r} cannot be run: its code fails where its attention is replaced ({error})"
        ) from error
    runner.pack()
    return runner


def _lean(model: Any, own: str) -> LeanRunner | None:
    """The loop for decoders of Llama's shape, where it gives what the model does through the interface."""
    runner = InterfaceRunner(model)
    if not all(map(is_plain, runner.linears())):
        return None
    lean = LeanRunner(model)
    ids = _some_ids(runner)
    asked = _ask(runner, ids)
    _set_rules(runner, asked)
    found, expected = (_logits(one, ids) for one in (lean, runner))
    replace_attention(model, own)
    if (apart := _apart(found, expected)) <= _near(runner):
        return lean
    _log.warning(
        "this decoder runs as transformers runs it, and not by the loop for decoders of Llama's shape, which gives "
        "other logits: they are %.2g of their spread apart",
        apart,
    )
    return None


def _probe(runner: InterfaceRunner, ids: torch.Tensor, expected: torch.Tensor) -> None:
    """Set the runner's scale and rules.

    Raises:
        UnsupportedModel: it does not give the model's own logits ``expected`` (T, vocabulary) for ``ids`` (1, T).
    """
    asked = _ask(runner, ids)
    _set_rules(runner, asked)
    near = _near(runner)
    if (apart := _apart(_logits(runner, ids), expected)) > near:
        raise UnsupportedModel(
            f"with its attention replaced it gives other logits ({apart:.2g} of "
            f"their spread apart, where {near:g} is allowed), so it computes more from what it read than attention does"
        )
    many = ids.shape[1] * 5 // 8
    memory = Memory([_slots(runner, asked, many)], runner.device, runner.dtype, runner.rotate)
    memory.kernel = None  # not to be compiled for this
    if (apart := _apart(_logits(runner, ids, memory, many), expected[many:])) > near:
        raise UnsupportedModel(
            f"where the first {many} of {ids.shape[1]} tokens are read as slots it gives other logits ({apart:.2g} of "
            f"their spread apart, where {near:g} is allowed), so keys and values are not all that its layers keep of "
            "what they have read"
        )


def _near(runner: Runner) -> float:
    return _NEAR if runner.dtype == torch.float32 else _NEAR_IN_HALF


def _some_ids(runner: Runner) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    count = min(_TOKENS, runner.shape.window)
    return torch.randint(runner.shape.vocabulary, (1, count), generator=generator).to(runner.device)


def _ask(runner: InterfaceRunner, ids: torch.Tensor) -> Sequence[Asked]:
    """What each layer asks of its attention in one pass.

    Raises:
        UnsupportedModel: a layer does not ask, or asks for what there is none of.
    """
    asked: list[Asked] = []

    def note(one: Asked) -> torch.Tensor:
        asked.append(one)
        (rows, heads, tokens, dim), places = one.q.shape, torch.arange(one.q.shape[2], device=one.q.device)
        if not isinstance(one.sight, Sight | None):
            raise UnsupportedModel("its masks are its own, and say nothing of the positions of slots")
        sees = causal if one.sight is None else one.sight
        hidden = ~sees(places[:, None], places[None]).repeat(heads // one.k.shape[1], 1)
        added = torch.zeros(hidden.shape, dtype=one.q.dtype, device=one.q.device)
        added = added.masked_fill(hidden, torch.finfo(added.dtype).min)[None, None]
        q = one.q.reshape(rows, one.k.shape[1], -1, dim)
        read = attend_by(Rules(one.softcap, one.sinks), q, one.k, one.v, added, one.scale)
        return read.view(rows, heads, tokens, -1).transpose(1, 2).contiguous()

    runner.run(ids, torch.arange(ids.shape[1], device=ids.device)[None], 0, note)
    found = [one.layer for one in asked]
    if len(set(found)) < runner.shape.layers:
        raise UnsupportedModel(
            f"each of its {runner.shape.layers} layers must ask for attention, and {sorted(set(found))} did: what the "
            "others keep of what they have read is a state that moves on with every token, and no keys and values that "
            "segments could hold"
        )
    if found != sorted(set(found)):
        raise UnsupportedModel(f"each layer must ask for attention once, in order, and they did in the order {found}")
    return asked


def causal(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Every key up to the query's own position, as `lloco_engine.decoder.rules.Sees`."""
    return keys <= queries


def _set_rules(runner: InterfaceRunner, asked: Sequence[Asked]) -> None:
    """Have the runner know its scale and rules by what each layer asked.

    Raises:
        UnsupportedModel: layers differ in what they must not; or a token reads those after it.
    """
    shape = runner.shape
    heads = {(one.q.shape[1], one.k.shape[1]) for one in asked}
    if heads != {(shape.query_heads, shape.kv_heads)}:
        raise UnsupportedModel(
            f"all layers must have the {shape.query_heads} query heads and "
            f"{shape.kv_heads} KV heads that config.json says, not {', '.join(map(str, sorted(heads)))}"
        )
    size = max(max(one.k.shape[-1], one.v.shape[-1]) for one in asked)
    if size != shape.head_dim:
        raise UnsupportedModel(
            f"its largest head must have the {shape.head_dim} numbers that config.json says, not {size}"
        )
    if len(caps := {one.softcap for one in asked}) > 1:
        raise UnsupportedModel(f"its layers have several softcaps, {caps}")
    runner.scale = asked[0].scale
    runner.rules = [Rules(one.softcap, one.sinks, _window_of(one, shape.window)) for one in asked]


def _window_of(asked: Asked, window: int) -> Sees | None:
    """Which positions the layer reads, where these are not all up to a token's own."""
    sees = asked.sight
    if sees is None:
        return None
    last, device = torch.tensor(window - 1, device=asked.q.device), asked.q.device
    places = torch.tensor(sorted({0, window // 2, window - 1}), device=device)
    if bool(sees(last - 1, last)):
        raise UnsupportedModel("its tokens read those that come after them, which are not there yet when it answers")
    return None if bool(sees(last, places).all()) else sees


def _slots(runner: InterfaceRunner, asked: Sequence[Asked], many: int) -> Prefix:
    """The first ``many`` tokens that were read, as a prefix of slots."""
    shape, places = runner.shape, torch.arange(many, dtype=torch.int32)

    def flat(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([runner.filled(part[0, :, :many]).flatten(0, 1) for part in parts])

    keys, values = flat([one.k for one in asked]), flat([one.v for one in asked])
    lengths = torch.full((shape.layers, shape.kv_heads), many)
    positions = places.repeat(shape.layers * shape.kv_heads)
    segment = Segment(keys, values, torch.zeros(len(keys)), lengths, many, positions)
    return Prefix((segment,), (0,), many)


def _logits(runner: Runner, ids: torch.Tensor, memory: Memory | None = None, start: int = 0) -> torch.Tensor:
    """Logits (T, vocabulary) of the tokens from ``start`` on."""
    shape, places = runner.shape, torch.arange(start, ids.shape[1], device=ids.device)
    sizes = shape.layers, 1, shape.kv_heads, shape.head_dim, len(places)
    cache = Cache(*sizes, device=runner.device, dtype=runner.dtype)
    return runner.logits(runner.forward(ids[:, start:], places, cache, memory))[0]


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance of (T, vocabulary) logits, relative to their spread: at the median token."""
    spread = (expected - expected.mean(dim=-1, keepdim=True)).norm(dim=-1)
    return float(((found - expected).norm(dim=-1) / spread.clamp_min(1e-9)).median())
