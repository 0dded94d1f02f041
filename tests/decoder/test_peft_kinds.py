"""Every kind of PEFT adapter is what PEFT's own model makes of it, or refused by name; the decoder stays as it was."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from decoder_cases import spiced
from safetensors.torch import load_file, save_file

from lloco_engine.adapters.interpolate import average
from lloco_engine.adapters.manifest import AdapterManifest
from lloco_engine.decoder.local import LocalDecoder
from lloco_engine.decoder.peft_modules import KINDS
from lloco_engine.errors import AdapterError
from lloco_engine.models import quiet
from lloco_engine.testing import FAMILIES, tiny_decoder, tiny_tokenizer

BIASED = {"llama": {"attention_bias": True, "tie_word_embeddings": False}, "qwen3": {"attention_bias": True}}
IDS = [5, 77, 30, 200, 12, 9, 31, 44, 101, 7]
QV = ["q_proj", "v_proj"]


class Names:
    """What a family calls the modules that cases name."""

    def __init__(self, family: str) -> None:
        opt = family == "opt"
        self.out, self.down = ("out_proj", "fc2") if opt else ("o_proj", "down_proj")
        self.norm = "final_layer_norm" if opt else "norm"
        self.first = "self_attn_layer_norm" if opt else "input_layernorm"


Make = Callable[[Names], Any]


def lora(**settings: Any) -> Make:
    def make(names: Names) -> Any:
        found = {key: value(names) if callable(value) else value for key, value in settings.items()}
        return peft.LoraConfig(**({"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": QV} | found))

    return make


def kind(name: str, **settings: Any) -> Make:
    def make(names: Names) -> Any:
        found = {key: value(names) if callable(value) else value for key, value in settings.items()}
        return getattr(peft, name)(**({"task_type": "CAUSAL_LM", "target_modules": QV} | found))

    return make


def bare(name: str, **settings: Any) -> Make:
    return lambda _: getattr(peft, name)(task_type="CAUSAL_LM", **settings)


MAIN: dict[str, Make] = {
    "lora": lora(),
    "all-linear": lora(target_modules="all-linear"),
    "patterns": lora(
        target_modules=lambda n: ["k_proj", n.out, n.down],
        rank_pattern={"k_proj": 2},
        alpha_pattern=lambda n: {n.down: 9},
    ),
    "lora_bias": lora(lora_bias=True),
    "dora": lora(use_dora=True, target_modules=lambda n: [*QV, "k_proj", n.out, n.down]),
    "ia3": kind(
        "IA3Config", target_modules=lambda n: ["k_proj", "v_proj", n.down], feedforward_modules=lambda n: [n.down]
    ),
    "oft": kind("OFTConfig", oft_block_size=4, r=0),
}
EXACT = MAIN | {
    "rslora": lora(use_rslora=True),
    "one layer": lora(layers_to_transform=[1]),
    "left out": lora(exclude_modules=r".*\.0\..*"),
    "parameters": lora(target_modules=[], target_parameters=["q_proj.weight"]),
    "gaussian": lora(init_lora_weights="gaussian"),
    "qalora": lora(use_qalora=True),
    "adalora": kind("AdaLoraConfig", init_r=6, target_r=4, total_step=10),
    "boft": kind("BOFTConfig", boft_block_size=4),
    "c3a": kind("C3AConfig", block_size=8),
    "fourierft": kind("FourierFTConfig", n_frequency=20),
    "hra": kind("HRAConfig", r=4),
    "loha": kind("LoHaConfig", r=4),
    "lokr": kind("LoKrConfig", r=4),
    "road": kind("RoadConfig", group_size=8),
}
NEWER = {  # kinds that an older PEFT lacks
    "adamss": kind("AdamssConfig"),
    "beft": kind("BeftConfig"),
    "deft": kind("DeftConfig"),
    "delora": kind("DeloraConfig", r=4),
    "glora": kind("GloraConfig", r=4),
    "gralora": kind("GraloraConfig", r=4, gralora_k=2),
    "hira": kind("HiraConfig", r=4),
    "miss": kind("MissConfig", r=4),
    "osf": kind("OSFConfig", effective_rank=4),
    "peanut": kind("PeanutConfig"),
    "psoft": kind("PsoftConfig", r=4),
    "supertuning": kind("SupertuningConfig"),
    "waveft": kind("WaveFTConfig", n_frequency=20),
}
REFUSED: dict[str, tuple[str, Make]] = {  # each with what the error must name
    "head": ("lm_head", lora(modules_to_save=["lm_head"])),
    "embedding": ("embed_tokens", lora(modules_to_save=["embed_tokens"])),
    "final norm": ("norm", lora(modules_to_save=lambda n: [n.norm])),
    "layer norm": ("layer_?norm", lora(modules_to_save=lambda n: [n.first])),
    "a linear layer": ("k_proj", lora(modules_to_save=["k_proj"])),
    "lora on the head": ("lm_head", lora(target_modules=["q_proj", "lm_head"])),
    "lora on the embedding": ("embed_tokens", lora(target_modules=["q_proj", "embed_tokens"])),
    "tokens": ("trainable_token_indices", lora(trainable_token_indices=[70, 77])),
    "all biases": (r"q_proj.*bias|k_proj.*bias", lora(bias="all")),
    "its biases": (r"q_proj.*bias", lora(bias="lora_only")),
    "pissa": ("pissa", lora(init_lora_weights="pissa")),
    "olora": ("olora", lora(init_lora_weights="olora")),
    "activated": ("alora_invocation_tokens", lora(alora_invocation_tokens=[12, 9])),
    "norms": ("LN_TUNING", kind("LNTuningConfig", target_modules=lambda n: [n.first, n.norm])),
    "trained tokens": (
        "TRAINABLE_TOKENS",
        kind("TrainableTokensConfig", token_indices=[70, 77], target_modules=["embed_tokens"]),
    ),
    "vera": ("VERA", kind("VeraConfig", r=4, target_modules=["q_proj"])),
    "lily": ("LILY", kind("LilyConfig", r=4)),
    "vblora": ("VBLORA", kind("VBLoRAConfig", num_vectors=8, vector_length=4, r=4, topk=2)),
    "randlora": ("RANDLORA", kind("RandLoraConfig", r=4)),
    "prompt tuning": ("PROMPT_TUNING", bare("PromptTuningConfig", num_virtual_tokens=4)),
    "prefix tuning": ("PREFIX_TUNING", bare("PrefixTuningConfig", num_virtual_tokens=4)),
    "p-tuning": ("P_TUNING", bare("PromptEncoderConfig", num_virtual_tokens=4, encoder_hidden_size=16)),
}


def model(family: str) -> Any:
    """A tiny decoder all of whose weights are random, biases and norms included."""
    return spiced(tiny_decoder(family, **BIASED.get(family, {})))


def save(folder: Path, family: str, make: Make, seed: int = 3) -> torch.Tensor:
    """Save an adapter of random weights; returns the logits of PEFT's own model with what it reads back."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        made = peft.get_peft_model(model(family), make(Names(family)))
        for name, parameter in made.named_parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape) * (0.1 if "lora_A" in name else 0.3)
        made.save_pretrained(str(folder))
        read = peft.PeftModel.from_pretrained(model(family), str(folder))
        read.train(False)
        with torch.no_grad():
            logits: torch.Tensor = read(torch.tensor([IDS])).logits[0]
    return logits


def logits(decoder: LocalDecoder, adapter: str | None) -> torch.Tensor:
    """Logits of all tokens, the last by a step of its own."""
    cache = decoder.new_cache(1, len(IDS))
    with torch.inference_mode():
        hidden = [decoder.step([ids], 0, cache, None, adapter)[0] for ids in (IDS[:-1], IDS[-1:])]
        return decoder.runner.logits(torch.cat(hidden)).clone()


def decoder_of(family: str) -> LocalDecoder:
    return LocalDecoder(model(family), tiny_tokenizer(), "tiny")


def cases(table: dict[str, Any], everywhere: Iterable[str]) -> list[tuple[str, str]]:
    return [(family, name) for name in table for family in (FAMILIES if name in everywhere else ("llama",))]


@pytest.mark.parametrize(("family", "name"), cases(EXACT | NEWER, MAIN))
def test_it_is_what_pefts_own_model_says(family, name, tmp_path):
    if name in NEWER and NEWER[name].__closure__[0].cell_contents not in vars(peft):
        pytest.skip("the installed PEFT has no such kind")
    expected = save(tmp_path, family, (EXACT | NEWER)[name])
    decoder = decoder_of(family)
    base, state = logits(decoder, None), decoder.runner.model.state_dict()
    decoder.load_adapter(tmp_path, "law")
    made = logits(decoder, "law")
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    assert (made - base).abs().max() > 0.1
    assert torch.equal(logits(decoder, None), base), "the base weights answer as before, to the last bit"
    decoder.drop_adapter("law")
    after = decoder.runner.model.state_dict()
    assert after.keys() == state.keys() and torch.equal(logits(decoder, None), base)


@pytest.mark.parametrize(("family", "name"), cases(REFUSED, ("head", "final norm", "its biases")))
def test_what_is_not_read_is_named(family, name, tmp_path):
    named, make = REFUSED[name]
    if "biases" in name and family == "mistral":
        pytest.skip("this family has no biases")
    save(tmp_path, family, make)
    decoder = decoder_of(family)
    base, state = (
        logits(decoder, None),
        {key: value.clone() for key, value in decoder.runner.model.state_dict().items()},
    )
    with pytest.raises(AdapterError, match=named):
        decoder.load_adapter(tmp_path, "law")
    assert decoder.adapters == ()
    after = decoder.runner.model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[key], value) for key, value in state.items())
    assert torch.equal(logits(decoder, None), base)


def test_every_kind_that_is_read_is_tried():
    tried = {str(make(Names("llama")).peft_type.value) for make in EXACT.values()}
    tried |= {name.upper() for name in NEWER}
    assert tried == set(KINDS)


def test_adapters_of_several_kinds_do_not_meet(tmp_path):
    """PEFT nests them in one another, and then several are wrong without a word."""
    names = ["lora", "ia3", "dora", "loha", "oft", "lora_bias", "fourierft", "parameters"]
    expected = {name: save(tmp_path / name, "llama", EXACT[name], seed) for seed, name in enumerate(names)}
    for order in (names, names[::-1]):
        decoder = decoder_of("llama")
        base, live = logits(decoder, None), []

        def check(live=live, decoder=decoder, base=base):
            for name in live:
                torch.testing.assert_close(logits(decoder, name), expected[name], rtol=1e-4, atol=1e-4)
            assert torch.equal(logits(decoder, None), base)

        for name in order:
            decoder.load_adapter(tmp_path / name, name)
            live.append(name)
            check()
        for name in order[1::2]:
            decoder.drop_adapter(name)
            live.remove(name)
            check()
        decoder.load_adapter(tmp_path / order[1], "again")
        torch.testing.assert_close(logits(decoder, "again"), expected[order[1]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["weight", "lora_A", "q_proj", "0", "v1.0", "a b", "法律", "default"])
def test_an_adapter_may_have_any_name(name, tmp_path):
    expected = save(tmp_path, "llama", EXACT["lora"])
    decoder = decoder_of("llama")
    decoder.load_adapter(tmp_path, "weights")
    decoder.load_adapter(tmp_path, name)
    torch.testing.assert_close(logits(decoder, name), expected, rtol=1e-4, atol=1e-4)


def test_one_adapter_is_trained_beside_another_that_answers(tmp_path):
    expected = save(tmp_path, "llama", EXACT["dora"])
    decoder = decoder_of("llama")
    base = logits(decoder, None)
    decoder.load_adapter(tmp_path, "law")
    parameters = decoder.add_adapter(EXACT["lora"](Names("llama")), "new")
    assert all(".new." in name for name in parameters) and len(parameters) == 8
    torch.testing.assert_close(logits(decoder, "new"), base)
    hidden = decoder.step([IDS], 0, decoder.new_cache(1, len(IDS)), None, "new")
    decoder.runner.logits(hidden).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for name, p in parameters.items() if "lora_B" in name)
    torch.testing.assert_close(logits(decoder, "law"), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(AdapterError, match="lm_head"):
        decoder.add_adapter(lora(target_modules=["q_proj", "lm_head"])(Names("llama")), "other")
    torch.testing.assert_close(logits(decoder, "law"), expected, rtol=1e-4, atol=1e-4)


# -- files that do not fit their configuration -----------------------------------------------------------------------


def change(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_a_tensor_too_many_or_too_few_is_named(tmp_path):
    save(tmp_path, "llama", EXACT["lora"])
    file, decoder = tmp_path / "adapter_model.safetensors", decoder_of("llama")
    weights = load_file(file)
    lost = min(weights)
    save_file({name: value for name, value in weights.items() if name != lost}, file)
    with pytest.raises(AdapterError, match=f"lacks {lost.removeprefix('base_model.model.')}"):
        decoder.load_adapter(tmp_path, "law")
    save_file(weights | {"base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight": torch.ones(4, 32)}, file)
    with pytest.raises(AdapterError, match=r"k_proj\.lora_A\.weight, which has no place"):
        decoder.load_adapter(tmp_path, "law")
    save_file(weights | {"base_model.model.model.embed_tokens.weight": torch.zeros(286, 32)}, file)
    with pytest.raises(AdapterError, match=r"the decoder's own model\.embed_tokens\.weight"):
        decoder.load_adapter(tmp_path, "law")
    save_file({name: value.new_zeros(3, 5) for name, value in weights.items()}, file)
    with pytest.raises(AdapterError, match="size mismatch"):
        decoder.load_adapter(tmp_path, "law")
    assert decoder.adapters == ()


def test_settings_of_another_peft_are_named(tmp_path):
    save(tmp_path, "llama", EXACT["lora"])
    decoder = decoder_of("llama")
    change(tmp_path, use_sorcery=True, use_nothing=False)
    with pytest.raises(AdapterError, match="does not know, use_sorcery; update peft"):
        decoder.load_adapter(tmp_path, "law")
    change(tmp_path, use_sorcery=None, peft_type="SORCERY")
    with pytest.raises(AdapterError, match="SORCERY"):
        decoder.load_adapter(tmp_path, "law")


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"peft_type": 3}'])
def test_a_configuration_that_is_none_is_refused(text, tmp_path):
    save(tmp_path, "llama", EXACT["lora"])
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError):
        decoder_of("llama").load_adapter(tmp_path, "law")


# -- averages --------------------------------------------------------------------------------------------------------


def manifest(folder: Path, **config: Any) -> AdapterManifest:
    digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    names = ("group", "decoder", "tokenizer_fingerprint", "template_fingerprint", "memory", "compressor")
    made = AdapterManifest(
        format_version=1,
        **dict.fromkeys(names, "x"),
        decoder_fingerprint="x",
        compressor_settings={},
        ratios=[],
        data=[],
        config=config,
        weights_sha256=digest,
    )
    (folder / "lloco.json").write_text(made.dumps())
    return made


def test_a_mean_where_the_later_adapter_has_more_targets(tmp_path):
    save(tmp_path / "early", "llama", lora(target_modules=["q_proj"]))
    first = manifest(tmp_path / "early")
    save(tmp_path / "late", "llama", lora(target_modules=["q_proj", "k_proj"]), seed=4)
    manifest(tmp_path / "late", begun_with={"sha256": first.weights_sha256})
    average(tmp_path / "early", tmp_path / "late", 0.5, tmp_path / "mean")
    early, late, mean = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("early", "late", "mean"))
    assert mean.keys() == late.keys()
    for name, value in mean.items():
        if "k_proj" in name:  # it began by adding nothing: half of what it adds is half of one of the two factors
            torch.testing.assert_close(value, late[name] * (0.5 if "lora_B" in name else 1))
        else:
            torch.testing.assert_close(value, (early[name] + late[name]) / 2)
    decoder = decoder_of("llama")
    decoder.load_adapter(tmp_path / "mean", "mean")


def test_a_mean_of_other_shapes_is_refused(tmp_path):
    save(tmp_path / "early", "llama", lora(r=2))
    first = manifest(tmp_path / "early")
    save(tmp_path / "late", "llama", lora())
    manifest(tmp_path / "late", begun_with={"sha256": first.weights_sha256})
    with pytest.raises(AdapterError, match="of one shape"):
        average(tmp_path / "early", tmp_path / "late", 0.5, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()
