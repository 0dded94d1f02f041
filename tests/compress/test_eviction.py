"""KVzip and SnapKV against attention as transformers itself gives it."""

from __future__ import annotations

import pytest
import torch
from decoder_cases import TEXT, tiny, tokens, whole

from lloco_engine.compress import registry
from lloco_engine.compress.eviction import most_important_per_head, select
from lloco_engine.compress.snapkv import _POOL

LONG = f"{TEXT} {TEXT.upper()} {TEXT[::-1]}"
SHAPES = [("llama", {}), ("llama", {"num_key_value_heads": 1}), ("qwen2", {})]


def attention(decoder, ids: list[int]) -> torch.Tensor:
    """(L, H, G, T, T) of one pass over ids, by transformers' slow attention."""
    model = decoder.runner.model
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        seen = torch.stack(model(torch.tensor([ids]), output_attentions=True).attentions)[:, 0]
    model.set_attn_implementation("sdpa")
    return seen.unflatten(1, (decoder.shape.kv_heads, -1))


def check_kept(decoder, name: str, keep: torch.Tensor, ratio: float) -> None:
    """The compressor keeps these positions (L, H, n) of the whole cache, as they are."""
    segment = registry.get(name).compress(decoder, tokens(decoder, LONG), [2, ratio])[1]
    everything = whole(decoder, LONG)
    assert segment.lengths.tolist() == keep.sum(-1).tolist()
    assert not segment.bias.any()
    torch.testing.assert_close(segment.keys, everything.keys[keep.flatten()], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(segment.values, everything.values[keep.flatten()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "changes"), SHAPES)
def test_kvzip_keeps_what_the_repetition_looks_at(family, changes):
    decoder = tiny(family, **changes)
    ids, first = tokens(decoder, LONG), decoder.template_tokens
    past = first + len(ids)
    seen = attention(decoder, [*decoder.template.prefix_ids, *ids, *decoder.template.repeat_ids(), *ids])
    importance = seen[:, :, :, past:, first:past].amax((2, 3))
    check_kept(decoder, "kvzip", select(importance, 8, floor=0.0), 8)


@pytest.mark.parametrize(("family", "changes"), SHAPES)
def test_snapkv_keeps_what_the_end_looks_at_and_the_end(family, changes):
    decoder = tiny(family, **changes)
    ids, first = tokens(decoder, LONG), decoder.template_tokens
    watchers = len(ids) // 64
    assert watchers > 1
    seen = attention(decoder, [*decoder.template.prefix_ids, *ids])
    mean = seen[:, :, :, -watchers:, first : first + len(ids) - watchers].mean((2, 3))
    pooled = torch.empty_like(mean)
    for place in range(mean.shape[-1]):  # of neighbours, as far as there are any
        pooled[..., place] = mean[..., max(0, place - _POOL // 2) : place + _POOL // 2 + 1].mean(-1)
    importance = torch.cat((pooled, torch.full((*pooled.shape[:2], watchers), torch.inf)), dim=-1)
    check_kept(decoder, "snapkv", most_important_per_head(importance, 8), 8)


def test_every_head_keeps_the_same_number():
    importance = torch.rand(2, 3, 40, generator=torch.Generator().manual_seed(0))
    keep = most_important_per_head(importance, 8)
    assert keep.sum(-1).tolist() == [[5] * 3] * 2
    assert importance[keep].min() >= importance.topk(5, dim=-1).values.min()
    assert most_important_per_head(importance, 1000).sum(-1).eq(1).all()
