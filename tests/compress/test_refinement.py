"""Refinement against plain passes over the text itself, and what it must leave alone."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from decoder_cases import OTHERS, TEXT, place, ragged, tiny, tokens, whole

from lloco_engine.compress import refinement
from lloco_engine.compress.attention_matching import AttentionMatching
from lloco_engine.compress.refinement import refine
from lloco_engine.config import RefineConfig
from lloco_engine.decoder.attention import causal_mask
from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.decoder.padded import Segments
from lloco_engine.errors import ConfigError
from lloco_engine.kinds.compact_kv import CompactKVFormat
from lloco_engine.types import Segment

PARTS = ("keys", "values", "bias")
QUICK = RefineConfig(steps=6, stretch=32)


def fit(decoder: LocalDecoder, text: str = TEXT, ratio: float = 8) -> Segment:
    return AttentionMatching().compress(decoder, tokens(decoder, text), [ratio])[0]


def weights_hash(decoder: LocalDecoder) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(decoder.runner.model.state_dict().items()):
        digest.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def same(one: Segment, other: Segment) -> bool:
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in (*PARTS, "lengths"))


def plain_divergence(decoder: LocalDecoder, segment: Segment, begin: int, held: slice) -> float:
    """Mean divergence of what the decoder foretells of the tokens ``held``, read from ``begin`` on."""
    ids, template = tokens(decoder, TEXT), decoder.template
    repeat = [*template.repeat_ids(), *ids[begin : held.stop]]
    scored = slice(len(repeat) - (held.stop - held.start) - 1, len(repeat) - 1)
    model = decoder.runner.model
    with torch.inference_mode():
        text = torch.tensor([[*template.prefix_ids, *ids, *repeat]])
        expected = model(text).logits[0, -len(repeat) :][scored].log_softmax(-1)
        prefix = place(decoder, [segment])
        cache = decoder.start_cache(1, len(repeat), None)
        memory = decoder.memory([prefix])
        hidden = decoder.step([repeat], prefix.start - cache.length, cache, memory, None)
        read = decoder.runner.logits(hidden[0, scored]).log_softmax(-1)
    return float((expected.exp() * (expected - read)).sum(-1).mean())


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("llama", {"num_key_value_heads": 4}), ("llama", {"num_key_value_heads": 1}), ("qwen3", {})],
)
def test_a_few_steps_bring_it_nearer_on_tokens_that_no_step_aimed_at(family, changes):
    decoder = tiny(family, **changes)
    ids, fitted = tokens(decoder, TEXT), fit(decoder)
    made = refine(decoder, ids, fitted, RefineConfig(steps=12, stretch=48))
    assert made.divergence.after < made.divergence.before
    assert made.divergence.steps == 12
    everything = slice(1, len(ids))
    former, now = (plain_divergence(decoder, one, 0, everything) for one in (fitted, made))
    assert now < former
    assert torch.equal(made.lengths, fitted.lengths)
    assert made.source_tokens == fitted.source_tokens
    for part in PARTS:
        assert getattr(made, part).shape == getattr(fitted, part).shape
        assert not getattr(made, part).requires_grad
        assert not torch.equal(getattr(made, part), getattr(fitted, part))


def test_the_divergence_is_that_of_plain_passes():
    decoder = tiny()
    ids, fitted = tokens(decoder, TEXT), fit(decoder)
    run = refinement._Run(decoder, ids, fitted, QUICK, None)
    assert [block.stop - block.start for block in run._blocks] == [len(ids) // 8]
    made = refine(decoder, ids, fitted, QUICK)
    (block,) = run._blocks
    begin = max(0, block.start - 16)
    assert made.divergence.before == pytest.approx(plain_divergence(decoder, fitted, begin, block), rel=1e-3)
    assert made.divergence.after == pytest.approx(plain_divergence(decoder, made, begin, block), rel=1e-3)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_what_is_kept_in_few_bits_is_refined_as_it_will_be_read(dtype):
    decoder = tiny()
    shape, ids, fitted = decoder.shape, tokens(decoder, TEXT), fit(decoder)
    form = CompactKVFormat(shape.layers, shape.kv_heads, shape.head_dim, dtype)
    made = refine(decoder, ids, fitted, RefineConfig(steps=12, stretch=48), rounded=form.rounded)
    (block,) = refinement._Run(decoder, ids, fitted, QUICK, None)._blocks
    begin = max(0, block.start - 16)
    for segment, told in ((fitted, made.divergence.before), (made, made.divergence.after)):
        kept = form.unpack(form.pack(segment, "0" * 32), segment.source_tokens, {})
        assert told == pytest.approx(plain_divergence(decoder, kept, begin, block), rel=1e-2)
    assert made.divergence.after < made.divergence.before


def test_the_whole_cache_diverges_from_nothing():
    decoder = tiny()
    full = whole(decoder)
    assert refine(decoder, tokens(decoder, TEXT), full, QUICK).divergence.before == pytest.approx(0, abs=1e-5)


def test_held_out_tokens_are_spread_and_never_aimed_at():
    decoder = tiny()
    ids = tokens(decoder, " ".join((TEXT, *OTHERS)) * 3)
    run = refinement._Run(decoder, ids, ragged(1, [[2, 2], [2, 2]]), QUICK, None)
    assert len(run._blocks) == 4
    assert int(run._held.sum()) == 64
    quarter = len(ids) / 4
    for number, block in enumerate(run._blocks):
        assert number * quarter - 1 <= block.start < block.stop <= (number + 1) * quarter
    for _ in range(40):
        stretch = run._stretch()
        begin = next(at for at in range(len(ids)) if ids[at : at + 32] == stretch.ids)
        if ids.count(stretch.ids[0]) and torch.equal(stretch.counts, ~run._held[begin : begin + 32]):
            continue
        matches = [at for at in range(len(ids) - 31) if ids[at : at + 32] == stretch.ids]
        assert any(torch.equal(stretch.counts, ~run._held[at : at + 32]) for at in matches)


def test_no_steps_are_the_fit_alone_bit_for_bit(monkeypatch):
    decoder = tiny()
    ids, method = tokens(decoder, TEXT), AttentionMatching(refine=0)
    fitted = [fit(decoder, ratio=ratio) for ratio in (4, 16)]
    monkeypatch.setattr(refinement, "_Run", None)
    for made, alone in zip(AttentionMatching().compress(decoder, ids, [4, 16]), fitted, strict=True):
        assert same(made, alone)
        assert made.divergence is None
    assert refine(decoder, ids, fitted[0], RefineConfig(steps=0)) is fitted[0]
    assert "refine" not in method.settings
    assert "stretch" not in AttentionMatching(stretch=64).settings


def test_settings_say_every_rate_that_is_not_what_former_releases_took():
    plain = AttentionMatching().settings
    assert AttentionMatching(refine=8, stretch=128).settings == plain | {"refine": 8, "stretch": 128}
    assert AttentionMatching(refine=8, values=0.06).settings == plain | {"refine": 8, "stretch": 256, "values": 0.06}
    assert AttentionMatching(values=0.06, keys=0.5, biases=0.2).settings == plain
    config = RefineConfig(3, 64, 0.02, 0.05, 0.04, 0.5)
    assert AttentionMatching(**config.settings)._refinement == config
    assert AttentionMatching(**AttentionMatching(**config.settings).settings)._refinement == config
    assert RefineConfig(steps=0).settings == {}
    with pytest.raises(ConfigError, match="refinement: values must be a step from 0 to 1, not 2"):
        AttentionMatching(refine=8, values=2)


def test_within_compress_it_is_what_it_is_alone():
    decoder = tiny()
    ids = tokens(decoder, TEXT)
    method = AttentionMatching(**QUICK.settings)
    assert {name: method.settings[name] for name in ("refine", "stretch")} == {"refine": 6, "stretch": 32}
    one, other = method.compress(decoder, ids, [4, 16])
    assert one.divergence.steps == other.divergence.steps == 6
    for ratio, made in ((4, one), (16, other)):
        alone = refine(decoder, ids, fit(decoder, ratio=ratio), QUICK)
        assert same(made, alone)
        assert made.divergence == alone.divergence


def test_whole_readings_within_compress_aim_at_what_the_fit_has_read_already(monkeypatch):
    decoder = tiny()
    ids = tokens(decoder, TEXT)
    (made,) = AttentionMatching(refine=2, stretch=0, pace=1.0).compress(decoder, ids, [8])
    alone = refine(decoder, ids, fit(decoder), RefineConfig(2, 0, 0.01, 0.03, 0.01, 1.0))
    for part in PARTS:
        torch.testing.assert_close(getattr(made, part), getattr(alone, part), rtol=1e-3, atol=1e-3)
    asked = []
    plain = refinement._Run._expected
    monkeypatch.setattr(
        refinement._Run, "_expected", lambda run, stretch: asked.append(len(stretch.ids)) or plain(run, stretch)
    )
    AttentionMatching(refine=2, stretch=0).compress(decoder, ids, [8])
    assert len(asked) == 1  # the block that is held out


@pytest.mark.parametrize(("fall", "share"), [(0.3, None), (0.0, 0.0), (1e9, 5.0)])
def test_a_step_goes_as_far_as_its_slope_says(fall, share):
    decoder = tiny()
    run = refinement._Run(decoder, tokens(decoder, TEXT), fit(decoder), QUICK, None)
    former, promised = [part.detach().clone() for part in run._parts.values()], 0.0
    with torch.no_grad():
        for number, part in enumerate(run._parts.values()):
            part.grad = torch.full_like(part, 0.1 * (number + 1))
            part -= 0.01
            promised += 0.01 * float(part.grad.sum())
    run._pace(former, fall)
    share = fall / promised if share is None else share
    for part, was in zip(run._parts.values(), former, strict=True):
        torch.testing.assert_close(part.detach(), was - 0.01 * share)


def test_a_step_uphill_is_taken_as_it_is():
    decoder = tiny()
    run = refinement._Run(decoder, tokens(decoder, TEXT), fit(decoder), QUICK, None)
    former = [part.detach().clone() for part in run._parts.values()]
    with torch.no_grad():
        for part in run._parts.values():
            part.grad = -torch.ones_like(part)
            part -= 0.01
    run._pace(former, 0.3)
    for part, was in zip(run._parts.values(), former, strict=True):
        torch.testing.assert_close(part.detach(), was - 0.01)


def test_equal_arguments_give_equal_segments_and_other_chunks_other_stretches():
    decoder = tiny()
    ids, fitted = tokens(decoder, TEXT), fit(decoder)
    torch.manual_seed(3)
    one = refine(decoder, ids, fitted, QUICK)
    torch.manual_seed(4)
    assert same(one, refine(decoder, ids, fitted, QUICK))
    runs = [refinement._Run(decoder, given, fitted, QUICK, None) for given in (ids, ids[:-1])]
    assert runs[0]._stretch().ids != runs[1]._stretch().ids


def test_the_decoder_is_left_as_it_was():
    decoder = tiny()
    for parameter in decoder.runner.model.parameters():
        parameter.requires_grad_(True)
    ids, fitted = tokens(decoder, TEXT), fit(decoder)
    before, kept = weights_hash(decoder), {part: getattr(fitted, part).clone() for part in PARTS}
    made = refine(decoder, ids, fitted, QUICK)
    assert not same(made, fitted)
    assert weights_hash(decoder) == before
    assert all(parameter.grad is None for parameter in decoder.runner.model.parameters())
    assert all(torch.equal(getattr(fitted, part), was) for part, was in kept.items())
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("rates", [{"keys": 1.0}, {"values": 1.0}, {"biases": 1.0}])
def test_what_got_worse_is_not_kept(rates):
    decoder = tiny()
    ids, fitted = tokens(decoder, TEXT), fit(decoder, ratio=2)
    off = {"keys": 0.0, "values": 0.0, "biases": 0.0}
    made = refine(decoder, ids, fitted, RefineConfig(steps=2, stretch=16, **off | rates))
    assert same(made, fitted)
    assert made.divergence.after == made.divergence.before
    assert made.divergence.steps == 2


def test_step_sizes_of_nothing_move_nothing():
    decoder = tiny()
    ids, fitted = tokens(decoder, TEXT), fit(decoder)
    made = refine(decoder, ids, fitted, RefineConfig(steps=4, stretch=32, values=0.0, biases=0.0))
    assert torch.equal(made.values, fitted.values)
    assert torch.equal(made.bias, fitted.bias)
    assert not torch.equal(made.keys, fitted.keys)


def test_a_long_pass_is_run_again_layer_by_layer_and_gives_the_same(monkeypatch):
    decoder = tiny()
    ids, fitted = tokens(decoder, TEXT), fit(decoder)
    config = RefineConfig(steps=3, stretch=0)
    plain = refine(decoder, ids, fitted, config)
    monkeypatch.setattr(refinement, "_LONG", 1)
    monkeypatch.setattr(refinement, "_ROWS", 7)
    long = refine(decoder, ids, fitted, config)
    for part in PARTS:
        torch.testing.assert_close(getattr(long, part), getattr(plain, part), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("stretch", "read"), [(0, 1), (4096, 1), (32, 4)])
def test_what_is_expected_of_the_whole_chunk_is_read_once(monkeypatch, stretch, read):
    decoder = tiny()
    ids, fitted = tokens(decoder, TEXT), fit(decoder)
    asked = []
    plain = refinement._Run._expected
    monkeypatch.setattr(
        refinement._Run, "_expected", lambda run, stretch: asked.append(len(stretch.ids)) or plain(run, stretch)
    )
    refine(decoder, ids, fitted, RefineConfig(steps=4, stretch=stretch))
    assert len(asked) == read + 1  # and the block that is held out


def test_a_segment_that_diverges_too_far_is_given_more_slots():
    decoder = tiny()
    ids = tokens(decoder, TEXT)
    told = {}
    for ratio in (16, 8, 4):
        (made,) = AttentionMatching(max_divergence=1e9).compress(decoder, ids, [ratio])
        assert same(made, fit(decoder, ratio=ratio))
        assert made.divergence.steps == 0
        told[ratio] = made.divergence.after
        expected = refine(decoder, ids, made, RefineConfig(steps=1)).divergence.before
        assert told[ratio] == pytest.approx(expected, rel=1e-3)
    for limit in (0.99 * told[16], 0.99 * min(told[16], told[8])):
        reached = next((ratio for ratio in (16, 8, 4) if told[ratio] <= limit), 2)
        (made,) = AttentionMatching(max_divergence=limit).compress(decoder, ids, [16])
        assert same(made, fit(decoder, ratio=reached))
    (made,) = AttentionMatching(max_divergence=1e-12).compress(decoder, ids, [16])
    assert same(made, fit(decoder, ratio=2))
    assert AttentionMatching(max_divergence=0.5).settings == AttentionMatching().settings | {"max_divergence": 0.5}
    with pytest.raises(ConfigError, match="max_divergence must be a number of nats, not negative, not -1"):
        AttentionMatching(max_divergence=-1)


def test_a_chunk_of_which_nothing_can_be_held_out_keeps_its_segment():
    decoder = tiny()
    fitted = AttentionMatching().compress(decoder, tokens(decoder, TEXT)[:7], [2])[0]
    assert refine(decoder, tokens(decoder, TEXT)[:7], fitted, QUICK) is fitted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_segments_in_half_precision_and_of_decoders_in_it(dtype):
    decoder = tiny()
    decoder = LocalDecoder(decoder.runner.model.to(dtype), decoder.tokenizer, "tiny")
    ids = tokens(decoder, TEXT)
    fitted = fit(decoder)
    stored = replace(fitted, keys=fitted.keys.half(), values=fitted.values.half())
    made = refine(decoder, ids, stored, RefineConfig(steps=8, stretch=48))
    assert made.divergence.after < made.divergence.before
    assert made.keys.dtype == torch.float32


def test_a_refined_segment_is_read_by_every_path():
    decoder = tiny()
    made = refine(decoder, tokens(decoder, TEXT), fit(decoder), QUICK)
    prompt = Prompt("Who kept the mill?", place(decoder, [made]))
    ((loss, count),) = decoder.answer_losses([prompt], ["Ada Brandt"])
    assert count > 1
    assert torch.isfinite(torch.tensor(loss))


@pytest.mark.parametrize("focus", [0, 1])
def test_the_slope_of_a_bias_is_that_of_plain_attention(focus):
    """Of the padded slots, biases too take part in gradients; the choice of segments does not."""
    decoder = tiny()
    heads, dim, layer = decoder.shape.kv_heads, decoder.shape.head_dim, 1
    sizes = [[3, 2, 4, 1][:heads], [2, 5, 1, 3][:heads]]
    segments = [ragged(seed, sizes, dim) for seed in (1, 2)]
    biases = [segment.bias.clone().requires_grad_() for segment in segments]
    made = [replace(segment, bias=bias) for segment, bias in zip(segments, biases, strict=True)]
    slots = Segments([made], [focus], [()], torch.device("cpu"), torch.float32).layer(layer)
    generator = torch.Generator().manual_seed(9)
    q = torch.randn(1, decoder.shape.query_heads, 5, dim, generator=generator)
    keys, values = torch.randn(2, 1, heads, 5, dim, generator=generator)
    read = slots.attend(q, keys, values, causal_mask(5, 5, q.device, q.dtype), 0.5)
    wanted = torch.randn(read.shape, generator=generator)
    found = torch.autograd.grad((read * wanted).sum(), biases)

    plain = [segment.bias.clone().requires_grad_() for segment in segments]
    total = torch.zeros(())
    group = q.shape[1] // heads
    for head in range(q.shape[1]):
        kv, own = head // group, []
        for segment, bias in zip(segments, plain, strict=True):
            begin = sum(sizes[0]) + sum(sizes[1][:kv])
            here = slice(begin, begin + sizes[1][kv])
            own.append((segment.keys[here], segment.values[here], bias[here]))
        for t in range(5):
            logits = [k @ q[0, head, t] * 0.5 + b for k, _, b in own]
            chosen = range(2) if not focus else [int(torch.stack([one.max() for one in logits]).argmax())]
            everything = torch.cat([*(logits[n] for n in chosen), keys[0, kv, : t + 1] @ q[0, head, t] * 0.5])
            content = torch.cat([*(own[n][1] for n in chosen), values[0, kv, : t + 1]])
            out = everything.softmax(-1) @ content
            total = total + out @ wanted[0, t, head * dim : (head + 1) * dim]
    for one, other in zip(found, torch.autograd.grad(total, plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert found[0].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "steps must be a whole number, not negative, not -1"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"stretch": 8}, "stretch must be 0"),
        ({"keys": 2.0}, "keys must be a step from 0 to 1, not 2.0"),
        ({"pace": -1}, "pace must be a share of the divergence from 0 to 2, not -1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        RefineConfig(**settings)
    if "steps" in settings or "stretch" in settings:
        with pytest.raises(ConfigError, match="refinement: "):
            AttentionMatching(**{{"steps": "refine"}.get(name, name): value for name, value in settings.items()})
