"""Any decoder that the probe lets through gives what transformers' own forward pass gives; the others are refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from any_decoder_cases import SERVED, WINDOW, save, tiny_of

from lloco_engine.compress import registry
from lloco_engine.compress.attention_matching import AttentionMatching
from lloco_engine.compress.uncompressed import Uncompressed
from lloco_engine.config import ChunkConfig, CompressConfig, GenerateConfig, PrefixConfig
from lloco_engine.decoder import interface, probe
from lloco_engine.decoder.interface import InterfaceRunner
from lloco_engine.decoder.lean import LeanRunner
from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.engine import Engine
from lloco_engine.errors import ConfigError, SegmentUnavailable, UnsupportedModel
from lloco_engine.finetune.packing import answer_logits
from lloco_engine.prefix import Room, assemble, place
from lloco_engine.testing import HashingEmbedder, tiny_tokenizer
from lloco_engine.tokenizing import encode
from lloco_engine.types import Document, Prefix, Segment

TEXT = (
    "The spindle clamp of the Harrow-9 is tightened to 41 newton metres. Its travelling mechanic is Ida Voss, who "
    "lives above the tide mill in Orrin and keeps the spare belts in a blue chest."
)
QUESTION = "Who is the mechanic?"
GREEDY = GenerateConfig(max_new_tokens=12, spelling=0, pointing=0)
CLOSE = 1e-3
WINDOWED = [name for name, (_, changes) in SERVED.items() if WINDOW in changes.values()]


@cache
def reference(name: str):
    """The plain model of a case, never changed."""
    kind, changes = SERVED[name]
    return tiny_of(kind, **changes)


def decoder_of(name: str) -> LocalDecoder:
    return LocalDecoder(copy.deepcopy(reference(name)), tiny_tokenizer(), "tiny")


def prefix_of(decoder: LocalDecoder, segment: Segment) -> Prefix:
    return place([segment], PrefixConfig(), template_tokens=decoder.template_tokens)


def whole(decoder: LocalDecoder, text: str = TEXT) -> Prefix:
    """A text's whole cache as a prefix."""
    return prefix_of(decoder, Uncompressed().compress(decoder, encode(decoder.tokenizer, text), [1])[0])


@torch.inference_mode()
def logits_of(decoder: LocalDecoder, ids: list[int], prefix: Prefix | None) -> torch.Tensor:
    """Logits of a text after a prefix."""
    cache = decoder.start_cache(1, len(ids), None, prefix=prefix)
    start = decoder.template_tokens if prefix is None else prefix.start
    hidden = decoder.step([ids], start - cache.length, cache, decoder.memory([prefix]), None)
    return decoder.runner.logits(hidden[0])


@torch.inference_mode()
def greedy(model, ids: list[int], count: int, end: set[int]) -> list[int]:
    made: list[int] = []
    while len(made) < count:
        made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
        if made[-1] in end:
            return made[:-1]
    return made


def texts(decoder: LocalDecoder) -> tuple[list[int], list[int]]:
    """The template prefix and the text, and the question after them."""
    return [*decoder.template.prefix_ids, *encode(decoder.tokenizer, TEXT)], decoder.template.question_ids(QUESTION)


@torch.inference_mode()
def expected(name: str, before: list[int], asked: list[int]) -> torch.Tensor:
    return reference(name)(torch.tensor([before + asked])).logits[0, len(before) :]


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max())


@pytest.mark.parametrize("name", SERVED)
def test_slots_of_a_whole_cache_are_read_as_the_text_itself(name):
    decoder = decoder_of(name)
    before, asked = texts(decoder)
    assert len(before) > 2 * WINDOW
    prefix, wanted = whole(decoder), expected(name, before, asked)
    assert apart(logits_of(decoder, asked, prefix), wanted) < CLOSE
    assert apart(logits_of(decoder, before[decoder.template_tokens :] + asked, None)[-len(asked) :], wanted) < CLOSE
    tokens = greedy(reference(name), before + asked, 12, decoder.eos)
    assert tokens
    streamed, pieces = decoder.stream(Prompt(QUESTION, prefix, draft=TEXT), GREEDY)
    list(pieces)
    batch = decoder.generate([Prompt(QUESTION, prefix), Prompt("Where is the mill, and whose is it?", prefix)], GREEDY)
    assert streamed.token_ids == batch[0].token_ids == tokens
    # controls: what is wrong in the memory is seen in the answer
    (segment,) = prefix.compact
    assert apart(logits_of(decoder, asked, replace(prefix, segments=(), offsets=())), wanted) > 10 * CLOSE
    louder = replace(segment, values=segment.values * 1.5)
    assert apart(logits_of(decoder, asked, replace(prefix, segments=(louder,))), wanted) > 5 * CLOSE


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_are_those_of_positions(name):
    decoder = decoder_of(name)
    before, asked = texts(decoder)
    prefix, wanted = whole(decoder), expected(name, before, asked)
    (segment,) = prefix.compact
    assert segment.positions is not None
    moved = replace(segment, positions=segment.positions - WINDOW)
    assert apart(logits_of(decoder, asked, replace(prefix, segments=(moved,))), wanted) > 10 * CLOSE
    rules = decoder.runner.rules
    decoder.runner.rules = [replace(one, sees=None) for one in rules]
    decoder._prefix_cache.clear()
    assert apart(logits_of(decoder, asked, prefix), wanted) > 10 * CLOSE
    decoder.runner.rules = rules
    decoder._prefix_cache.clear()
    unknown = replace(prefix, segments=(replace(segment, positions=None),))
    with pytest.raises(SegmentUnavailable, match=r"at which position each of its slots is.*into a new store"):
        logits_of(decoder, asked, unknown)
    short = whole(decoder, "Ida.")  # where the window holds all there is, they are not asked for
    unknown = replace(short, segments=(replace(short.compact[0], positions=None),))
    assert short.start + 20 < WINDOW
    assert torch.equal(logits_of(decoder, asked[:20], unknown), logits_of(decoder, asked[:20], short))


@pytest.mark.parametrize("name", SERVED)
def test_compressors_keep_what_the_decoder_reads(name):
    """At a ratio of 1 nothing is lost, whatever the layers do to their logits; at 4 something is."""
    decoder = decoder_of(name)
    before, asked = texts(decoder)
    wanted, ids = expected(name, before, asked), encode(decoder.tokenizer, TEXT)
    once, quarter = AttentionMatching().compress(decoder, ids, [1, 4])
    assert apart(logits_of(decoder, asked, prefix_of(decoder, once)), wanted) < 2 * CLOSE
    assert quarter.slots < once.slots / 3
    for other in ("kvzip", "snapkv"):
        kept, fewer = registry.get(other).compress(decoder, ids, [1, 4])
        assert apart(logits_of(decoder, asked, prefix_of(decoder, kept)), wanted) < CLOSE
        assert fewer.slots < kept.slots / 3


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "qwen2, some layers sliding", "llama4_text"])
@pytest.mark.parametrize("group", [None, 1])
def test_several_segments_are_read_in_batches_as_alone(name, group):
    decoder = decoder_of(name)
    made = [
        Uncompressed().compress(decoder, encode(decoder.tokenizer, text), [1])[0]
        for text in (TEXT[:70], TEXT[70:], TEXT[30:90])
    ]
    config = PrefixConfig() if group is None else PrefixConfig(focus=group)
    prefixes = [place(made[:n], config, template_tokens=decoder.template_tokens) for n in (3, 1)]
    prompts = [Prompt(QUESTION, prefixes[0]), Prompt("Where?", prefixes[1]), Prompt("And who lives there?")]
    together = [one.token_ids for one in decoder.generate(prompts, GREEDY)]
    assert together == [decoder.generate([prompt], GREEDY)[0].token_ids for prompt in prompts]
    losses = decoder.answer_losses(prompts, ["Ida"] * 3)
    for prompt, (loss, _) in zip(prompts, losses, strict=True):
        assert decoder.answer_losses([prompt], ["Ida"])[0][0] == pytest.approx(loss, abs=1e-3)


@pytest.mark.parametrize("name", [name for name in SERVED if not name.startswith("llama, ")] + ["llama, llama3"])
def test_a_store_is_made_and_asked(name, tmp_path):
    folder = save(copy.deepcopy(reference(name)), tmp_path / "decoder")
    settings = {
        "embedder": HashingEmbedder(),
        "compress": CompressConfig(ratio=4.0),
        "chunk": ChunkConfig(segment_tokens=128, window_tokens=32, window_overlap=8),
    }
    with Engine.open(tmp_path / "store", decoder=str(folder), **settings) as engine:
        report = engine.ingest([Document("a", TEXT), Document("b", "The mill in Orrin grinds at low tide. " * 8)])
        assert not report.failed and report.segments >= 3
        answer = engine.ask(QUESTION, generate=GREEDY)
        assert answer.token_ids and answer.usage.prompt_slots > 0 and not answer.warnings
    with Engine.open(tmp_path / "store", embedder=HashingEmbedder()) as again:
        assert again.ask(QUESTION, generate=GREEDY).token_ids == answer.token_ids


@pytest.mark.parametrize("name", ["gemma2", "mixtral", "gpt_oss", "phi3", "opt"])
@pytest.mark.parametrize("recompute", [False, True])
def test_learning_sees_the_same_logits_and_gradients(name, recompute):
    decoder = decoder_of(name)
    prefix, config = whole(decoder), _lora(decoder)
    parameters = decoder.add_adapter(config, "new")
    generator = torch.Generator().manual_seed(3)
    for parameter in parameters.values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    prompts = [Prompt(QUESTION, prefix), Prompt("Where?", prefix)]
    gold = [encode(decoder.tokenizer, text) for text in ("Ida Voss", "Orrin")]
    found = answer_logits(decoder, prompts, gold, "new", recompute=recompute)
    torch.nn.functional.cross_entropy(found.logits, found.targets).backward()
    assert all(parameter.grad is not None and bool(parameter.grad.abs().sum()) for parameter in parameters.values())
    grads = {key: parameter.grad.clone() for key, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    again = answer_logits(decoder, prompts, gold, "new")
    torch.nn.functional.cross_entropy(again.logits, again.targets).backward()
    torch.testing.assert_close(found.logits, again.logits)
    for key, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, grads[key], rtol=1e-3, atol=1e-5)
    losses = decoder.answer_losses(prompts, ["Ida Voss", "Orrin"], "new")
    end = [[*answer, decoder.end] for answer in gold]
    whole_answers = answer_logits(decoder, prompts, end, "new")
    loss = torch.nn.functional.cross_entropy(whole_answers.logits, whole_answers.targets, reduction="sum")
    assert float(loss.detach()) == pytest.approx(sum(one for one, _ in losses), rel=1e-3)


def _lora(decoder: LocalDecoder):
    from peft import LoraConfig

    names = {name.rpartition(".")[2] for name, _ in decoder.runner.layers.named_modules()}
    return LoraConfig(r=2, target_modules=sorted({"q_proj", "v_proj", "qkv_proj"} & names), init_lora_weights=False)


# -- which runner, and none -----------------------------------------------------------------------------------------


def test_decoders_of_llamas_shape_have_the_loop_and_the_others_the_interface():
    lean = {name for name in SERVED if isinstance(decoder_of(name).runner, LeanRunner)}
    assert lean == {name for name in SERVED if name.startswith("llama, ")} | {"mistral", "qwen2", "qwen3"}
    assert reference("llama, default").config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["llama, yarn", "qwen2", "qwen3"])
def test_the_loop_gives_what_the_interface_does(name, monkeypatch):
    decoder = decoder_of(name)
    monkeypatch.setattr(probe, "serves", lambda config: False)
    other = decoder_of(name)
    assert isinstance(other.runner, InterfaceRunner)
    prefix, asked = whole(decoder), texts(decoder)[1]
    assert apart(logits_of(other, asked, prefix), logits_of(decoder, asked, prefix)) < CLOSE


def test_a_loop_that_gives_other_logits_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr("lloco_engine.decoder.lean._rms_norm", lambda x, weight, epsilon: x * weight)
    decoder = decoder_of("qwen3")
    assert isinstance(decoder.runner, InterfaceRunner)
    assert "gives other logits" in caplog.text
    before, asked = texts(decoder)
    assert apart(logits_of(decoder, asked, whole(decoder)), expected("qwen3", before, asked)) < CLOSE


REFUSED = {
    "qwen3_next": ({"layer_types": ["linear_attention", "full_attention"] * 2}, "linear_attention: what these keep"),
    "jamba": ({"attn_layer_period": 2, "attn_layer_offset": 1}, "a state that moves on with every token"),
    "mamba": ({}, "a state that moves on with every token"),
    "lfm2": ({"layer_types": ["conv", "full_attention"] * 2}, "conv: what these keep"),
    "recurrent_gemma": ({}, "a state that moves on with every token"),
    "diffllama": ({}, r"once, in order, and they did in the order \[0, 0, 1, 1"),
    "gptj": ({"rotary_dim": 8}, "computes it itself"),
    "mpt": ({}, "must say max_position_embeddings"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_run_is_refused_in_one_sentence(kind):
    changes, said = REFUSED[kind]
    model = tiny_of(kind, **changes)
    with pytest.raises(UnsupportedModel, match=said) as caught:
        LocalDecoder(model, tiny_tokenizer(), "tiny")
    sentence = str(caught.value)
    assert sentence.startswith(f"a decoder of {kind!r} cannot be run: ") and "\n" not in sentence


@pytest.mark.parametrize("foreign", ["position_bias", "indices", "block_indices", "sinks"])
def test_attention_that_is_asked_with_what_slots_do_not_know_is_refused(foreign, monkeypatch):
    model = tiny_of("granite")
    for layer in model.model.layers:
        forward = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, forward=forward, **k: forward(*a, **k | {foreign: torch.zeros(1)})
    with pytest.raises(UnsupportedModel, match=f"asked with {foreign}, which slots know nothing of"):
        LocalDecoder(model, tiny_tokenizer(), "tiny")


def test_a_state_beside_keys_and_values_is_found_by_its_logits():
    model = tiny_of("granite")

    class Sums(torch.nn.Module):
        """A layer's MLP that reads the tokens before too."""

        def __init__(self, mlp):
            super().__init__()
            self.mlp = mlp

        def forward(self, x):
            return self.mlp(x.cumsum(1) / 8)

    model.model.layers[1].mlp = Sums(model.model.layers[1].mlp)
    with pytest.raises(UnsupportedModel, match="keys and values are not all that its layers keep"):
        LocalDecoder(model, tiny_tokenizer(), "tiny")


def test_the_model_goes_on_working_by_itself():
    model = copy.deepcopy(reference("gemma2"))
    ids = torch.tensor([texts(decoder_of("gemma2"))[0]])
    wanted = reference("gemma2")(ids).logits
    LocalDecoder(model, tiny_tokenizer(), "tiny")
    assert model.config._attn_implementation == interface.NAME
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    made = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(made, reference("gemma2").generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0))


def test_keys_of_other_families_cannot_be_moved():
    decoder = decoder_of("granite")
    segment = whole(decoder).compact[0]
    config, refused = PrefixConfig(placement="sequence"), "placement must be 'parallel' with a decoder of 'granite'"
    with pytest.raises(ConfigError, match=refused):
        assemble([segment, segment], config, room=Room.of(decoder, 9))
    with pytest.raises(ConfigError, match=refused):
        decoder.memory([place([segment, segment], config, template_tokens=decoder.template_tokens)])


def test_a_placement_that_a_decoder_cannot_read_is_refused_when_a_store_is_opened(tmp_path):
    granite, options = decoder_of("granite"), {"embedder": HashingEmbedder(), "chunk": ChunkConfig(64, 24, 4)}
    with pytest.raises(ConfigError, match="placement must be 'parallel' with a decoder of 'granite'"):
        Engine.open(tmp_path / "s", decoder=granite, prefix=PrefixConfig(placement="sequence"), **options)
    assert not (tmp_path / "s").exists()
    with Engine.open(tmp_path / "s", decoder=granite, compress=CompressConfig("uncompressed"), **options) as engine:
        engine.ingest([Document("a", "Ada keeps the mill.")])
        with pytest.raises(ConfigError, match="placement must be 'parallel' with a decoder of 'granite'"):
            engine.stream("Who?", placement="sequence")


@pytest.mark.parametrize("family", ["llama, default", "qwen3"])
def test_keys_of_llamas_shape_are_moved_by_whatever_runs_them(family, monkeypatch):
    lean = decoder_of(family)
    monkeypatch.setattr(probe, "serves", lambda _: False)
    other = LocalDecoder(copy.deepcopy(reference(family)), tiny_tokenizer(), "tiny")
    assert isinstance(other.runner, InterfaceRunner) and isinstance(lean.runner, LeanRunner)
    segments = [whole(lean).compact[0], whole(lean).compact[0]]
    prefix = assemble(segments, PrefixConfig(placement="sequence"), room=Room.of(lean, 9)).prefix
    ours, theirs = (decoder.answer_losses([Prompt("Who?", prefix)], ["Ada"])[0][0] for decoder in (lean, other))
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_weights_are_packed_where_nothing_is_learned():
    from lloco_engine.decoder.linear import PackedLinear

    model = copy.deepcopy(reference("granite")).half().float()  # as releases are
    decoder = LocalDecoder(model, tiny_tokenizer(), "tiny")
    packed = [part for part in decoder.runner.linears() if isinstance(part, PackedLinear)]
    if not packed:
        pytest.skip("no kernel for half precision here")
    x = torch.randn(3, packed[0].in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        few, plain = packed[0](x), torch.nn.functional.linear(x, packed[0].weight, packed[0].bias)
    torch.testing.assert_close(few, plain, rtol=1e-3, atol=1e-3)
    decoder.add_adapter(_lora(decoder), "new")
    ids, places = torch.arange(10, 40)[None], torch.arange(30)
    with decoder._lock:
        decoder._use("new")
        plain_states = decoder.runner.forward(ids, places, decoder.new_cache(1, 30)).detach()
        with torch.no_grad():
            states = decoder.runner.forward(ids, places, decoder.new_cache(1, 30))
    torch.testing.assert_close(states, plain_states, rtol=1e-2, atol=1e-2)
    assert apart(states, _base(decoder, ids, places)) > 0.1


@torch.no_grad()
def _base(decoder: LocalDecoder, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    with decoder.base() as runner:
        return runner.forward(ids, places, decoder.new_cache(1, 30))


@pytest.mark.parametrize("name", ["llama, yarn", "gemma2", "gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_transformers_is(name, dtype):
    model = copy.deepcopy(reference(name)).to(dtype)
    decoder = LocalDecoder(copy.deepcopy(model), tiny_tokenizer(), "tiny")
    before, asked = texts(decoder)
    wanted = expected(name, before, asked)
    with torch.inference_mode():
        theirs = model(torch.tensor([before + asked])).logits[0, len(before) :].float()
    ours = logits_of(decoder, asked, whole(decoder))
    off, own = ((one - wanted).norm(dim=-1).median() for one in (ours, theirs))
    assert float(off) < 2 * float(own) + 1e-3
