"""Reading pages: against a loop over heads, and against the engine's own decoder."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lloco_engine import PrefixConfig, Segment
from lloco_engine.compress.uncompressed import Uncompressed
from lloco_engine.decoder.attention import Cache
from lloco_engine.decoder.local import LocalDecoder
from lloco_engine.prefix import place
from lloco_engine.testing import tiny_config, tiny_decoder, tiny_tokenizer
from lloco_integrations.vllm.pool import PAGE, heads_of, pages_needed
from lloco_integrations.vllm.reading import (
    PIECE,
    TIE,
    Held,
    Layout,
    Pages,
    Recall,
    Turn,
    inverse_frequencies,
    live_mass,
    live_rows,
    merge,
    parts,
)

LAYERS, HEADS, GROUP, DIM = 2, 3, 2, 8
SCALE = DIM**-0.5


def ragged(seed: int, most: int = 40, tokens: int = 60) -> Segment:
    """A segment whose heads have 0 to ``most`` slots."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, most, (LAYERS, HEADS), generator=draw)
    lengths[0, 0], lengths[1, 2] = 0, PAGE  # none, and a page that is full
    slots = int(lengths.sum())
    keys, values = (torch.randn(slots, DIM, generator=draw).half() for _ in range(2))
    return Segment(keys, values, torch.randn(slots, generator=draw), lengths, tokens)


def shelved(*segments: Segment, ranks: int = 1, rank: int = 0) -> tuple[list[Held], Pages]:
    """Segments in a pool whose pages are taken in disorder."""
    needs = [pages_needed(one.lengths.tolist(), ranks)[rank] for one in segments]
    numbers = torch.randperm(sum(needs) + 5, generator=torch.Generator().manual_seed(1)).tolist()
    pool = Pages.empty(len(numbers), DIM, "cpu", torch.float16)
    pool.keys.normal_()  # what was there before
    pool.bias.fill_(3)
    held = []
    for segment, need in zip(segments, needs, strict=True):
        mine, numbers = numbers[:need], numbers[need:]
        where, pages = Held.packed(segment, mine, rank, ranks)
        pool.write(where.pages, pages)
        held.append(where)
    return held, pool


def by_loops(segments, layer, q, focus=0, priors=()):
    """(H, M, D) and (H, M) of queries (H, M, D), one after another."""
    heads, many, dim = q.shape
    out, mass = torch.zeros(heads, many, dim), torch.full((heads, many), -math.inf)
    for head in range(heads):
        each = []
        for segment in segments:
            begin = int(segment.lengths.flatten()[: layer * heads + head].sum())
            here = slice(begin, begin + int(segment.lengths[layer, head]))
            each.append((segment.keys[here].float(), segment.values[here].float(), segment.bias[here]))
        for one in range(many):
            logits = [keys @ q[head, one] * SCALE + bias for keys, _, bias in each]
            if 0 < focus < len(segments):
                added = priors or [0.0] * len(segments)
                best = [
                    float(part.max()) + more if len(part) else -math.inf
                    for part, more in zip(logits, added, strict=True)
                ]
                last = sorted(best)[-focus]
                logits = [part if score >= last - TIE else part[:0] for part, score in zip(logits, best, strict=True)]
            values = torch.cat([each[n][1][: len(part)] for n, part in enumerate(logits)])
            joined = torch.cat(logits)
            if len(joined):
                out[head, one], mass[head, one] = joined.softmax(0) @ values, joined.logsumexp(0)
    return out, mass


@pytest.mark.parametrize("focus, priors", [(0, ()), (1, ()), (2, (0.0, -1.5, 0.7)), (3, ())])
def test_pages_are_read_as_slots_one_by_one(focus, priors):
    segments = [ragged(seed) for seed in range(3)]
    held, pool = shelved(*segments)
    other = ragged(9)
    more, pool_of_other = shelved(other)
    pool = Pages(*(torch.cat(pair) for pair in zip(vars(pool).values(), vars(pool_of_other).values(), strict=True)))
    alone = replace(more[0], pages=more[0].pages + len(pool.keys) - len(pool_of_other.keys))
    recalls = [Recall(tuple(held), 4, focus, priors), Recall((alone,), 4)]
    layout = Layout(recalls, LAYERS, HEADS, torch.device("cpu"))
    q = torch.randn(2, HEADS, 5, DIM)
    for layer in range(LAYERS):
        read, mass = layout.read(layer, pool, q, SCALE)
        for row, (own, chosen, added) in enumerate([(segments, focus, priors), ([other], 0, ())]):
            wanted, weight = by_loops(own, layer, q[row], chosen, added)
            torch.testing.assert_close(read[row], wanted, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(mass[row], weight, atol=1e-5, rtol=1e-5)
    assert layout.read(0, pool, q, SCALE)[1][1, 0].eq(-math.inf).all()  # a head without a slot


@pytest.mark.parametrize("ranks", [3, 6])
def test_a_rank_reads_its_own_heads(ranks):
    segment = ragged(4)
    q = torch.randn(1, HEADS, 2, DIM)
    wanted, _ = by_loops([segment], 1, q[0])
    for rank in range(ranks):
        (held,), pool = shelved(segment, ranks=ranks, rank=rank)
        head = rank // (ranks // HEADS)
        read, _ = Layout([Recall((held,), 0)], LAYERS, 1, torch.device("cpu")).read(
            1, pool, q[:, head : head + 1], SCALE
        )
        torch.testing.assert_close(read[0, 0], wanted[head], atol=1e-5, rtol=1e-5)


def test_live_tokens_and_slots_merge_to_one_softmax():
    segment = ragged(5)
    (held,), pool = shelved(segment)
    live, new = 7, 3
    keys, values = torch.randn(2, HEADS, live + 4, DIM).unbind(0)  # what lies behind is not read
    q = torch.randn(HEADS, GROUP * new, DIM)
    logits = torch.einsum("hmd,hnd->hmn", q, keys[:, :live]) * SCALE
    later = torch.arange(live) > torch.arange(live - new, live)[:, None]
    logits = logits.masked_fill(later.repeat(GROUP, 1), -math.inf)
    alone = torch.einsum("hmn,hnd->hmd", logits.softmax(-1), values[:, :live])
    weight = live_mass(q[None], keys.transpose(1, 2)[None], torch.tensor([live]), new, SCALE)
    torch.testing.assert_close(weight[0], logits.logsumexp(-1))
    read, mass = Layout([Recall((held,), 0)], LAYERS, HEADS, torch.device("cpu")).read(0, pool, q[None], SCALE)
    merged = merge(alone[None], weight, read, mass)[0]
    for head in range(HEADS):
        begin = int(segment.lengths[0, :head].sum())
        here = slice(begin, begin + int(segment.lengths[0, head]))
        slots = q[head] @ segment.keys[here].float().T * SCALE + segment.bias[here]
        whole = torch.cat((slots, logits[head]), -1).softmax(-1)
        wanted = whole @ torch.cat((segment.values[here].float(), values[head, :live]))
        torch.testing.assert_close(merged[head], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_cpu_reads_segments_as_they_are(ranks):
    segments, live, new = [ragged(6), ragged(7), ragged(8)], 9, 3
    q, keys, values = (torch.randn(1, HEADS, many, DIM) for many in (GROUP * new, live, live))
    mask = torch.zeros(1, 1, new, live)
    mask = mask.masked_fill(torch.arange(live) > torch.arange(live - new, live)[:, None], torch.finfo().min)
    held, pool = shelved(*segments)
    read, mass = Layout([Recall(tuple(held), 0, 2, (0.5, 0.0, 1.0))], LAYERS, HEADS, pool.keys.device).read(
        1, pool, q, SCALE
    )
    logits = q @ keys.transpose(2, 3) * SCALE + mask.repeat(1, 1, GROUP, 1)
    wanted = merge(logits.softmax(-1) @ values, logits.logsumexp(-1), read, mass)
    for rank in range(ranks):
        kept = tuple(Held.whole(one, rank, ranks) for one in segments)
        slots = Recall(kept, 0, 2, (0.5, 0.0, 1.0)).slots
        own = heads_of(rank, ranks, HEADS)
        mine = [part[:, own.start : own.stop].contiguous() for part in (q, keys, values, wanted)]
        asked = mine[0].view(1, len(own) * GROUP, new, DIM)
        made = slots.layer(1).attend(asked, mine[1], mine[2], mask, SCALE).view(new, len(own) * GROUP, DIM)
        expected = mine[3].view(len(own) * GROUP, new, DIM).transpose(0, 1)
        torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)


def plan(recalls, starts, ends):
    made = parts(recalls, starts, ends, layers=LAYERS, heads=HEADS, device=torch.device("cpu"))
    return {part.tokens.shape[1]: (part.rows.tolist(), part.tokens.tolist(), part.ends.tolist()) for part in made}


def test_a_step_is_planned_by_what_lies_behind_the_template_prefix():
    recall = Recall(tuple(shelved(ragged(1))[0]), template=4)
    # a first pass of 6, a step, a row without memory, a chunk inside the template, one that goes beyond it, a step
    starts, ends = [0, 6, 7, 10, 12, 15, 16], [6, 9, 8, 3, 5, 30]
    rows = dict.fromkeys((0, 1, 3, 4, 5), recall)
    assert plan(rows, starts, ends) == {
        2: ([0], [[4, 5]], [6]),
        1: ([1, 4, 5], [[6], [14], [15]], [9, 5, 30]),
    }
    assert plan({3: recall}, starts, ends) == {}


def test_a_long_prompt_is_read_in_pieces():
    recall = Recall(tuple(shelved(ragged(1))[0]), template=4)
    made = plan({0: recall}, [0, 4 + PIECE + 10], [4 + PIECE + 10])
    assert made[PIECE][2] == [4 + PIECE] and made[10][1][0][0] == 4 + PIECE and made[10][2] == [4 + PIECE + 10]


def test_queries_go_out_and_come_back_in_order():
    recall = Recall(tuple(shelved(ragged(1))[0]), template=0)
    (part,) = parts({0: recall, 1: recall}, [0, 3, 6], [3, 3], layers=LAYERS, heads=HEADS, device=torch.device("cpu"))
    query = torch.randn(6, HEADS * GROUP, DIM)
    q = part.asked(query, HEADS)
    assert torch.equal(q[1, 2, 1 * 3 + 2], query[5, 2 * GROUP + 1])  # (head 2, second of its group, third token)
    assert torch.equal(part.answered(q), query[part.tokens])


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_a_key_is_turned_as_the_decoder_turns_it(rope):
    decoder = LocalDecoder(tiny_decoder(rope_parameters=rope), tiny_tokenizer(), "tiny")
    keys = torch.randn(5, 8)
    turn = Turn(inverse_frequencies(decoder.runner.model.config, 8))
    turned = Turn.turned(keys[:, None], *turn.by(torch.full((5,), 37), torch.zeros(5)))[:, 0]
    torch.testing.assert_close(turned, decoder.runner.rotate(keys, 37), atol=2e-5, rtol=2e-5)


def test_a_key_that_is_turned_on_is_as_if_it_had_been_turned_at_once():
    """To rounding of the key's own size, however far: an angle in float32 is off by 1e-4 at some thousand positions."""
    decoder = LocalDecoder(tiny_decoder(), tiny_tokenizer(), "tiny")
    keys, turn = torch.randn(7, 8), Turn(inverse_frequencies(decoder.runner.model.config, 8))
    for far in (1537, 3001, 30011):
        for at, key in enumerate(keys, 60):
            on = turn.by(torch.tensor([far]), torch.tensor([at]))
            turned = Turn.turned(decoder.runner.rotate(key[None], at)[:, None], *on)[:, 0]
            torch.testing.assert_close(turned, decoder.runner.rotate(key[None], far + at), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ],
)
def test_positions_that_cannot_be_moved_are_refused(changes):
    with pytest.raises(ValueError, match=r"rope_type|whole keys"):
        inverse_frequencies(tiny_config(**changes), 8)


def test_a_decoder_that_reads_pages_says_what_the_local_one_does():
    """All layers by this module, with text at positions that know nothing of segments, against `LocalDecoder`."""
    decoder = LocalDecoder(tiny_decoder(), tiny_tokenizer(), "tiny")
    texts = [list(range(30 + seed, 70 + 3 * seed)) for seed in range(3)]
    segments = [Uncompressed().compress(decoder, ids, [1])[0] for ids in texts]
    prefix = place(
        segments, PrefixConfig(focus=2, relevance=1.0), template_tokens=decoder.template_tokens, scores=[0.2, 0.1, 0.3]
    )
    before, asked = decoder.template.prefix_ids, [41, 52, 63, 44]
    cache = decoder.start_cache(1, len(asked), None)
    hidden = decoder.step([asked], prefix.start - cache.length, cache, decoder.memory([prefix]), None)
    wanted = decoder.runner.logits(hidden)[0]

    layers, heads = segments[0].lengths.shape
    needs = [pages_needed(one.lengths.tolist(), 1)[0] for one in segments]
    pool, held, first = Pages.empty(sum(needs), 8, "cpu", torch.float32), [], 0
    for segment, need in zip(segments, needs, strict=True):
        where, pages = Held.packed(segment, range(first, first + need), 0, 1)
        pool.write(where.pages, pages)
        held.append(where)
        first += need
    recall = Recall(tuple(held), len(before), prefix.focus, prefix.prior)
    live = len(before) + len(asked)
    (part,) = parts({0: recall}, [0, live], [live], layers=layers, heads=heads, device=torch.device("cpu"))
    cos, sin = Turn(inverse_frequencies(decoder.runner.model.config, 8)).by(part.shifts, part.positions[0])
    scale = decoder.runner.scale

    def attention(layer, q, keys, values):
        flat, new = q[0].transpose(0, 1).clone(), keys[0].transpose(0, 1).clone()
        flat[part.tokens[0]] = Turn.turned(flat[part.tokens[0]], cos, sin)
        new[part.tokens[0]] = Turn.turned(new[part.tokens[0]], cos, sin)
        k, v = new.transpose(0, 1)[None], values
        alone = torch.nn.functional.scaled_dot_product_attention(
            flat.transpose(0, 1)[None], k, v, is_causal=True, scale=scale, enable_gqa=True
        )[0].transpose(0, 1)
        asking = part.asked(flat, heads)
        read, mass = part.layout.read(layer, pool, asking, scale)
        weight = live_mass(asking, k.transpose(2, 3), part.ends, len(asked), scale)
        out = alone.clone()
        out[part.tokens[0]] = part.answered(merge(part.asked(alone, heads), weight, read, mass))[0]
        return out.flatten(1)[None]

    shape = decoder.runner.shape
    plain = Cache(layers, 1, heads, shape.head_dim, live, device=torch.device("cpu"), dtype=torch.float32)
    ids = torch.tensor([before + asked])
    with torch.inference_mode():
        made = decoder.runner.forward(ids, torch.arange(live), plain, attention=attention)
        logits = decoder.runner.logits(made)[0, len(before) :]
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("live", [1, 16, 17, 40])
def test_live_tokens_of_one_block_and_of_several_lie_alike(live):
    size, many = 16, -(-live // 16)
    keys, values = torch.randn(2, many, HEADS, size, DIM)
    blocks = torch.cat((keys.transpose(2, 3).reshape(many, HEADS, size, DIM), values), 2)
    made = live_rows(blocks, live)
    for found, wanted in zip(made, (keys, values), strict=True):
        assert found.equal(wanted.transpose(0, 1).reshape(1, HEADS, -1, DIM)[:, :, :live])
    assert made[0].stride() == made[1].stride() and made[0].stride(3) == 1
