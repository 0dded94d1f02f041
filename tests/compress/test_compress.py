"""Attention matching against plain loops in float64, and the contract that every compressor keeps."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from decoder_cases import TEXT, place, spiced, tiny, tokens, whole
from summary_cases import save_tiny_autocompressor

from lloco_engine.compress import attention_matching, chained, registry, repetition
from lloco_engine.compress.attention_matching import AttentionMatching
from lloco_engine.compress.eviction import select
from lloco_engine.compress.least_squares import nnls
from lloco_engine.compress.repetition import causal_attention, spread
from lloco_engine.compress.uncompressed import Uncompressed
from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.errors import ConfigError
from lloco_engine.testing import tiny_decoder
from lloco_engine.types import Segment

SHAPES = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1}),
    ("qwen2", {}),
    ("qwen3", {}),
]
RIDGE = 1e-3
EVERY_ROW = 10**6  # fit_rows that leaves none out


@pytest.fixture(autouse=True)
def _full_precision(request, monkeypatch):
    """Reference queries in the decoder's own precision, whatever this machine's processor is quick at."""
    if "as_the_machine_has_it" not in request.fixturenames:
        monkeypatch.setattr(attention_matching, "quicker_in_bf16", lambda device, dtype: False)


@pytest.fixture
def as_the_machine_has_it():
    """A test that runs the precision chosen for this machine."""


# -- the slow reference ---------------------------------------------------------------------------------------------


@dataclass
class Head:
    """All that one KV head's reference queries saw, in float64."""

    first: int  # template prefix tokens
    keys: np.ndarray  # (P + n, D)
    values: np.ndarray
    logits: np.ndarray  # (M, P + n) of every reference query
    importance: np.ndarray  # (n,)
    own_keys: np.ndarray  # (R, D) of the repetition
    own_values: np.ndarray
    read: np.ndarray  # (query heads, R, D) attention output over everything

    @property
    def attention(self) -> np.ndarray:
        """(M, P + n) softmax over template prefix and chunk alone."""
        return softmax(self.logits)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def reference_heads(decoder: LocalDecoder, model, ids: list[int]) -> list[list[Head]]:
    """By layer and KV head, from transformers' own passes over chunk and repetition."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    first = decoder.template_tokens
    context = [*decoder.template.prefix_ids, *ids]
    repeat = [*decoder.template.repeat_ids(), *ids]
    count, past = len(repeat), len(context)
    # a token of the repetition sees the context and the repetition up to itself
    visible = np.zeros((count, past + count), dtype=bool)
    for t in range(count):
        visible[t, :past] = True
        visible[t, past : past + t + 1] = True
    queries = []

    def note(module, args, kwargs, output):
        # ahead of the rotation, from the layer's own input
        inputs = kwargs["hidden_states"]
        q = module.q_proj(inputs).view(1, count, -1, module.head_dim)
        if hasattr(module, "q_norm"):
            q = module.q_norm(q)
        cos, sin = kwargs["position_embeddings"]
        q = q.transpose(1, 2)
        queries.append(apply_rotary_pos_emb(q, q, cos, sin)[0][0].double().numpy())

    with torch.inference_mode():
        cache = model(torch.tensor([context]), use_cache=True).past_key_values
        hooks = [layer.self_attn.register_forward_hook(note, with_kwargs=True) for layer in model.model.layers]
        mask = torch.zeros(visible.shape).masked_fill_(~torch.from_numpy(visible), torch.finfo(torch.float32).min)
        places = torch.arange(past, past + count)[None]
        model(torch.tensor([repeat]), attention_mask=mask[None, None], position_ids=places, past_key_values=cache)
        for hook in hooks:
            hook.remove()
    heads = []
    for layer, q in enumerate(queries):
        keys, values = (part[0].double().numpy() for part in (cache.layers[layer].keys, cache.layers[layer].values))
        group = q.shape[0] // keys.shape[0]
        row = []
        for head in range(keys.shape[0]):
            importance, mean = np.zeros(len(ids)), np.zeros(len(ids))
            logits, read = [], np.zeros((group, count, q.shape[-1]))
            for query_head in range(head * group, (head + 1) * group):
                for t in range(count):
                    seen = keys[head] @ q[query_head, t] / np.sqrt(q.shape[-1])
                    logits.append(seen[:past])
                    weights = softmax(np.where(visible[t], seen, -np.inf))
                    importance = np.maximum(importance, weights[first:past])
                    mean += weights[first:past] / (group * count)
                    read[query_head - head * group, t] = weights @ values[head]
            importance = importance * mean**0.15 * np.linalg.norm(values[head, first:past], axis=-1) ** 0.35
            context, own = (keys[head, :past], values[head, :past]), (keys[head, past:], values[head, past:])
            row.append(Head(first, *context, np.stack(logits), importance, *own, read))
        heads.append(row)
    return heads


def check_selection(heads: list[list[Head]], keep: list[list[list[int]]], ratio: float) -> None:
    """A tenth of its even share for each head, then the best of all heads together until the budget is used."""
    layers, kv_heads, length = len(heads), len(heads[0]), len(heads[0][0].importance)
    assert sum(len(kept) for row in keep for kept in row) == max(round(length / ratio * layers * kv_heads), 4)
    inside, outside = [], []
    for row, kept_row in zip(heads, keep, strict=True):
        for head, kept in zip(row, kept_row, strict=True):
            assert kept == sorted(set(kept))
            sure = np.sort(head.importance)[-max(1, int(0.1 * length / ratio))] * (1 - 1e-5)
            assert (head.importance[kept] >= sure).sum() >= max(1, int(0.1 * length / ratio))
            inside += [one for one in head.importance[kept] if one < sure]
            outside += np.delete(head.importance, kept).tolist()
    # positions of equal importance may take each other's place
    assert min(inside, default=np.inf) >= max(outside, default=0) * (1 - 1e-4)


def mass_problem(head: Head, kept: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows a, b such that |a w - b|^2 is what the bias minimises over w >= 0, with the slight pull towards w = 1."""
    attention = head.attention
    a, b = attention[:, [head.first + at for at in kept]], attention[:, head.first :].sum(-1)
    pull = np.sqrt(1e-2 * (a**2).sum() / len(kept) + 1e-12)
    return np.vstack((a, pull * np.eye(len(kept)))), np.concatenate((b, np.full(len(kept), pull)))


def value_problem(
    head: Head, kept: list[int], bias: np.ndarray, made: np.ndarray, queries: np.ndarray, own: tuple, again: list[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows x, y such that the ridge least squares |x d - y|^2 is what the values' change d minimises.

    That is: what the first reading's output lacks after template prefix, original values and repetition have been read.

    Args:
        made: the values that the segment has. queries: (G, T, D) of the tokens ``again`` as the compacted decoder asks.
        own: keys and values (T, D) of these tokens, which take the place of the first reading's.

    Returns:
        x, y, and what is read with ``made``, (G, T, D).
    """
    at = [head.first + one for one in kept]
    own_keys, own_values = head.own_keys.copy(), head.own_values.copy()
    own_keys[again], own_values[again] = own
    x, y, read = [], [], np.zeros_like(queries)
    for one in range(len(queries)):
        for t, place_of_t in enumerate(again):
            live = place_of_t + 1
            keys = np.concatenate((head.keys[: head.first], head.keys[at], own_keys[:live]))
            logits = keys @ queries[one, t] / np.sqrt(keys.shape[-1])
            logits[head.first : head.first + len(kept)] += bias
            weights = softmax(logits)
            slots = weights[head.first : head.first + len(kept)]
            values = np.concatenate((head.values[: head.first], head.values[at], own_values[:live]))
            lacks = head.read[one, place_of_t] - weights @ values
            x.append(slots)
            y.append(lacks)
            read[one, t] = weights @ values + slots @ (made - head.values[at])
    x, y = np.stack(x), np.stack(y)
    pull = np.sqrt(max(RIDGE * (x**2).sum() / len(kept), 1e-9))
    return np.vstack((x, pull * np.eye(len(kept)))), np.vstack((y, np.zeros((len(kept), y.shape[1])))), read


def rereading(decoder: LocalDecoder, model, ids: list[int], heads, keep, slots, again: list[int]):
    """Yields head, kept positions, made values and their problem, as the segment's slots are read layer by layer."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    repeat = [*decoder.template.repeat_ids(), *ids]
    body = copy.deepcopy(model).double().model
    places = torch.tensor([again]) + decoder.template_tokens + len(ids)
    hidden = body.embed_tokens(torch.tensor([[repeat[at] for at in again]]))
    for layer, row, kept_row, slots_row in zip(body.layers, heads, keep, slots, strict=True):
        attention, x = layer.self_attn, layer.input_layernorm(hidden)
        q, k, v = (part(x).view(len(again), -1, attention.head_dim) for part in projections(attention))
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], *body.rotary_emb(x, places))
        group, read = q.shape[1] // len(row), []
        for number, (head, kept, (_, made, bias)) in enumerate(zip(row, kept_row, slots_row, strict=True)):
            own = k[0, number].numpy(), v[:, number].numpy()
            queries = q[0, number * group : (number + 1) * group].numpy()
            problem_x, problem_y, head_read = value_problem(head, kept, bias, made, queries, own, again)
            read += list(head_read)
            yield head, kept, made, problem_x, problem_y
        hidden = hidden + attention.o_proj(torch.from_numpy(np.concatenate(read, axis=-1))[None])
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def projections(attention) -> tuple:
    return attention.q_proj, attention.k_proj, attention.v_proj


def head_slots(segment: Segment) -> list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Keys, values and bias by layer and head."""
    parts = [part.double().split(segment.lengths.flatten().tolist()) for part in (segment.keys, segment.values)]
    bias = segment.bias.double().split(segment.lengths.flatten().tolist())
    flat = [tuple(one.numpy() for one in three) for three in zip(*parts, bias, strict=True)]
    heads = segment.lengths.shape[1]
    return [flat[start : start + heads] for start in range(0, len(flat), heads)]


def check(decoder: LocalDecoder, model, ids: list[int], ratios: list[float], fit_tokens: int = EVERY_ROW) -> None:
    """Every head of the segments at ``ratios`` is what the reference makes of it."""
    nnls_exact = pytest.importorskip("scipy.optimize").nnls
    heads = reference_heads(decoder, model, ids)
    method = AttentionMatching(ridge=RIDGE, fit_rows=EVERY_ROW, fit_tokens=fit_tokens, iterations=400)
    again = list(range(min(len(heads[0][0].own_keys), fit_tokens)))
    for ratio, segment in zip(ratios, method.compress(decoder, ids, ratios), strict=True):
        slots = head_slots(segment)
        keep = [
            [[nearest(head.keys[head.first :], key) for key in keys] for head, (keys, _, _) in zip(*pair, strict=True)]
            for pair in zip(heads, slots, strict=True)
        ]
        check_selection(heads, keep, ratio)
        for row, kept_row, slots_row in zip(heads, keep, slots, strict=True):
            for head, kept, (_, _, bias) in zip(row, kept_row, slots_row, strict=True):
                a, b = mass_problem(head, kept)
                best = nnls_exact(a, b)[1] ** 2
                assert ((a @ np.exp(bias) - b) ** 2).sum() <= 1.01 * best + 1e-6 * (b**2).sum()
        with torch.inference_mode():
            for head, kept, values, x, y in rereading(decoder, model, ids, heads, keep, slots, again):
                original = head.values[[head.first + at for at in kept]]
                expected = original + np.linalg.lstsq(x, y, rcond=None)[0]
                np.testing.assert_allclose(values, expected, rtol=2e-2, atol=1e-2 * np.abs(expected).max())
                least = ((x @ (expected - original) - y) ** 2).sum()
                assert ((x @ (values - original) - y) ** 2).sum() <= 1.001 * least + 1e-8 * (y**2).sum()


def nearest(keys: np.ndarray, key: np.ndarray) -> int:
    """Where a kept key lies; the rotation makes all of them differ."""
    distance = np.abs(keys - key).max(-1)
    assert distance.min() < 1e-3
    return int(distance.argmin())


# -- attention matching ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "changes"), SHAPES)
def test_every_head_is_what_plain_loops_make_of_it(family, changes):
    decoder = tiny(family, **changes)
    check(decoder, spiced(tiny_decoder(family, **changes)), tokens(decoder, TEXT), [2, 8, 30])


def test_values_are_fitted_on_the_beginning_of_the_repetition():
    decoder = tiny()
    check(decoder, spiced(tiny_decoder()), tokens(decoder, TEXT), [8], fit_tokens=24)


def same(one: Segment, other: Segment, **close) -> None:
    assert torch.equal(one.lengths, other.lengths)
    assert one.source_tokens == other.source_tokens
    for part in ("keys", "values", "bias"):
        torch.testing.assert_close(getattr(one, part), getattr(other, part), **(close or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize(("rows", "batch"), [(7, 2**25), (64, 2**25), (512, 1), (512, 2**14), (33, 1)])
def test_the_size_of_the_blocks_changes_nothing(monkeypatch, rows, batch):
    decoder, method = tiny(), AttentionMatching(fit_rows=EVERY_ROW)
    ids = tokens(decoder, TEXT)
    plain = method.compress(decoder, ids, [6])[0]
    monkeypatch.setattr(repetition, "_ROWS", rows)
    monkeypatch.setattr(attention_matching, "_BATCH", batch)
    made = method.compress(decoder, ids, [6])[0]
    if rows == 512:  # the same rows in the same order
        same(made, plain, rtol=1e-3, atol=1e-4)
        return
    assert torch.equal(made.lengths, plain.lengths)
    torch.testing.assert_close(made.keys, plain.keys)
    torch.testing.assert_close(made.bias, plain.bias, rtol=0, atol=2e-2)
    torch.testing.assert_close(made.values, plain.values, rtol=2e-2, atol=2e-2)


def test_rows_left_out_of_the_fits_are_spread_over_the_repetition():
    decoder = tiny()
    ids = tokens(decoder, TEXT)
    full, few = (AttentionMatching(fit_rows=rows).compress(decoder, ids, [4])[0] for rows in (EVERY_ROW, 64))
    assert few.lengths.sum() == full.lengths.sum()
    # what stays is chosen by every row, whatever their number in the fits
    assert torch.equal(few.keys, full.keys)
    assert not torch.equal(few.values, full.values)
    before, full_after, few_after = (logits(decoder, segment) for segment in (whole(decoder), full, few))
    assert (few_after - before).abs().mean() < 2 * (full_after - before).abs().mean() + 1e-2


@pytest.mark.parametrize(("group", "tokens", "most"), [(3, 624, 1024), (3, 625, 1024), (4, 100, 200), (2, 64, 64)])
def test_no_token_of_the_repetition_is_left_out_of_the_fits_by_all_query_heads(group, tokens, most):
    rows = spread(group, tokens, most).tolist()
    assert rows == sorted(set(rows))
    assert max(rows) < group * tokens
    assert len(rows) <= most + group
    assert {row % tokens for row in rows} == set(range(tokens))


def test_the_repetition_reads_itself_alike_with_and_without_the_fused_kernel(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    three = [torch.randn(1, 2, 600, 16, generator=generator) for _ in range(3)]
    fused = causal_attention(*three, 0.25)
    monkeypatch.setattr(repetition, "_FUSED", None)
    monkeypatch.setattr(repetition, "_ROWS", 256)  # so that the rows are read in several blocks
    for one, other in zip(causal_attention(*three, 0.25), fused, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def logits(decoder: LocalDecoder, *segments: Segment) -> torch.Tensor:
    """Of every token of a question after the segments."""
    prefix = place(decoder, segments)
    ids = decoder.template.question_ids("Who keeps the mill, and since when?")
    with torch.inference_mode():
        cache = decoder.start_cache(1, len(ids), None)
        places = torch.arange(prefix.start, prefix.start + len(ids))
        hidden = decoder.runner.forward(torch.tensor([ids]), places, cache, decoder.memory([prefix]))
        return decoder.runner.logits(hidden[0])


@pytest.mark.parametrize(("family", "changes"), SHAPES)
def test_at_ratio_1_the_memory_is_the_whole_cache(family, changes):
    decoder = tiny(family, **changes)
    made = AttentionMatching().compress(decoder, tokens(decoder, TEXT), [1])[0]
    full = whole(decoder)
    same(made, full, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(logits(decoder, made), logits(decoder, full), rtol=1e-2, atol=1e-2)


def test_a_higher_ratio_keeps_fewer_slots_and_reads_less_like_the_whole():
    decoder = tiny()
    ids = tokens(decoder, TEXT)
    ratios = [1, 3, 12, 1000]
    segments = AttentionMatching(ridge=1e-3).compress(decoder, ids, ratios)
    expected = logits(decoder, whole(decoder))
    nothing = (logits(decoder) - expected).abs().mean()
    off = [float((logits(decoder, segment) - expected).abs().mean() / nothing) for segment in segments]
    assert off[0] < 0.01
    assert off[1] < 0.3
    assert all(less < more for less, more in pairwise(off))
    for ratio, segment in zip(ratios[:-1], segments, strict=False):
        assert abs(segment.lengths.sum() - len(ids) / ratio * 4) <= 0.5
    assert segments[-1].lengths.tolist() == [[1, 1], [1, 1]]


def test_bias_and_values_bring_it_nearer_than_dropping_slots_does():
    decoder = tiny()
    ids = tokens(decoder, TEXT)
    made, full = AttentionMatching(ridge=1e-3).compress(decoder, ids, [6])[0], whole(decoder)
    original = []
    kept, all_slots = head_slots(made), head_slots(full)
    for row, all_row in zip(kept, all_slots, strict=True):
        for (keys, _, _), (all_keys, all_values, _) in zip(row, all_row, strict=True):
            at = np.abs(keys[:, None] - all_keys[None]).sum(-1).argmin(-1)
            original.append(torch.from_numpy(all_values[at]).float())
    dropped = Segment(made.keys, torch.cat(original), torch.zeros_like(made.bias), made.lengths, made.source_tokens)
    expected = logits(decoder, full)
    assert (logits(decoder, made) - expected).abs().mean() < 0.85 * (logits(decoder, dropped) - expected).abs().mean()


def test_several_ratios_in_one_call_are_those_of_single_calls_and_repeat_exactly():
    decoder, method = tiny(), AttentionMatching()
    ids = tokens(decoder, TEXT)
    together = method.compress(decoder, ids, [16, 2, 5.5])
    for ratio, segment in zip((16, 2, 5.5), together, strict=True):
        same(method.compress(decoder, ids, [ratio])[0], segment)
        same(AttentionMatching().compress(tiny(), ids, [ratio])[0], segment)
    assert method.compress(decoder, ids, []) == []


@pytest.mark.parametrize("ratio", [1, 16])
def test_a_chunk_of_one_token(ratio):
    decoder = tiny()
    made = AttentionMatching().compress(decoder, tokens(decoder, "x"), [ratio])[0]
    full = whole(decoder, "x")
    assert made.lengths.tolist() == [[1, 1], [1, 1]]
    assert made.source_tokens == 1
    torch.testing.assert_close(logits(decoder, made), logits(decoder, full), rtol=1e-2, atol=1e-2)


def test_a_token_many_times_over():
    decoder = tiny()
    made = AttentionMatching().compress(decoder, tokens(decoder, "x") * 60, [10])[0]
    assert made.source_tokens == 60
    assert all(bool(part.isfinite().all()) for part in (made.keys, made.values, made.bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("as_the_machine_has_it")
def test_a_decoder_in_half_precision_is_compressed(dtype):
    model = spiced(tiny_decoder()).to(dtype)
    decoder = LocalDecoder(model, tiny().tokenizer)
    ids = tokens(decoder, TEXT)
    made = AttentionMatching().compress(decoder, ids, [4])[0]
    assert made.bias.dtype == torch.float32
    assert all(bool(part.isfinite().all()) for part in (made.keys, made.values, made.bias))
    expected = logits(decoder, whole(decoder))
    nothing = (logits(decoder) - expected).abs().mean()
    assert (logits(decoder, made) - expected).abs().mean() < 0.5 * nothing


def test_queries_in_half_precision_serve_as_well(monkeypatch):
    decoder = tiny()
    ids, expected, off = tokens(decoder, TEXT), logits(decoder, whole(decoder)), []
    for half in (False, True):
        monkeypatch.setattr(attention_matching, "quicker_in_bf16", lambda device, dtype, half=half: half)
        made = AttentionMatching().compress(decoder, ids, [4])[0]
        assert {part.dtype for part in (made.keys, made.values, made.bias)} == {torch.float32}
        off.append(float((logits(decoder, made) - expected).abs().mean()))
    assert off[1] < 1.2 * off[0]


def test_the_model_is_left_as_it_was():
    decoder = tiny()
    model = decoder.runner.model
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    modules = {name: (type(module), module.forward.__func__) for name, module in model.named_modules()}
    plain = decoder.answer_losses([Prompt("Who?")], ["Ada"])
    AttentionMatching().compress(decoder, tokens(decoder, TEXT), [4])
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    after = {name: (type(module), module.forward.__func__) for name, module in model.named_modules()}
    assert after == modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    assert decoder.answer_losses([Prompt("Who?")], ["Ada"]) == plain


def test_no_tensor_of_a_segment_holds_on_to_more_than_itself():
    made = AttentionMatching().compress(tiny(), tokens(tiny(), TEXT), [16])[0]
    for part in (made.keys, made.values, made.bias):
        assert part.untyped_storage().nbytes() == part.nbytes


def test_an_adapter_does_not_change_a_segment(tmp_path):
    from decoder_cases import save_adapter

    save_adapter(tmp_path, 1)
    decoder = tiny()
    ids = tokens(decoder, TEXT)
    plain = AttentionMatching().compress(decoder, ids, [4])[0]
    decoder.load_adapter(tmp_path, "law")
    decoder.answer_losses([Prompt("Who?")], ["Ada"], "law")
    same(AttentionMatching().compress(decoder, ids, [4])[0], plain)


# -- its parts ------------------------------------------------------------------------------------------------------


def test_the_budget_is_shared_by_all_heads_and_leaves_one_to_each():
    importance = torch.tensor([[[9.0, 8, 7, 6], [1, 2, 0, 0]], [[3.0, 3.5, 0, 0], [0, 0, 0, 0.1]]])
    keep = select(importance, 2, 0.0)
    assert keep.sum() == 8
    assert keep.tolist() == [
        [[True] * 4, [False, True, False, False]],
        [[True, True, False, False], [False, False, False, True]],
    ]
    assert select(importance, 1, 0.0).all()
    assert select(importance, 10**6, 0.0).sum(-1).tolist() == [[1, 1], [1, 1]]
    assert select(torch.zeros(2, 2, 4), 2, 0.0).sum() == 8  # all alike: still the budget, and one in each
    assert select(torch.zeros(2, 2, 4), 2, 0.0).any(-1).all()
    poor = torch.stack([torch.full((1, 40), 1.0), torch.full((1, 40), 1e-6)])
    assert select(poor, 2, 0.0).sum(-1).flatten().tolist() == [39, 1]
    assert select(poor, 2, 0.5).sum(-1).flatten().tolist() == [30, 10]


@pytest.mark.parametrize("size", [1, 3, 40])
def test_the_least_squares_are_those_of_scipy(size):
    exact = pytest.importorskip("scipy.optimize").nnls
    generator = torch.Generator().manual_seed(size)
    a = torch.randn(4, 200, size, generator=generator).abs() ** 3  # heavy tails, as attention has
    b = (a @ (torch.randn(4, size, 1, generator=generator)))[..., 0] + torch.rand(4, 200, generator=generator)
    gram, right = a.transpose(1, 2) @ a, (a.transpose(1, 2) @ b[..., None])[..., 0]
    found = nnls(gram, right, 400)
    assert bool((found >= 0).all())
    for one in range(4):
        best = exact(a[one].double().numpy(), b[one].double().numpy())[1] ** 2
        assert float(((a[one] @ found[one] - b[one]) ** 2).sum()) <= 1.005 * best + 1e-4


# -- the contract ---------------------------------------------------------------------------------------------------


def suited(name, folder, **changes):
    """A decoder that a compressor can work with."""
    if registry.get(name).memory == "compact_kv":
        return tiny(**changes)
    return LocalDecoder.load(str(save_tiny_autocompressor(folder, summary_length=3, **changes)), device="cpu")


@pytest.mark.parametrize("name", registry.NAMES)
def test_every_compressor_keeps_the_contract(name, tmp_path):
    decoder, method = suited(name, tmp_path), registry.get(name)
    ids = tokens(decoder, TEXT)
    segments = method.compress(decoder, tuple(ids), [2, 16])
    assert len(segments) == 2
    assert method.name == name
    assert method.memory in ("compact_kv", "summary")
    again = registry.get(name, **method.settings)
    assert again.settings == method.settings
    for segment in segments:
        if method.memory == "summary":
            assert segment.vectors.shape == (3, decoder.shape.embedding) and segment.source_tokens == len(ids)
            assert not segment.vectors.requires_grad
            assert torch.equal(again.compress(decoder, ids, [2])[0].vectors, segment.vectors)
            continue
        count = int(segment.lengths.sum())
        assert segment.lengths.shape == (2, 2)
        assert segment.lengths.dtype == torch.int64
        assert segment.lengths.min() >= 1
        assert segment.keys.shape == segment.values.shape == (count, 8)
        assert segment.bias.shape == (count,)
        assert segment.bias.dtype == torch.float32
        assert segment.source_tokens == len(ids)
        assert not segment.keys.requires_grad
        assert chained.chain_starts(method, decoder, [5, 5, 5]) == [0, 1, 2]
        assert not chained.reads_chain(method, decoder)
        with pytest.raises(ConfigError, match="makes each segment by itself"):
            chained.compress_after(method, decoder, ids, [2], [segment])
    if method.memory == "compact_kv":
        same(again.compress(decoder, ids, [2])[0], segments[0])


@pytest.mark.parametrize("name", registry.NAMES)
def test_bad_chunks_and_ratios_are_refused(name, tmp_path):
    decoder, method = suited(name, tmp_path, max_position_embeddings=200), registry.get(name)
    longest = method.longest_chunk(decoder)
    with pytest.raises(ConfigError, match="at least one token"):
        method.compress(decoder, [], [2])
    with pytest.raises(ConfigError, match=r"at least 1, not 0\.5"):
        method.compress(decoder, [5], [2, 0.5])
    with pytest.raises(ConfigError, match=f"at most {longest} tokens .*window of 200, not {longest + 1}"):
        method.compress(decoder, [5] * (longest + 1), [2])
    assert method.compress(decoder, [5] * longest, [4])[0].source_tokens == longest


def test_the_longest_chunk_leaves_room_to_be_repeated():
    decoder = tiny(max_position_embeddings=200)
    template = decoder.template_tokens
    assert Uncompressed().longest_chunk(decoder) == 200 - template
    longest = AttentionMatching().longest_chunk(decoder)
    assert 198 <= template + 2 * longest + len(decoder.template.repeat_ids()) <= 200


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ridge": 0}, "ridge must be a number above 0, not 0"),
        ({"ridge": -1.0}, "ridge must be a number above 0"),
        ({"ridge": float("nan")}, "ridge must be a number above 0"),
        ({"fit_rows": 15}, "fit_rows and fit_tokens must be at least 16"),
        ({"fit_tokens": 15}, "fit_rows and fit_tokens must be at least 16"),
        ({"iterations": 0}, "iterations at least 1"),
        ({"floor": 1.5}, "floor must be a number from 0 to 1, not 1.5"),
        ({"speed": 3}, "'attention_matching'.*speed"),
        ({"ridge": "much"}, "ridge must be a number"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        registry.get("attention_matching", **settings)


def test_an_unknown_compressor_is_refused():
    with pytest.raises(ConfigError, match=r"attention_matching, .*uncompressed, not 'zip'"):
        registry.get("zip")


def test_the_whole_cache_is_transformers_own():
    decoder, model = tiny("qwen3"), spiced(tiny_decoder("qwen3"))
    ids = tokens(decoder, TEXT)
    segment = whole(decoder)
    with torch.inference_mode():
        cache = model(torch.tensor([decoder.template.prefix_ids + ids]), use_cache=True).past_key_values
    first = decoder.template_tokens
    for name in ("keys", "values"):
        expected = torch.cat([getattr(layer, name)[0, :, first:].reshape(-1, 8) for layer in cache.layers])
        torch.testing.assert_close(getattr(segment, name), expected, rtol=1e-4, atol=1e-5)
    assert not segment.bias.any()
