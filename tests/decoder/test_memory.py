"""The layout of ragged segments, and attention over it, against a loop over heads."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from decoder_cases import ragged, tiny

from lloco_engine.decoder import cpu_kernel, memory
from lloco_engine.decoder.attention import attend
from lloco_engine.decoder.memory import Memory
from lloco_engine.decoder.slots import TIE
from lloco_engine.kinds.compact_kv import CompactKVFormat
from lloco_engine.store import segments
from lloco_engine.types import Prefix, Segment

DIM, HEADS, LAYERS = 8, 2, 2
LAYOUTS = ("padded", "kernel", "triton")
SEGMENTS = [
    ragged(1, [[3, 9], [1, 20]]),
    ragged(2, [[4, 4], [4, 4]]),
    ragged(3, [[30, 1], [2, 2]]),
]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


needs_kernel = pytest.mark.skipif(not cpu_kernel.runs(), reason="the processor does not convert half precision")


def without_kernel(monkeypatch) -> None:
    """As on a machine that the kernel does not serve."""
    monkeypatch.setattr(memory.cpu_kernel, "reader", lambda *_: None)


def with_triton(monkeypatch) -> None:
    """The GPU's kernel, as Triton's interpreter runs it on the CPU."""
    if os.environ.get("TRITON_INTERPRET") != "1":  # Triton looks when it is imported, which torch may do before
        pytest.skip("Triton's interpreter runs these: make triton")
    pytest.importorskip("triton", reason="make triton installs it")
    from lloco_engine.decoder.gpu_kernel.ragged import Segments

    def reader(device: torch.device, dtype: torch.dtype):
        return partial(Segments, device=device, dtype=dtype) if dtype == torch.float32 else None

    monkeypatch.setattr(memory.cpu_kernel, "reader", reader)


@pytest.fixture
def no_kernel(monkeypatch):
    without_kernel(monkeypatch)


@pytest.fixture(params=LAYOUTS)
def layout(request, monkeypatch):
    if request.param == "padded":
        without_kernel(monkeypatch)
    elif request.param == "triton":
        with_triton(monkeypatch)
    elif not cpu_kernel.runs():
        pytest.skip("the processor does not convert half precision")
    with torch.no_grad():  # else the kernel does not serve
        yield request.param


def prefix(*segments: Segment, focus: int = 0, prior: tuple[float, ...] = ()) -> Prefix:
    return Prefix(segments, (0,) * len(segments), 60, focus=focus, prior=prior)


def make(prefixes, dtype=torch.float32) -> Memory:
    made = Memory.of(prefixes, torch.device("cpu"), dtype, tiny().runner.rotate)
    assert made is not None
    return made


def read(made: Memory, layer: int, q, keys, values, mask, scale=0.3) -> torch.Tensor:
    return attend(q, keys, values, mask, made.layer(layer), scale)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slots_of(segment: Segment, layer: int, head: int) -> slice:
    """Where a head's slots lie, counted one head after the other."""
    begin = 0
    for at_layer, sizes in enumerate(segment.lengths.tolist()):
        for at_head, size in enumerate(sizes):
            if (at_layer, at_head) == (layer, head):
                return slice(begin, begin + size)
            begin += size
    raise AssertionError


def read_by(query, prefix, layer, head, scale) -> list[Segment]:
    """The segments that a query reads: those in which the largest of its logits lie, and those that tie with them."""
    if prefix is None or not 0 < prefix.focus < len(prefix.segments):
        return [] if prefix is None else list(prefix.segments)
    scores = []
    for segment, prior in zip(prefix.segments, prefix.prior or [0.0] * len(prefix.segments), strict=True):
        here = slots_of(segment, layer, head)
        logits = scale * (segment.keys[here].double() @ query.double()) + segment.bias[here]
        scores.append(float(logits.max()) + prior if len(logits) else -math.inf)
    last = sorted(scores, reverse=True)[prefix.focus - 1]
    return [one for one, score in zip(prefix.segments, scores, strict=True) if score >= last - TIE]


def naive(q, keys, values, mask, prefixes, layer, scale) -> torch.Tensor:
    """One query at a time: the slots of its head, then the live tokens it may read."""
    rows, query_heads, count, dim = q.shape
    read = torch.zeros(rows, count, query_heads, dim, dtype=torch.float64)
    for row in range(rows):
        for query_head in range(query_heads):
            head = query_head * keys.shape[1] // query_heads
            for t in range(count):
                slots, biases, seen = [keys[row, head]], [torch.zeros(keys.shape[2])], [values[row, head]]
                for segment in read_by(q[row, query_head, t], prefixes[row], layer, head, scale):
                    here = slots_of(segment, layer, head)
                    slots.append(segment.keys[here])
                    biases.append(segment.bias[here])
                    seen.append(segment.values[here])
                slots, biases, seen = (torch.cat(parts).double() for parts in (slots, biases, seen))
                logits = scale * (slots @ q[row, query_head, t].double()) + biases
                if mask is not None:
                    may = mask[row if mask.shape[0] > 1 else 0, 0, t] == 0
                    logits[: keys.shape[2]].masked_fill_(~may, -torch.inf)
                read[row, t, query_head] = torch.softmax(logits, 0) @ seen
    return read.reshape(rows, count, -1).float()


def halved(segment: Segment) -> Segment:
    return replace(segment, keys=segment.keys.half(), values=segment.values.half())


def live(rows: int, count: int, past: int, group: int = 2):
    """Random queries, live keys and values, and the causal mask."""
    q = random(rows, HEADS * group, count, DIM, seed=11)
    keys, values = (random(rows, HEADS, past + count, DIM, seed=seed) for seed in (12, 13))
    mask = torch.zeros(1, 1, count, past + count)
    mask.masked_fill_(torch.ones(count, past + count).triu(past + 1).bool(), torch.finfo(mask.dtype).min)
    return q, keys, values, mask


ROWS = {
    "one": [prefix(*SEGMENTS)],
    "own": [prefix(*SEGMENTS), prefix(SEGMENTS[1]), prefix(SEGMENTS[2], SEGMENTS[0])],
    "none among them": [None, prefix(SEGMENTS[0]), prefix(), prefix(*SEGMENTS)],
    "shared": [prefix(*SEGMENTS)] * 3,
    "focus on one": [prefix(*SEGMENTS, focus=1)],
    "focus, shared": [prefix(*SEGMENTS, SEGMENTS[0], focus=2, prior=(0.5, -1.0, 2.0, 0.0))] * 3,
    "focus, own": [
        prefix(*SEGMENTS, focus=1, prior=(3.0, 0.0, -2.0)),
        prefix(SEGMENTS[1], focus=1),
        None,
        prefix(*SEGMENTS),
        prefix(SEGMENTS[2], SEGMENTS[0], SEGMENTS[1], focus=2),
    ],
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("count", [1, 5, 20])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("gradients", [False, True])  # without them a fused kernel reads the parts
@pytest.mark.usefixtures("layout")
def test_attention_is_that_of_a_loop_over_slots_and_tokens(rows, count, group, gradients):
    prefixes = ROWS[rows]
    made = make(prefixes)
    q, keys, values, mask = live(len(prefixes), count, 3, group)
    with torch.set_grad_enabled(gradients):
        for layer in range(LAYERS):
            found = read(made, layer, q, keys, values, mask)
            torch.testing.assert_close(found, naive(q, keys, values, mask, prefixes, layer, 0.3), **CLOSE)
        one = read(made, 0, q[:, :, -1:], keys, values, None)
        torch.testing.assert_close(one, naive(q[:, :, -1:], keys, values, None, prefixes, 0, 0.3), **CLOSE)


@pytest.mark.usefixtures("no_kernel")
def test_rows_that_share_a_prefix_hold_it_once():
    same = prefix(*SEGMENTS)
    assert len(make([same] * 5).layer(0).keys) == 1
    assert len(make([same, prefix(*SEGMENTS)]).layer(0).keys) == 2


@pytest.mark.usefixtures("no_kernel")
def test_what_fills_a_head_up_is_never_read():
    made = make([prefix(*SEGMENTS), None])
    for layer in range(LAYERS):
        laid = made.layer(layer)
        real = sum(int(segment.lengths[layer].sum()) for segment in SEGMENTS)
        assert int(laid.bias.isfinite().sum()) == real
        assert bool(laid.keys.isfinite().all() and laid.values.isfinite().all())


@pytest.mark.usefixtures("layout")
def test_extreme_logits_and_a_row_without_slots_never_give_nan():
    segment = ragged(7, [[5, 1], [1, 5]])
    made = make([prefix(segment), None])
    q, keys, values, mask = live(2, 4, 0)
    for factor in (0.0, 1.0, 1e4, -1.0, -1e4):
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                assert bool(read(made, 0, q * factor, keys, values, mask, 1.0).isfinite().all())
    hidden = torch.full_like(mask, torch.finfo(mask.dtype).min)  # only slots may be read; the second row has none
    assert bool(read(made, 0, q, keys, values, hidden, 1.0).isfinite().all())


@pytest.mark.parametrize("rows", ["one", "own", "shared"])
@pytest.mark.usefixtures("layout")
def test_gradients_are_those_of_plain_attention(rows):
    prefixes = ROWS[rows]
    made = make(prefixes)
    q, keys, values, mask = live(len(prefixes), 3, 2)
    weight = random(len(prefixes), 3, HEADS * 2 * DIM, seed=3)
    leaves = [one.clone().requires_grad_(True) for one in (q, keys, values)]
    with torch.enable_grad():
        expected = torch.autograd.grad((naive(*leaves, mask, prefixes, 0, 0.3) * weight).sum(), leaves)
        found = torch.autograd.grad((read(made, 0, *leaves, mask) * weight).sum(), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.usefixtures("layout")
def test_segments_in_half_precision_are_read_as_what_they_hold():
    half = [halved(one) for one in SEGMENTS]
    full = [Segment(one.keys.float(), one.values.float(), one.bias, one.lengths, one.source_tokens) for one in half]
    for count in (1, 4):
        q, keys, values, mask = live(1, count, 2)
        first = read(make([prefix(*half)]), 1, q, keys, values, mask)
        assert torch.equal(first, read(make([prefix(*full)]), 1, q, keys, values, mask))
        mixed = read(make([prefix(half[0], *full[1:])]), 1, q, keys, values, mask)
        assert torch.equal(first, mixed)
    laid = make([prefix(*half)], torch.bfloat16).layer(0)
    assert {laid.keys.dtype, laid.values.dtype, laid.bias.dtype} == {torch.bfloat16}


@pytest.mark.usefixtures("layout")
def test_segments_that_tie_are_read_together_in_any_order():
    q, keys, values, mask = live(1, 3, 2)
    alike = [SEGMENTS[0], SEGMENTS[1], replace(SEGMENTS[0], values=SEGMENTS[0].values + 1)]
    found = [
        read(make([prefix(*(alike[n] for n in order), focus=1)]), 0, q, keys, values, mask)
        for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0))
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], **CLOSE)


@pytest.mark.parametrize(("dtype", "atol"), [("float16", 2e-3), ("int8", 5e-2), ("int4", 0.3)])
def test_segments_out_of_a_store_are_read(tmp_path, dtype, atol):
    written = SEGMENTS[0]
    form = CompactKVFormat(LAYERS, HEADS, DIM, dtype)
    file = tmp_path / "one.safetensors"
    file.write_bytes(segments.encode(written, "0" * 32, form)[0])
    stored = segments.read(file, "0" * 32, form)
    q, keys, values, mask = live(1, 4, 2)
    found = read(make([prefix(stored)]), 0, q, keys, values, mask)
    torch.testing.assert_close(found, naive(q, keys, values, mask, [prefix(written)], 0, 0.3), rtol=0, atol=atol)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.usefixtures("layout")
def test_a_sequence_turns_the_keys_by_their_offsets(stored):
    rotate = tiny().runner.rotate
    placed_here = [replace(one, keys=one.keys.to(stored), values=one.values.to(stored)) for one in SEGMENTS]
    placed = Prefix(tuple(placed_here), (0, 50, 100), 160, "sequence")
    turned = [
        replace(one, keys=rotate(one.keys, offset)) for one, offset in zip(placed_here, placed.offsets, strict=True)
    ]
    q, keys, values, mask = live(1, 4, 2)
    for layer in range(LAYERS):
        ours, theirs = (read(make([one]), layer, q, keys, values, mask) for one in (placed, prefix(*turned)))
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(ours, naive(q, keys, values, mask, [prefix(*turned)], layer, 0.3), **CLOSE)


@pytest.mark.usefixtures("layout")
def test_a_layer_is_laid_out_once():
    made = make([prefix(*SEGMENTS)])
    assert made.layer(1) is made.layer(1)


@needs_kernel
@pytest.mark.parametrize("dim", [4, 64, 72, 128])
@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("focus", [0, 1])
@torch.no_grad()
def test_the_kernel_reads_heads_of_any_size_alone_and_together(dim, count, focus, monkeypatch):
    long = halved(ragged(8, [[700, 1], [64, 128]], dim))
    others = (halved(ragged(9, [[1, 0], [0, 3]], dim)), halved(ragged(10, [[200, 9], [1, 70]], dim)))
    prefixes = [prefix(long, *others, focus=focus, prior=(-4.0, 0.0, 0.0))]
    q = random(1, HEADS * 3, count, dim, seed=1)
    keys, values = (random(1, HEADS, count, dim, seed=seed) for seed in (2, 3))
    mask = torch.zeros(1, 1, count, count)
    mask.masked_fill_(torch.ones(count, count).triu(1).bool(), torch.finfo(mask.dtype).min)
    monkeypatch.setattr("lloco_engine.decoder.cpu_kernel.ragged._ALONE", 0)
    found = []
    for threads in (1, 2, 5):  # whatever torch was told
        monkeypatch.setattr("lloco_engine.decoder.cpu_kernel.team.threads", lambda threads=threads: threads)
        made = make(prefixes)
        for layer in range(LAYERS):
            found.append(read(made, layer, q, keys, values, mask))
            torch.testing.assert_close(found[-1], naive(q, keys, values, mask, prefixes, layer, 0.3), **CLOSE)
        step = read(made, 0, q[:, :, -1:], keys, values, None)
        torch.testing.assert_close(step, naive(q[:, :, -1:], keys, values, None, prefixes, 0, 0.3), **CLOSE)
    for other in (found[2:4], found[4:]):
        torch.testing.assert_close(found[:2], other)


@pytest.mark.usefixtures("layout")
def test_slots_of_no_mass_are_not_read():
    segment = ragged(7, [[5, 1], [1, 5]])
    nothing = replace(segment, bias=torch.full_like(segment.bias, -torch.inf))
    q, keys, values, mask = live(1, 4, 2)
    found = read(make([prefix(nothing)]), 0, q, keys, values, mask)
    torch.testing.assert_close(found, naive(q, keys, values, mask, [None], 0, 0.3), **CLOSE)


@pytest.mark.parametrize("prefixes", [[None], [None, None], [prefix()], [prefix(), None]])
def test_no_segments_need_no_memory(prefixes):
    assert Memory.of(prefixes, torch.device("cpu"), torch.float32, lambda keys, offset: keys) is None


@pytest.mark.usefixtures("layout")
def test_a_bias_is_the_logarithm_of_how_often_a_slot_counts():
    key, value = random(1, DIM, seed=1), random(1, DIM, seed=2)
    lengths = torch.tensor([[1]])
    three = prefix(Segment(key, value, torch.tensor([math.log(3)]), lengths, 3))
    often = Segment(key.repeat(3, 1), value.repeat(3, 1), torch.zeros(3), lengths * 3, 3)
    q, keys, values = random(1, 1, 2, DIM), random(1, 1, 2, DIM, seed=4), random(1, 1, 2, DIM, seed=5)
    torch.testing.assert_close(*(read(make([one]), 0, q, keys, values, None, 0.5) for one in (three, prefix(often))))


BAD_CALLS = {
    "queries of two rows": (lambda q, k, v, m: (q[:2], k[:2], v[:2], m), "rows, not of 2"),
    "queries of another head size": (lambda q, k, v, m: (q[..., :4], k, v, m), "queries must be"),
    "keys of one head": (lambda q, k, v, m: (q, k[:, :1], v, m), "live keys and values"),
    "values that lie otherwise": (lambda q, k, v, m: (q, k, v.mT.contiguous().mT, m), "lie alike"),
    "keys that lie otherwise": (lambda q, k, v, m: (q, *(x.mT.contiguous().mT for x in (k, v)), m), "one after"),
    "queries with gaps": (lambda q, k, v, m: (q.repeat_interleave(2, -1)[..., ::2], k, v, m), "side by side"),
    "fewer values": (lambda q, k, v, m: (q, k, v[:, :, 1:], m), "as many tokens"),
    "half precision": (lambda q, k, v, m: (q.half(), k.half(), v.half(), m.half()), "float32"),
    "a mask of fewer tokens": (lambda q, k, v, m: (q, k, v, m[..., 1:]), "a mask must be"),
    "a mask of true and false": (lambda q, k, v, m: (q, k, v, m == 0), "a mask must be"),
}


@needs_kernel
@pytest.mark.parametrize("bad", BAD_CALLS)
@torch.no_grad()
def test_what_the_kernel_would_misread_is_refused(bad):
    change, said = BAD_CALLS[bad]
    prefixes = [prefix(*SEGMENTS), prefix(SEGMENTS[1]), prefix(SEGMENTS[2])]
    given = live(3, 4, 2)
    read(make(prefixes), 0, *given)
    with pytest.raises(ValueError, match=said):
        read(make(prefixes), 0, *change(*given))


BAD_SEGMENTS = {
    "values of fewer slots": ({"values": SEGMENTS[0].values[1:]}, "keys, values and bias"),
    "a bias of another shape": ({"bias": SEGMENTS[0].bias[:, None]}, "keys, values and bias"),
    "lengths of one layer": ({"lengths": SEGMENTS[0].lengths[:1]}, "lengths must be"),
    "lengths below 0": ({"lengths": SEGMENTS[0].lengths - 2}, "lengths must be"),
    "lengths that add up to more": ({"lengths": SEGMENTS[0].lengths + 1}, "add up"),
}


@needs_kernel
@pytest.mark.parametrize("bad", BAD_SEGMENTS)
@torch.no_grad()
def test_segments_that_do_not_hold_what_they_say_are_refused(bad):
    changes, said = BAD_SEGMENTS[bad]
    with pytest.raises(ValueError, match=said):
        make([prefix(SEGMENTS[1], replace(SEGMENTS[0], **changes))]).layer(0)


@needs_kernel
def test_a_decoder_that_is_warm_has_its_kernel_compiled(tiny_loaded, monkeypatch):
    from lloco_engine.decoder.cpu_kernel import kernel

    prepared = []
    monkeypatch.setattr(kernel, "prepare", lambda: prepared.append(True))
    tiny_loaded.warm()
    assert prepared == [True]
