"""Fused products: the packed half-precision copy gives what the full weights give, or is left out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from decoder_cases import SHAPES, TEXT, spiced, tokens

from lloco_engine.compress import attention_matching
from lloco_engine.compress.attention_matching import AttentionMatching
from lloco_engine.config import GenerateConfig
from lloco_engine.decoder import linear
from lloco_engine.decoder.lean import LeanRunner
from lloco_engine.decoder.linear import FusedLinear, PackedLinear, _packed
from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.testing import tiny_decoder, tiny_tokenizer

half_weights = pytest.mark.skipif(
    _packed(torch.zeros(8, 8), None) is None, reason="this processor or build has no half-precision product"
)


def rounded(family: str = "llama", **changes) -> LocalDecoder:
    """A tiny decoder whose weights float16 holds."""
    model = spiced(tiny_decoder(family, **changes))
    return LocalDecoder(model.half().float(), tiny_tokenizer(), "rounded")


class Owner(torch.nn.Module):
    """Two linear layers that read the same input."""

    def __init__(self, bias: bool = False, *, half: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = (torch.nn.Linear(48, out, bias=bias).requires_grad_(False) for out in (40, 17))
        if half:
            self.half().float()


@half_weights
def test_the_packed_copy_holds_every_weight_that_float16_holds():
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)  # all of float16, its smallest numbers too
    weight = bits.view(torch.float16).float()
    weight = weight[weight.isfinite()].reshape(-1, 32)
    unpacked, _ = torch.ops.quantized.linear_unpack_fp16(_packed(weight, None))
    assert torch.equal(unpacked.float(), weight)


@half_weights
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8, 33])
def test_the_quick_product_is_the_plain_one(bias, rows):
    owner = Owner(bias)
    layer, x = FusedLinear(owner, ("one", "two")), torch.randn(2, rows, 48)
    with torch.inference_mode():
        expected = torch.cat([owner.one(x), owner.two(x)], dim=-1)
        torch.testing.assert_close(layer.quick(x), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.plain(x), expected, rtol=1e-5, atol=1e-6)


def test_weights_that_float16_does_not_hold_are_not_packed():
    layer, x = FusedLinear(Owner(half=False), ("one", "two")), torch.randn(2, 3, 48)
    assert layer._packed is None
    assert torch.equal(layer.quick(x), layer.plain(x))


@half_weights
def test_bfloat16_weights_are_packed_where_they_do_not_overflow():
    torch.manual_seed(1)
    weight = (0.02 * torch.randn(300, 300)).bfloat16().float()
    off = (weight.half().float() - weight).abs().max()
    assert 0 < off <= 2**-25, "some lie below float16's grid"
    x = torch.randn(3, 300)
    made = torch.ops.quantized.linear_dynamic_fp16.default(x, _packed(weight, None))
    torch.testing.assert_close(made, x @ weight.T, rtol=1e-5, atol=2e-6)
    for value in (65536.0, 1.0 + 2**-12):  # too large for float16; too fine
        changed = weight.clone()
        changed[7, 5] = value
        assert _packed(changed, None) is None


@half_weights
def test_a_bfloat16_release_answers_as_transformers_does():
    model = spiced(tiny_decoder(initializer_range=0.1)).bfloat16().float()
    decoder = LocalDecoder(spiced(tiny_decoder(initializer_range=0.1)).bfloat16().float(), tiny_tokenizer(), "bf16")
    assert all(layer._packed is not None for layer in [decoder.runner._head, *decoder.runner._fused])
    ids = torch.tensor([tokens(decoder, TEXT)[:40]])
    with torch.inference_mode():
        hidden = decoder.runner.forward(ids, torch.arange(40), decoder.new_cache(1, 40))
        torch.testing.assert_close(decoder.runner.logits(hidden), model(ids).logits, rtol=1e-4, atol=1e-4)


@half_weights
@pytest.mark.parametrize("packed", [("gate_proj", "up_proj"), ("down_proj",), ("q_proj", "k_proj", "v_proj"), ()])
def test_a_short_text_is_repeated_in_bfloat16_whatever_is_packed(packed, monkeypatch):
    """As on a processor that multiplies bfloat16: what one product makes, another kind of product reads."""
    from lloco_engine.compress import attention_matching

    def compressed() -> torch.Tensor:
        model = spiced(tiny_decoder())
        for name, parameter in model.named_parameters():
            if name.split(".")[-2] in packed:
                parameter.data = parameter.data.half().float()
        decoder = LocalDecoder(model, tiny_tokenizer(), "mixed")
        made = attention_matching.AttentionMatching().compress(decoder, tokens(decoder, TEXT), [2])
        return made[0].values

    expected = compressed()
    monkeypatch.setattr(attention_matching, "quicker_in_bf16", lambda *_: True)
    made = compressed()
    assert made.shape == expected.shape and made.isfinite().all() and made.dtype == expected.dtype


def test_without_a_kernel_the_plain_product_serves(monkeypatch):
    monkeypatch.setattr(torch.backends.quantized, "engine", "onednn")
    layer, x = FusedLinear(Owner(), ("one", "two")), torch.randn(1, 48)
    assert layer._packed is None
    assert torch.equal(layer.quick(x), layer.plain(x))


@half_weights
@pytest.mark.parametrize(("family", "changes"), SHAPES)
def test_a_packed_decoder_says_what_transformers_say(family, changes):
    decoder, model = rounded(family, **changes), spiced(tiny_decoder(family, **changes)).half().float()
    if isinstance(decoder.runner, LeanRunner):
        assert all(layer._packed is not None for layer in [decoder.runner._head, *decoder.runner._fused])
    else:
        linears = [decoder.runner.model.get_output_embeddings(), *decoder.runner.linears()]
        assert all(isinstance(part, PackedLinear) for part in linears)
    ids = torch.tensor([tokens(decoder, TEXT)[:40]])
    with torch.inference_mode():
        hidden = decoder.runner.forward(ids, torch.arange(ids.shape[1]), decoder.new_cache(1, 40))
        expected = model(ids).logits
        torch.testing.assert_close(decoder.runner.logits(hidden), expected, rtol=1e-4, atol=1e-4)
        prompt = torch.tensor([decoder.template.prefix_ids + decoder.template.question_ids("When?")])
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12)
    made = decoder.generate([Prompt("When?")], GenerateConfig(max_new_tokens=12))[0]
    assert made.token_ids == [token for token in out[0, prompt.shape[1] :].tolist() if token not in decoder.eos]


@half_weights
def test_gradients_do_not_go_through_the_packed_copy():
    decoder = rounded()
    embedded = decoder.runner.embed(torch.tensor([tokens(decoder, TEXT)[:8]])).detach()
    layer = decoder.runner.layers[0]
    embedded.requires_grad_(True)
    decoder.runner.embed = lambda ids: embedded
    hidden = decoder.runner.forward(torch.zeros(1, 8, dtype=torch.int64), torch.arange(8), decoder.new_cache(1, 8))
    (gradient,) = torch.autograd.grad(decoder.runner.logits(hidden).logsumexp(-1).sum(), embedded)
    assert gradient.abs().max() > 0 and layer.qkv._packed is not None


def test_chunks_of_any_length_are_multiplied_in_few_shapes_in_bfloat16(monkeypatch):
    """oneDNN keeps a program for each shape, so memory would grow with the number of different lengths."""
    rows: set[int] = set()

    def noted(x, weight, bias=None):
        if torch.is_autocast_enabled("cpu"):
            rows.add(x.shape[:-1].numel())
        return torch.nn.functional.linear(x, weight, bias)

    decoder = LocalDecoder(spiced(tiny_decoder()), tiny_tokenizer(), "tiny")
    monkeypatch.setattr(attention_matching, "quicker_in_bf16", lambda *_: True)
    monkeypatch.setattr(linear, "F", SimpleNamespace(linear=noted, pad=torch.nn.functional.pad))
    for length in range(20, 100, 5):
        AttentionMatching().compress(decoder, [5 + n % 90 for n in range(length)], [4])
    assert rows - {0} and rows <= {0, 64, 128, 192}


def test_rows_that_fill_up_change_nothing_that_is_kept():
    made = FusedLinear(Owner(), ("one", "two"))
    x = torch.randn(2, 37, 48, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.nn.functional.linear(x, made.weight, made.bias)
        assert made.plain(x).shape == expected.shape
        torch.testing.assert_close(made.plain(x), expected, rtol=2e-2, atol=2e-2)
