"""Adapters beside fused products: what PEFT's own modules give, without going through them."""

from __future__ import annotations

import warnings

import pytest
import torch
from decoder_cases import OTHERS, TEXT, place, spiced, tiny, whole

from lloco_engine.config import GenerateConfig
from lloco_engine.decoder import lean as runner_module
from lloco_engine.decoder.linear import FusedLinear
from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.testing import tiny_decoder

QUESTION = "When did she come?"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save(folder, **settings):
    """A LoRA adapter of random weights."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT reads an attribute that transformers has renamed
        torch.manual_seed(3)
        model = get_peft_model(spiced(tiny_decoder()), LoraConfig(task_type="CAUSAL_LM", **settings))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.2)
        model.save_pretrained(str(folder))
    return folder


def through_modules(monkeypatch, run):
    """What ``run`` gives when every adapter goes through PEFT's modules."""
    with monkeypatch.context() as patch:
        patch.setattr(runner_module, "read_adapter", lambda *_: None)
        return run()


def hidden(decoder: LocalDecoder, adapter: str | None) -> torch.Tensor:
    """Hidden states of some tokens over a segment."""
    prefix = place(decoder, [whole(decoder, OTHERS[0])])
    ids = [decoder.template.question_ids(QUESTION, TEXT)]
    with torch.inference_mode():
        cache = decoder.new_cache(1, len(ids[0]))
        return decoder.step(ids, prefix.start, cache, decoder.memory([prefix]), adapter)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ALL},
        {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        {"r": 2, "lora_alpha": 3, "target_modules": ["k_proj", "o_proj", "up_proj"]},
        {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["gate_proj", "down_proj"]},
        {"r": 4, "lora_alpha": 8, "target_modules": ALL, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 9}},
        {"r": 4, "lora_alpha": 8, "target_modules": ALL, "layers_to_transform": [1]},
    ],
    ids=["all", "qv", "some", "rslora", "patterns", "one-layer"],
)
def test_it_is_what_the_modules_give(settings, tmp_path, monkeypatch):
    def load() -> LocalDecoder:
        decoder = tiny()
        decoder.load_adapter(folder, "law")
        return decoder

    folder, config = save(tmp_path, **settings), GenerateConfig(max_new_tokens=12)
    expected = through_modules(monkeypatch, lambda: hidden(load(), "law"))
    asked = through_modules(monkeypatch, lambda: load().generate([Prompt(QUESTION)], config, "law")[0].token_ids)
    decoder = load()
    monkeypatch.setattr(FusedLinear, "modules", None)  # not called
    torch.testing.assert_close(hidden(decoder, "law"), expected, rtol=1e-4, atol=1e-5)
    assert (hidden(decoder, None) - expected).abs().max() > 0.01
    assert decoder.generate([Prompt(QUESTION)], config, "law")[0].token_ids == asked


def test_what_training_changed_is_read_again(tmp_path, monkeypatch):
    decoder = tiny()
    decoder.load_adapter(save(tmp_path, r=4, target_modules=ALL), "law")
    before = hidden(decoder, "law")
    trained = [p for name, p in decoder.runner.model.named_parameters() if "lora_" in name]
    for parameter in trained:
        parameter.requires_grad_(True)
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(trained, lr=0.02).step()
    after = hidden(decoder, "law")
    assert (after - before).abs().max() > 0.01
    decoder.runner._low_rank.clear()
    expected = through_modules(monkeypatch, lambda: hidden(decoder, "law"))
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)


def test_more_than_plain_lora_goes_through_the_modules(tmp_path, monkeypatch):
    decoder = tiny()
    decoder.load_adapter(save(tmp_path / "dora", r=4, target_modules=ALL, use_dora=True), "dora")
    decoder.load_adapter(save(tmp_path / "bias", r=4, target_modules=["q_proj"], lora_bias=True), "bias")
    for name in ("dora", "bias"):
        made = hidden(decoder, name)
        expected = through_modules(monkeypatch, lambda name=name: hidden(decoder, name))
        assert torch.equal(made, expected)
        assert (made - hidden(decoder, None)).abs().max() > 0.01
        assert decoder.runner._low_rank[name] is None
