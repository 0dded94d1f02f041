"""The local decoder against transformers' own: the forward pass, greedy text, batches, adapters."""

from __future__ import annotations

import contextlib
import itertools
import threading
import warnings
from typing import Any

import pytest
import torch
from decoder_cases import OTHERS, SHAPES, TARGETS, TEXT, place, save_adapter, spiced, tiny, tokens, whole
from peft import LoraConfig

from lloco_engine.config import GenerateConfig
from lloco_engine.decoder import attention, drafting, interface, lean, local
from lloco_engine.decoder.attention import kernels
from lloco_engine.decoder.lean import LeanRunner
from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.decoder.replay import Replay
from lloco_engine.errors import AdapterError, PromptTooLong, UnsupportedModel
from lloco_engine.finetune.packing import answer_logits
from lloco_engine.shape import DecoderShape
from lloco_engine.testing import tiny_config, tiny_decoder
from lloco_engine.types import Prefix

QUESTION = "Who keeps the mill?"
TWELVE = GenerateConfig(max_new_tokens=12)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 512, "factor": 2.0}
LONGROPE |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


def random_ids(rows: int, count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 280, (rows, count), generator=torch.Generator().manual_seed(seed))


def reference_greedy(model, ids: list[int], count: int, eos: set[int]) -> list[int]:
    prompt = torch.tensor([ids])
    with torch.inference_mode():
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=count, pad_token_id=0
        )[0, len(ids) :].tolist()
    return out[:-1] if out[-1] in eos else out


# -- the forward pass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "changes"), SHAPES)
@torch.inference_mode()
def test_hidden_states_and_logits_are_those_of_transformers(family, changes):
    reference, decoder = spiced(tiny_decoder(family, **changes)), tiny(family, **changes)
    ids = random_ids(2, 40)
    expected = reference(ids, output_hidden_states=True)
    hidden = decoder.runner.forward(ids, torch.arange(40), decoder.new_cache(2, 40))
    torch.testing.assert_close(hidden, expected.hidden_states[-1], **CLOSE)
    torch.testing.assert_close(decoder.runner.logits(hidden), expected.logits, **CLOSE)


@pytest.mark.parametrize(("family", "changes"), SHAPES)
@pytest.mark.parametrize("steps", [[40], [1] * 40, [5, 1, 30, 2, 2], [17, 23]])
@torch.inference_mode()
def test_a_prefill_in_pieces_is_the_prefill_in_one(family, changes, steps):
    reference, decoder = spiced(tiny_decoder(family, **changes)), tiny(family, **changes)
    ids, cache, parts, at = random_ids(1, 40), decoder.new_cache(1, 40), [], 0
    for size in steps:
        parts.append(decoder.runner.forward(ids[:, at : at + size], torch.arange(at, at + size), cache))
        at += size
    torch.testing.assert_close(decoder.runner.logits(torch.cat(parts, 1)), reference(ids).logits, **CLOSE)
    assert cache.length == 40


@pytest.mark.parametrize(("family", "changes"), SHAPES)
@torch.inference_mode()
def test_the_last_token_alone_is_what_it_is_among_all(family, changes):
    decoder = tiny(family, **changes)
    prefix = place(decoder, [whole(decoder), whole(decoder)])
    for rows, pad in ((1, None), (2, torch.tensor([0, 5]))):
        for memory in (None, decoder.memory([prefix] * rows)):
            found = []
            for wanted in (None, 1):
                cache = decoder.new_cache(rows, 31)
                cache.pad = pad
                for at, size in ((0, 12), (12, 18)):
                    ids = random_ids(rows, 30)[:, at : at + size]
                    places = torch.arange(at, at + size) + prefix.start
                    hidden = decoder.runner.forward(ids, places, cache, memory, wanted=wanted)
                    found.append(hidden[:, -1:])
                    assert hidden.shape[1] == (wanted or size)
                found.append(decoder.runner.forward(ids[:, :1], places[-1:] + 1, cache, memory))
            for all_of_them, alone in zip(found[:3], found[3:], strict=True):
                torch.testing.assert_close(alone, all_of_them, **CLOSE)


@pytest.mark.parametrize("longest", [8, 30])  # two matrix products, and the fused kernel
@torch.inference_mode()
def test_left_padding_changes_no_row(longest):
    reference, decoder = spiced(tiny_decoder()), tiny()
    ids, pad = random_ids(3, longest), torch.tensor([0, 3, longest - 1])
    cache = decoder.new_cache(3, longest + 2)
    cache.pad = pad
    positions = (torch.arange(longest) - pad[:, None]).clamp_min(0)
    hidden = decoder.runner.forward(ids, positions, cache)
    step = random_ids(3, 2, seed=9)
    after = decoder.runner.forward(step, torch.arange(longest, longest + 2) - pad[:, None], cache)
    for row, skipped in enumerate(pad.tolist()):
        own = torch.cat((ids[row, skipped:], step[row]))[None]
        expected = reference(own, output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(torch.cat((hidden[row, skipped:], after[row])), expected, **CLOSE)


@torch.inference_mode()
def test_scaled_rotary_embeddings_are_kept():
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 256}
    changes = {"rope_parameters": rope}
    reference, decoder = spiced(tiny_decoder(**changes)), tiny(**changes)
    assert reference.model.rotary_emb.attention_scaling > 1
    ids = random_ids(1, 40)
    hidden = decoder.runner.forward(ids, torch.arange(40), decoder.new_cache(1, 40))
    torch.testing.assert_close(decoder.runner.logits(hidden), reference(ids).logits, **CLOSE)


def test_the_modules_go_on_working_on_the_same_weights():
    model = spiced(tiny_decoder("qwen2"))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ids = random_ids(1, 10)
    expected = model(ids).logits
    runner = LeanRunner(model)
    assert torch.equal(model(ids).logits, expected)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    attention = model.model.layers[0].self_attn
    stored = {part.weight.untyped_storage().data_ptr() for part in (attention.q_proj, attention.k_proj)}
    assert stored == {runner.layers[0].qkv.weight.untyped_storage().data_ptr()}  # nothing is held twice


def test_a_cache_refuses_more_than_it_holds():
    decoder = tiny()
    with pytest.raises(ValueError, match="holds 3 tokens, not 4"):
        decoder.runner.forward(random_ids(1, 4), torch.arange(4), decoder.new_cache(1, 3))


def test_the_rotation_of_keys_can_be_undone_and_added_up():
    runner = tiny().runner
    keys = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(runner.rotate(runner.rotate(keys, 70), -70), keys, **CLOSE)
    torch.testing.assert_close(runner.rotate(runner.rotate(keys, 30), 40), runner.rotate(keys, 70), **CLOSE)
    torch.testing.assert_close(runner.rotate(keys.half(), 9), runner.rotate(keys.half().float(), 9))
    assert not torch.allclose(runner.rotate(keys, 1), keys, atol=0.1)


def test_keys_of_a_scaled_rotary_embedding_are_turned_but_not_scaled():
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 256}
    runner = tiny(rope_parameters=rope).runner
    keys = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(runner.rotate(keys, 0), keys, **CLOSE)
    torch.testing.assert_close(runner.rotate(keys, 300).norm(dim=-1), keys.norm(dim=-1), **CLOSE)


def test_layers_without_attention_are_refused_by_the_configuration():
    from transformers import Lfm2Config

    with pytest.raises(UnsupportedModel, match="each of its 2 layers must ask for attention, and it has some of conv"):
        DecoderShape.of(Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"]))


@pytest.mark.parametrize(
    ("family", "changes", "window"),
    [
        ("llama", {}, 1024),
        ("mistral", {"sliding_window": 64}, 1024),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, 1024),
        ("llama", {"rope_parameters": LONGROPE}, 512),
    ],
)
def test_the_window_is_where_positions_are_what_they_are_in_any_prompt(family, changes, window):
    assert DecoderShape.of(tiny_config(family, **changes)).window == window


# -- greedy text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "changes"), SHAPES)
def test_greedy_from_the_whole_cache_or_the_text_is_transformers_generate(family, changes):
    reference, decoder = spiced(tiny_decoder(family, **changes)), tiny(family, **changes)
    template = decoder.template
    ids = [*template.prefix_ids, *tokens(decoder, TEXT), *template.question_ids(QUESTION)]
    expected = reference_greedy(reference, ids, 12, decoder.eos)
    assert expected
    prefix = place(decoder, [whole(decoder)])
    for prompt in (
        Prompt(QUESTION, prefix),
        Prompt(QUESTION, context=TEXT),
        Prompt(QUESTION, context=tokens(decoder, TEXT)),
        Prompt(QUESTION, prefix, draft=TEXT + decoder.tokenizer.decode(expected) * 2),
    ):
        assert decoder.generate([prompt], TWELVE)[0].token_ids == expected
        made, pieces = decoder.stream(prompt, TWELVE)
        assert "".join(pieces) == made.text
        assert made.token_ids == expected


def test_with_nothing_to_read_it_is_the_plain_chat():
    reference, decoder = spiced(tiny_decoder()), tiny()
    ids = decoder.template.prefix_ids + decoder.template.question_ids(QUESTION)
    rendered = decoder.tokenizer.decode(ids)
    assert rendered.startswith("<|im_start|>user\n")
    assert rendered.endswith(f"Question: {QUESTION}<|im_end|>\n<|im_start|>assistant\n")
    expected = reference_greedy(reference, ids, 12, decoder.eos)
    empty = place(decoder, [])
    for prefix in (None, empty):
        made = decoder.generate([Prompt(QUESTION, prefix)], TWELVE)[0]
        assert (made.token_ids, made.prompt_tokens) == (expected, len(decoder.template.question_ids(QUESTION)))


@pytest.mark.parametrize("wrong", [False, True])
def test_guesses_change_the_steps_but_not_the_text(monkeypatch, wrong):
    decoder, config = tiny(), GenerateConfig(max_new_tokens=40)
    prompt = Prompt(QUESTION, place(decoder, [whole(decoder)]))
    plain = decoder.generate([prompt], config)[0]
    truth = plain.token_ids

    def guess(self, last):
        after = truth[len(last) : len(last) + self.SIZE]
        return [(token + 1) % 280 for token in after] if wrong else after

    monkeypatch.setattr(drafting.Draft, "guess", guess)
    made, pieces = decoder.stream(prompt, config)
    assert "".join(pieces) == plain.text
    assert (made.token_ids, made.finish) == (truth, plain.finish)
    if wrong:
        assert made.steps >= len(truth) - 1
    else:
        assert made.steps <= -(-len(truth) // 3)


def test_a_guess_that_is_half_right_is_kept_by_half(monkeypatch):
    decoder, config = tiny(), GenerateConfig(max_new_tokens=30)
    prompt = Prompt(QUESTION)
    truth = decoder.generate([prompt], config)[0].token_ids
    monkeypatch.setattr(drafting.Draft, "guess", lambda self, last: [*truth[len(last) : len(last) + 1], 7][:2])
    made, pieces = decoder.stream(prompt, config)
    list(pieces)
    assert made.token_ids == truth
    assert made.steps < len(truth) - 5


@pytest.mark.parametrize("lookup", [True, False])
def test_looking_up_the_draft_saves_steps_only_when_asked_for(lookup):
    decoder, plain = tiny(), GenerateConfig(max_new_tokens=30, lookup=False)
    truth = decoder.generate([Prompt(QUESTION)], plain)[0]
    config = GenerateConfig(max_new_tokens=30, lookup=lookup)
    made, pieces = decoder.stream(Prompt(QUESTION, draft=truth.text), config)
    assert "".join(pieces) == truth.text
    assert made.token_ids == truth.token_ids
    assert (made.steps == 29) == (not lookup)


@pytest.mark.parametrize("lookup", [True, False])
def test_no_repeat_holds_in_streams_and_batches_alike(lookup):
    """Also where the text that is looked up is the very circle that the decoder would go round."""
    decoder = tiny()
    circle = decoder.generate([Prompt(QUESTION)], GenerateConfig(max_new_tokens=40))[0]
    config = GenerateConfig(max_new_tokens=40, lookup=lookup, no_repeat_ngram=2)
    truth = decoder.generate([Prompt("Who?"), Prompt(QUESTION)], config)[1].token_ids
    made, pieces = decoder.stream(Prompt(QUESTION, draft=circle.text), config)
    list(pieces)
    assert made.token_ids == truth != circle.token_ids
    pairs = list(itertools.pairwise(truth))
    assert len(pairs) == len(set(pairs))


@pytest.mark.parametrize("lookup", [True, False])
def test_the_shortest_answer_holds_in_streams_and_batches_alike(lookup):
    decoder = tiny()
    plain = decoder.generate([Prompt(QUESTION)], TWELVE)[0]
    decoder.eos = set(plain.token_ids[3:6])
    ended = decoder.generate([Prompt(QUESTION)], TWELVE)[0]
    assert ended.finish == "stop"
    config = GenerateConfig(max_new_tokens=12, min_new_tokens=9, lookup=lookup)
    truth = decoder.generate([Prompt("Who?"), Prompt(QUESTION)], config)[1].token_ids
    made, pieces = decoder.stream(Prompt(QUESTION, draft=plain.text), config)
    list(pieces)
    assert made.token_ids == truth
    assert len(ended.token_ids) < 9 <= len(truth)
    assert not decoder.eos & set(truth)


def test_an_end_token_stops_and_is_not_shown():
    decoder = tiny()
    plain = decoder.generate([Prompt(QUESTION)], TWELVE)[0]
    assert (plain.finish, len(plain.token_ids)) == ("length", 12)
    fifth = plain.token_ids[5]
    first = plain.token_ids.index(fifth)
    decoder.eos = {fifth}
    made = decoder.generate([Prompt(QUESTION)], TWELVE)[0]
    assert (made.finish, made.token_ids) == ("stop", plain.token_ids[:first])
    streamed, pieces = decoder.stream(Prompt(QUESTION), TWELVE)
    assert "".join(pieces) == made.text == decoder.tokenizer.decode(made.token_ids)
    assert (streamed.finish, streamed.token_ids) == ("stop", made.token_ids)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_no_more_tokens_than_asked_for(count):
    decoder, config = tiny(), GenerateConfig(max_new_tokens=count)
    made, pieces = decoder.stream(Prompt(QUESTION, draft=TEXT), config)
    list(pieces)
    batch = decoder.generate([Prompt(QUESTION), Prompt("And when?")], config)
    assert [len(one.token_ids) for one in (made, *batch)] == [count] * 3
    assert {one.finish for one in (made, *batch)} == {"length"}


def test_the_first_token_does_not_wait_for_the_text_that_guesses_come_from(monkeypatch):
    decoder, said = tiny(), []

    def noted(ids: Any) -> drafting.Draft:
        said.append(len(made.token_ids))
        return drafting.Draft(ids)

    monkeypatch.setattr(local, "Draft", noted)
    noted.SIZE = drafting.Draft.SIZE
    made, pieces = decoder.stream(Prompt(QUESTION, draft=TEXT), GenerateConfig(4, min_new_tokens=4))
    list(pieces)
    assert said == [1], "made once, when the first token is there"
    assert len(made.token_ids) == 4


def test_a_stop_string_ends_the_text_before_it():
    decoder, config = tiny(), GenerateConfig(max_new_tokens=24)
    full = decoder.generate([Prompt(QUESTION)], config)[0].text
    stop = full[9:12]
    asked = GenerateConfig(max_new_tokens=24, stop=("never to be seen", stop))
    made, pieces = decoder.stream(Prompt(QUESTION), asked)
    assert "".join(pieces) == made.text == full[: full.find(stop)]
    assert made.finish == "stop"
    assert len(made.token_ids) < 24
    both = decoder.generate([Prompt(QUESTION), Prompt("x")], asked)
    assert (both[0].text, both[0].finish) == (made.text, "stop")


def test_a_seed_gives_the_same_sample_and_another_seed_another():
    decoder = tiny()

    def sample(seed):
        config = GenerateConfig(max_new_tokens=20, temperature=1.0, top_p=0.95, seed=seed)
        made, pieces = decoder.stream(Prompt(QUESTION), config)
        list(pieces)
        assert made.token_ids == decoder.generate([Prompt(QUESTION)], config)[0].token_ids
        return made.token_ids

    torch.manual_seed(0)
    first = sample(3)
    torch.manual_seed(1)
    assert sample(3) == first
    assert sample(4) != first
    before = torch.random.get_rng_state()
    sample(3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_ledger_of_a_generation_is_filled():
    decoder = tiny()
    made, pieces = decoder.stream(Prompt(QUESTION), TWELVE)
    assert (made.finish, made.token_ids) == ("", [])
    list(pieces)
    for one in (made, decoder.generate([Prompt(QUESTION)], TWELVE)[0]):
        assert one.ttft_s > 0
        assert one.decode_s > 0
        assert one.prompt_tokens == len(decoder.template.question_ids(QUESTION))


# -- batches --------------------------------------------------------------------------------------------------------


def prompts_of_all_kinds(decoder) -> list[Prompt]:
    one, two, three = (whole(decoder, text) for text in (TEXT, *OTHERS))
    return [
        Prompt(QUESTION, place(decoder, [one])),
        Prompt("When?", place(decoder, [two, three])),
        Prompt("Is there anything at all under the hill, and who dug for it?"),
        Prompt("Salt?", place(decoder, [one, two], "sequence")),
        Prompt(QUESTION, context=TEXT),
        Prompt("So?", place(decoder, [])),
    ]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_batch_answers_as_one_by_one(family):
    decoder = tiny(family)
    prompts = prompts_of_all_kinds(decoder)
    together = decoder.generate(prompts, TWELVE)
    for prompt, made in zip(prompts, together, strict=True):
        alone = decoder.generate([prompt], TWELVE)[0]
        assert (made.token_ids, made.text, made.finish) == (alone.token_ids, alone.text, alone.finish)


def test_rows_that_share_a_prefix_answer_as_one_by_one():
    decoder = tiny()
    prefix = place(decoder, [whole(decoder), whole(decoder, OTHERS[0])])
    prompts = [Prompt(question, prefix) for question in (QUESTION, "When did she come, and from where?", "Why?")]
    together = decoder.generate(prompts, TWELVE)
    assert [one.token_ids for one in together] == [decoder.generate([p], TWELVE)[0].token_ids for p in prompts]


def test_losses_of_answers_are_transformers_and_do_not_depend_on_the_batch():
    reference, decoder = spiced(tiny_decoder()), tiny()
    prompts = prompts_of_all_kinds(decoder)
    answers = ["Ada Brandt", "", "the firm Kessler, for a century", "no", "Ada Brandt", "42"]
    together = decoder.answer_losses(prompts, answers)
    alone = [decoder.answer_losses([p], [a])[0] for p, a in zip(prompts, answers, strict=True)]
    for (loss, count), (other, other_count), answer in zip(together, alone, answers, strict=True):
        assert loss == pytest.approx(other, rel=1e-4)
        assert count == other_count == len(tokens(decoder, answer)) + 1
    gold = [*tokens(decoder, answers[0]), decoder.tokenizer.eos_token_id]
    ids = [*decoder.template.prefix_ids, *tokens(decoder, TEXT), *decoder.template.question_ids(QUESTION)]
    with torch.inference_mode():
        logits = reference(torch.tensor([ids + gold])).logits[0, len(ids) - 1 : -1]
    expected = -logits.log_softmax(-1)[range(len(gold)), gold].sum()
    assert together[0][0] == pytest.approx(float(expected), rel=1e-4)
    assert together[4][0] == pytest.approx(float(expected), rel=1e-4)
    shared = decoder.answer_losses([prompts[0], Prompt("When?", prompts[0].prefix)], ["Ada Brandt", "1874"])
    assert shared[0][0] == pytest.approx(float(expected), rel=1e-4)


# -- the window -----------------------------------------------------------------------------------------------------


def test_a_prompt_over_the_window_is_refused_with_the_numbers():
    decoder = tiny(max_position_embeddings=200)
    prefix = place(decoder, [whole(decoder)])
    count = len(decoder.template.question_ids(QUESTION))
    most = 200 - prefix.start - count
    assert most > 0
    assert decoder.generate([Prompt(QUESTION, prefix)], GenerateConfig(max_new_tokens=most))
    numbers = rf"window of 200: .*starts at {prefix.start}, the prompt has {count} tokens .*{most + 1}, 201 in all"
    config = GenerateConfig(max_new_tokens=most + 1)
    with pytest.raises(PromptTooLong, match=numbers):
        decoder.generate([Prompt("x"), Prompt(QUESTION, prefix)], config)
    with pytest.raises(PromptTooLong, match=numbers):
        decoder.stream(Prompt(QUESTION, prefix), config)  # before anything is read
    with pytest.raises(PromptTooLong, match=f"starts at {decoder.template_tokens}"):
        decoder.generate([Prompt("why " * 200)], config)
    with pytest.raises(PromptTooLong, match="window of 200"):
        decoder.answer_losses([Prompt("x", prefix)], ["yes " * 200])


# -- placement ------------------------------------------------------------------------------------------------------


def logits_after(decoder, prefix: Prefix) -> torch.Tensor:
    """Logits of every token of the question."""
    ids = decoder.template.question_ids(QUESTION)
    with torch.inference_mode():
        cache = decoder.start_cache(1, len(ids), None)
        places = torch.arange(prefix.start, prefix.start + len(ids))
        hidden = decoder.runner.forward(torch.tensor([ids]), places, cache, decoder.memory([prefix]))
        return decoder.runner.logits(hidden[0])


def test_in_parallel_the_order_of_segments_makes_no_difference():
    decoder = tiny()
    segments = [whole(decoder, text) for text in (TEXT, *OTHERS)]
    first = logits_after(decoder, place(decoder, segments))
    for order in ([2, 0, 1], [1, 0, 2], [2, 1, 0]):
        other = logits_after(decoder, place(decoder, [segments[number] for number in order]))
        torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-4)
    missing = logits_after(decoder, Prefix(tuple(segments[:2]), (0, 0), place(decoder, segments).start))
    assert (missing - first).abs().max() > 0.01


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_in_sequence_keys_are_those_computed_at_these_positions(family):
    # one layer: keys and values depend on the token alone, so the segments in sequence are one text read in one go
    reference, decoder = (spiced(tiny_decoder(family, num_hidden_layers=1)), tiny(family, num_hidden_layers=1))
    texts = (TEXT, *OTHERS)
    prefix = place(decoder, [whole(decoder, text) for text in texts], "sequence")
    assert [offset for offset in prefix.offsets if offset]
    ids = list(decoder.template.prefix_ids)
    for text in texts:
        ids += tokens(decoder, text)
    assert prefix.start == len(ids)
    question = decoder.template.question_ids(QUESTION)
    with torch.inference_mode():
        expected = reference(torch.tensor([ids + question])).logits[0, len(ids) :]
    torch.testing.assert_close(logits_after(decoder, prefix), expected, **CLOSE)
    parallel = logits_after(decoder, place(decoder, prefix.segments))
    assert (parallel - expected).abs().max() > 0.01


# -- adapters -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folders of two adapters, and the merged models."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: (root / name, save_adapter(root / name, seed, targets=targets))
        for name, seed, targets in (("law", 1, TARGETS), ("poems", 2, ["q_proj", "v_proj"]))
    }


@pytest.fixture
def adapted(adapters):
    decoder = tiny()
    with warnings.catch_warnings():  # a test of its own sees to the warnings
        warnings.simplefilter("ignore")
        for name, (folder, _) in adapters.items():
            decoder.load_adapter(folder, name)
    return decoder


def losses(decoder, prefix, adapter=None) -> list[float]:
    prompts = [Prompt(QUESTION, prefix), Prompt("When?"), Prompt(QUESTION, context=TEXT)]
    return [decoder.answer_losses([prompt], ["Ada Brandt came in 1874"], adapter)[0][0] for prompt in prompts]


def test_each_request_has_its_own_adapter(adapted, adapters):
    plain = tiny()
    prefix = place(plain, [whole(plain)])  # segments are made with the base weights
    base = losses(plain, prefix)
    assert adapted.adapters == ("law", "poems")
    merged = {name: tiny() for name in adapters}
    for name, (_, model) in adapters.items():
        merged[name] = type(plain)(model, plain.tokenizer, name)
        assert losses(merged[name], prefix) != pytest.approx(base, rel=1e-2)
    with adapted.base() as runner:
        before = {name: weight.clone() for name, weight in runner.model.state_dict().items()}
    for name in ("law", None, "poems", "law", "none", "poems", None):
        if name in merged:
            assert losses(adapted, prefix, name) == pytest.approx(losses(merged[name], prefix), rel=1e-4)
            made = adapted.generate([Prompt(QUESTION, prefix)], TWELVE, name)[0]
            streamed, pieces = adapted.stream(Prompt(QUESTION, prefix), TWELVE, name)
            list(pieces)
            expected = merged[name].generate([Prompt(QUESTION, prefix)], TWELVE)[0]
            assert made.token_ids == streamed.token_ids == expected.token_ids
        else:
            assert losses(adapted, prefix, name) == base  # to the last bit
    with adapted.base() as runner:
        after = runner.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(weight, before[name]) for name, weight in after.items())


def test_a_segment_is_made_without_the_adapter_used_last(adapted):
    plain = whole(tiny())
    adapted.generate([Prompt(QUESTION)], TWELVE, "law")
    made = whole(adapted)
    assert torch.equal(made.keys, plain.keys)
    assert torch.equal(made.values, plain.values)


def test_an_unfinished_stream_keeps_its_adapter(adapted):
    config = GenerateConfig(max_new_tokens=24)
    expected = adapted.generate([Prompt(QUESTION)], config, "law")[0].token_ids
    made, pieces = adapted.stream(Prompt(QUESTION), config, "law")
    next(pieces)
    adapted.generate([Prompt("And when?")], TWELVE)  # another question, in the midst of the first
    list(pieces)
    assert made.token_ids == expected


def test_a_stream_can_be_read_from_several_threads_and_dropped():
    decoder = tiny()
    expected = decoder.generate([Prompt(QUESTION)], TWELVE)[0].text
    _, pieces = decoder.stream(Prompt(QUESTION), TWELVE)
    text, failed = [next(pieces)], []

    def read_on():
        try:
            text.extend(pieces)
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=read_on)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert not failed
    assert "".join(text) == expected
    _, dropped = decoder.stream(Prompt(QUESTION), TWELVE)
    next(dropped)
    del dropped
    other = threading.Thread(target=decoder.generate, args=([Prompt(QUESTION)], TWELVE), daemon=True)
    other.start()
    other.join(20)
    assert not other.is_alive()


def test_loading_adapters_is_silent(adapters, capfd):
    decoder = tiny()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, (folder, _) in adapters.items():
            decoder.load_adapter(folder, name)
    assert not [str(one.message) for one in caught]
    assert capfd.readouterr() == ("", "")


def test_an_adapter_that_is_not_loaded_is_refused(adapted):
    with pytest.raises(AdapterError, match="'songs' is not loaded; there is law, poems"):
        adapted.generate([Prompt(QUESTION)], TWELVE, "songs")
    with pytest.raises(AdapterError, match="'songs'"):
        adapted.answer_losses([Prompt(QUESTION)], ["x"], "songs")
    with pytest.raises(AdapterError, match="there is none"):
        _, pieces = tiny().stream(Prompt(QUESTION), TWELVE, "songs")
        list(pieces)


@pytest.mark.parametrize("name", ["law", "none"])
def test_an_adapters_name_must_be_free(adapted, adapters, name):
    with pytest.raises(AdapterError, match=repr(name)):
        adapted.load_adapter(adapters["law"][0], name)


def test_a_folder_without_a_fitting_adapter_is_refused_and_leaves_no_trace(tmp_path, adapters):
    decoder = tiny()
    before = decoder.answer_losses([Prompt(QUESTION)], ["Ada"])
    (tmp_path / "empty").mkdir()
    save_adapter(tmp_path / "wide", 3, hidden_size=48)
    for folder in ("missing", "empty", "wide"):
        with pytest.raises(AdapterError, match=folder):
            decoder.load_adapter(tmp_path / folder, "law")
        assert decoder.adapters == ()
        assert decoder.answer_losses([Prompt(QUESTION)], ["Ada"]) == before
    folder, model = adapters["law"]
    decoder.load_adapter(folder, "law")  # the name is still free, and nothing of the others is mixed in
    expected = type(decoder)(model, decoder.tokenizer).answer_losses([Prompt(QUESTION)], ["Ada"])
    assert decoder.answer_losses([Prompt(QUESTION)], ["Ada"], "law")[0] == pytest.approx(expected[0], rel=1e-4)


# -- training -------------------------------------------------------------------------------------------------------


def test_gradients_of_an_adapter_are_transformers_own(adapters):
    decoder = tiny()
    decoder.load_adapter(adapters["law"][0], "law")
    model, runner = decoder.runner.model, decoder.runner
    parameters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    decoder._use("law")
    ids = random_ids(2, 30)
    labels = ids[:, 1:].flatten()

    def gradients(logits):
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels)
        return torch.autograd.grad(loss, list(parameters.values()))

    cache = decoder.new_cache(2, 30)
    first = runner.forward(ids, torch.arange(30), cache)
    for ours, theirs in zip(gradients(runner.logits(first)), gradients(model(ids).logits), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
        assert ours.abs().max() > 0
    prefix = place(decoder, [whole(tiny())])
    cache = decoder.new_cache(2, 30)
    with_memory = runner.forward(ids, torch.arange(30) + prefix.start, cache, decoder.memory([prefix] * 2))
    found = gradients(runner.logits(with_memory))
    assert all(bool(gradient.isfinite().all()) and gradient.abs().max() > 0 for gradient in found)


def test_losses_that_start_from_one_cache_can_be_learned_from_in_any_order(adapters):
    decoder = tiny()
    decoder.load_adapter(adapters["law"][0], "law")
    parameters = [p for name, p in decoder.runner.model.named_parameters() if "lora_" in name]
    for parameter in parameters:
        parameter.requires_grad_(True)
    decoder._use("law")
    first = decoder.template_tokens

    def loss(cache, seed):
        cache.length = first
        ids = random_ids(1, 12, seed)
        hidden = decoder.runner.forward(ids, torch.arange(first, first + 12), cache)
        return torch.nn.functional.cross_entropy(decoder.runner.logits(hidden)[0, :-1], ids[0, 1:])

    cache = decoder.start_cache(1, 12, "law")
    losses = [loss(cache, seed) for seed in (1, 2)]
    together = [torch.autograd.grad(one, parameters) for one in losses]
    for seed, found in zip((1, 2), together, strict=True):
        alone = torch.autograd.grad(loss(decoder.start_cache(1, 12, "law"), seed), parameters)
        for ours, theirs in zip(found, alone, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_an_adapter_on_a_part_that_is_not_adapted_here_is_refused_or_used(tmp_path):
    merged = save_adapter(tmp_path, 1, targets=["q_proj", "lm_head"], tie_word_embeddings=False)
    decoder = tiny(tie_word_embeddings=False)
    try:
        decoder.load_adapter(tmp_path, "law")
    except AdapterError as error:
        assert "lm_head" in str(error)
        return
    expected = type(decoder)(merged, decoder.tokenizer).answer_losses([Prompt(QUESTION)], ["Ada"])
    assert decoder.answer_losses([Prompt(QUESTION)], ["Ada"], "law")[0] == pytest.approx(expected[0], rel=1e-4)


# -- steps that are captured and replayed -----------------------------------------------------------------------------


@pytest.fixture
def replayed(monkeypatch):
    """As on a CUDA device, but that the graph runs the step anew; how often it did."""
    runs = []

    def capture(self):
        class Graph:
            def replay(graph):
                runs.append(1)
                self._logits = self._run(self._tokens, self._cache)

        return Graph()

    monkeypatch.setattr(Replay, "_capture", capture)
    monkeypatch.setattr(LocalDecoder, "replays", property(lambda _: True))
    return runs


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
@pytest.mark.parametrize("reads", ["nothing", "segments", "text"])
@pytest.mark.parametrize("adapter", [None, "new"])
def test_replayed_steps_say_what_plain_ones_do(family, reads, adapter, request):
    decoder = tiny(family)
    if adapter:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
            for name, parameter in decoder.add_adapter(config, adapter).items():
                parameter.data.normal_(std=0.2 if "lora_B" in name else 0.1)
    segments = [whole(decoder), *(whole(decoder, text) for text in OTHERS)]
    prefix = place(decoder, segments) if reads == "segments" else None
    context = tokens(decoder, TEXT) if reads == "text" else None
    prompts = [Prompt(question, prefix, context) for question in (QUESTION, "And when did she come from there?", "?")]
    expected = [made.token_ids for made in decoder.generate(prompts, TWELVE, adapter)]
    runs = request.getfixturevalue("replayed")
    assert [made.token_ids for made in decoder.generate(prompts, TWELVE, adapter)] == expected
    assert len(runs) >= 8
    for prompt, ids in zip(prompts, expected, strict=True):
        made, pieces = decoder.stream(prompt, TWELVE, adapter)
        assert "".join(pieces) == made.text
        assert made.token_ids == ids


def test_what_is_replayed_stays_within_its_room_and_its_adapter(replayed):
    decoder = tiny()
    decoder.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]), "new")
    cache = decoder.start_cache(1, 2, "new")
    step = decoder.stepper(cache, None, "new", 0)
    for _ in range(2):
        step([5])
    with pytest.raises(ValueError, match="one more"):
        step([5])
    step = decoder.stepper(decoder.start_cache(1, 9, "new"), None, "new", 0)
    step([5])
    decoder.drop_adapter("new")
    with pytest.raises(AdapterError, match="not loaded"):
        step([5])


def test_on_a_gpu_torchs_attention_does_not_plan_for_every_shape():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with kernels(torch.device("cuda")):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
        assert torch.backends.cuda.math_sdp_enabled()
    with kernels(torch.device("cpu")):
        assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("masks", [1, 2])
def test_groups_with_a_mask_are_read_as_torch_reads_them(count, group, masks):
    draw = torch.Generator().manual_seed(1)
    q = torch.randn(2, 2 * group, count, 8, generator=draw)
    keys, values = (torch.randn(2, 2, 9, 8, generator=draw) for _ in range(2))
    mask = torch.zeros(masks, 1, count, 9).masked_fill_(torch.rand(masks, 1, count, 9, generator=draw) < 0.5, -1e9)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, keys, values, attn_mask=mask, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(attention._grouped(q, keys, values, mask, 0.3), expected, **CLOSE)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("alike", [True, False])
def test_a_few_queries_are_read_by_plain_products_as_torch_reads_them(rows, alike):
    draw = torch.Generator().manual_seed(1)
    q = torch.randn(2, 2, 3, 8, generator=draw)
    keys, values = (torch.randn(2, 2, 9, 8, generator=draw) for _ in range(2))
    added = torch.randn(rows, *((1, 1) if alike else (2, 3)), 9, generator=draw)
    added[..., 4:7] = -torch.inf
    expected = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=added, scale=0.3)
    torch.testing.assert_close(attention._by_products(q, keys, values, added, 0.3), expected, **CLOSE)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_every_layer_is_run_and_run_again_within_the_kernels_that_are_chosen(family, recompute, monkeypatch):
    within = []

    @contextlib.contextmanager
    def noted(device):
        within.append(device.type)
        yield

    decoder = tiny(family)
    monkeypatch.setattr(lean, "kernels", noted)
    monkeypatch.setattr(interface, "kernels", noted)
    decoder.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]), "new")
    given, end = [Prompt(QUESTION)], decoder.tokenizer.eos_token_id
    answer_logits(decoder, given, [[5, 6, end]], "new", recompute=recompute).logits.sum().backward()
    layers = decoder.shape.layers
    again = layers * recompute
    # The template, the question, and the question's layers again; of a whole model the head too, and each layer twice.
    passes = 2 * layers + again if family == "llama" else 3 + 2 * again
    assert within == ["cpu"] * passes
