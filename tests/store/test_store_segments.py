"""Segment files: exact in float16, bounded in int8 and int4, and every kind of damage noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from store_cases import HEAD_DIM, KV_HEADS, LAYERS, segment

from lloco_engine.config import NUMBERS
from lloco_engine.errors import SegmentUnavailable, StoreError
from lloco_engine.kinds import numbers
from lloco_engine.kinds.compact_kv import CompactKVFormat
from lloco_engine.store import segments
from lloco_engine.types import Segment

ID = "ab" * 16
GOLDEN = Path(__file__).parents[1] / "golden"
FORMS = [CompactKVFormat(LAYERS, KV_HEADS, HEAD_DIM, dtype) for dtype in NUMBERS]
FORM = FORMS[0]


def saved(folder, form=FORM, made=None):
    path = folder / f"{ID}.safetensors"
    data, checksum = segments.encode(made or segment("some text"), ID, form)
    path.write_bytes(data)
    return path, checksum


def dequantised_slowly(rows, lengths):
    """What int8 storage should give back, head by head, channel by channel."""
    out, at = torch.empty_like(rows), 0
    for length in lengths.flatten().tolist():
        for channel in range(rows.shape[1]):
            column = rows[at : at + length, channel]
            scale = column.abs().max() / 127 if length else 1.0
            out[at : at + length, channel] = (column / scale).round() * scale if scale else 0.0
        at += length
    return out


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.dtype)
def test_equal_segments_are_equal_files(form):
    files = {segments.encode(segment("some text"), ID, form)[0] for _ in range(9)}
    assert len(files) == 1


def test_bytes_of_a_file_are_read_as_the_file_is(tmp_path):
    path, checksum = saved(tmp_path)
    file = segments.received(path.read_bytes(), ID, FORM)
    assert (file.stats.checksum, file.stats.bytes) == (checksum, path.stat().st_size)
    assert segments.verify(path.read_bytes(), ID, FORM)[1] == checksum
    with pytest.raises(SegmentUnavailable, match=r"bytes that a process sent\) cannot be used"):
        segments.received(path.read_bytes()[:-3], ID, FORM)


def test_files_are_plain_safetensors(tmp_path):
    made = segment("some text")
    path, _ = saved(tmp_path)
    tensors = load_file(path)
    assert set(tensors) == {"keys", "values", "bias", "lengths"}
    assert torch.equal(tensors["keys"], made.keys.half()) and tensors["lengths"].dtype == torch.int32
    got = segments.read(path, ID, FORM)
    for name in ("keys", "values", "bias", "lengths"):
        assert torch.equal(getattr(got, name), tensors[name].to(getattr(got, name).dtype))


def test_int8_agrees_with_a_slow_reference(tmp_path):
    made = segment("some text")
    path, _ = saved(tmp_path, FORMS[1])
    got = segments.read(path, ID, FORMS[1])
    torch.testing.assert_close(got.keys.float(), dequantised_slowly(made.keys, made.lengths), atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(got.values.float(), dequantised_slowly(made.values, made.lengths), atol=2e-3, rtol=1e-3)
    assert load_file(path)["keys"].dtype == torch.int8


def in_15_steps(rows, lengths):
    """What int4 storage should give back, head by head, channel by channel."""
    out, at = torch.empty_like(rows), 0
    for length in lengths.flatten().tolist():
        for channel in range(rows.shape[1]) if length else ():
            column = rows[at : at + length, channel]
            least = column.min().half().float()
            step = ((column.max() - least).clamp_min(0) / 15).half().float()
            codes = ((column - least) / step).round().clamp(0, 15) if step else torch.zeros_like(column)
            out[at : at + length, channel] = least + codes * step
        at += length
    return out


def test_int4_agrees_with_a_slow_reference(tmp_path):
    made = segment("some text")
    path, _ = saved(tmp_path, FORMS[2], made)
    got = segments.read(path, ID, FORMS[2])
    for name in ("keys", "values"):
        rows = getattr(made, name)
        assert torch.equal(getattr(got, name), in_15_steps(rows, made.lengths).half())
        owner = torch.arange(LAYERS * KV_HEADS).repeat_interleave(made.lengths.flatten())
        for head in owner.unique():
            mine, wide = rows[owner == head], rows[owner == head].amax(0) - rows[owner == head].amin(0)
            off = (getattr(got, name)[owner == head].float() - mine).abs()
            assert (off <= wide / 30 * 1.02 + mine.abs() * 2**-10).all(), "half a step, and the rounding of float16"
    assert load_file(path)["keys"].shape == (len(made.keys), HEAD_DIM // 2) and load_file(path)["bias"].itemsize == 2
    assert torch.equal(got.bias, made.bias.half().float()) and got.bias.dtype == torch.float32


def test_int4_takes_a_third_of_what_float16_takes():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4 * 96, 64, generator=generator)
    lengths, positions = torch.full((2, 2), 96), torch.arange(384, dtype=torch.int32)
    made = Segment(rows, rows, rows[:, 0], lengths, 1536, positions)
    sizes = [len(segments.encode(made, ID, CompactKVFormat(2, 2, 64, dtype))[0]) for dtype in ("float16", "int4")]
    assert sizes[1] < 0.3 * sizes[0]


def test_what_was_read_from_int8_is_written_the_same_to_the_byte(tmp_path):
    path, _ = saved(tmp_path, FORMS[1])
    once = path.read_bytes()
    again, _ = saved(tmp_path, FORMS[1], segments.read(path, ID, FORMS[1]))
    assert again.read_bytes() == once


def test_what_was_read_from_int4_is_written_the_same(tmp_path):
    """A segment that is replaced by itself, as refinement does where it made nothing better, does not wander."""
    once = segments.read(saved(tmp_path, FORMS[2])[0], ID, FORMS[2])
    again = segments.read(saved(tmp_path, FORMS[2], once)[0], ID, FORMS[2])
    for name in ("keys", "values", "bias"):
        torch.testing.assert_close(getattr(again, name), getattr(once, name), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("tokens", [2**15, 2**15 + 1])
def test_positions_of_long_chunks_are_kept(tmp_path, tokens):
    rows = torch.ones(6, HEAD_DIM)
    places = torch.tensor([0, 1, 300, 32767, tokens - 2, tokens - 1], dtype=torch.int32)
    made = Segment(rows, rows, rows[:, 0], torch.ones(LAYERS, KV_HEADS, dtype=torch.int64), tokens, places)
    path, _ = saved(tmp_path, FORMS[2], made)
    got = segments.read(path, ID, FORMS[2])
    assert torch.equal(got.positions, places) and got.positions.dtype == torch.int32
    assert load_file(path)["positions"].itemsize == (2 if tokens <= 2**15 else 4)


def test_an_odd_number_of_channels_is_kept_in_int4():
    rows = torch.arange(35.0).reshape(5, 7)
    lengths = torch.tensor([[2, 3]])
    got = numbers.unpacked("x", numbers.packed("x", rows, lengths, "int4", ID), lengths)
    torch.testing.assert_close(got.float(), rows, atol=0.6, rtol=0)
    assert torch.equal(got[[0, 2]].float(), rows[[0, 2]]), "the least numbers are kept as they are"


def test_a_golden_file_of_int4_is_read_as_it_was():
    form = CompactKVFormat(2, 3, 4, "int4")
    got, digest = segments.verify(GOLDEN / "segment_int4.safetensors", ID, form)
    assert digest == "ea96bf61482dbb485932e6002ce0fb0e333f3fca067ef1add06b33b2988e3e46"
    assert got.lengths.tolist() == [[3, 4, 3], [4, 3, 1]] and got.source_tokens == 9
    assert got.keys[0].tolist() == pytest.approx([-0.733887, 0.153687, -0.393066, -0.135376], abs=1e-6) and got.values[
        -1
    ].tolist() == pytest.approx([-0.038757, -0.916016, 0.330078, -0.504883], abs=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("forged", [torch.nan, torch.inf, -torch.inf, -1.0, 6e4])
def test_forged_steps_are_refused_though_the_checksum_is_right(tmp_path, dtype, part, forged):
    path, _ = saved(tmp_path, FORMS[NUMBERS.index(dtype)])
    forge(path, f"{part}.{'scale' if dtype == 'int8' else 'step'}", forged)
    with pytest.raises(SegmentUnavailable, match=f"the steps of its {part} are not finite in float16, or below 0"):
        segments.read(path, ID, FORMS[NUMBERS.index(dtype)])


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.dtype)
@pytest.mark.parametrize("forged", [torch.nan, torch.inf])
def test_a_forged_bias_is_refused_though_the_checksum_is_right(tmp_path, form, forged):
    path, _ = saved(tmp_path, form)
    forge(path, "bias", forged)
    with pytest.raises(SegmentUnavailable, match="its bias is neither finite nor minus infinity"):
        segments.read(path, ID, form)


def forge(path, name, value):
    """Change the last number of a tensor, and the checksum with it."""
    whole = path.read_bytes()
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
    tensors = load_file(path)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, header | {"checksum": segments.checksum(tensors, header)})


@pytest.mark.parametrize("dtype", NUMBERS)
def test_what_is_trained_is_read_as_it_will_be_stored(dtype):
    made = segment("some text")
    rows = made.keys.clone().requires_grad_()
    got = numbers.fake_quantize(rows, made.lengths, dtype)
    kept = numbers.unpacked("x", numbers.packed("x", made.keys, made.lengths, dtype, ID), made.lengths)
    torch.testing.assert_close(got.detach(), kept.float(), atol=1e-6, rtol=0)
    (got * torch.arange(HEAD_DIM)).sum().backward()
    assert torch.equal(rows.grad, torch.arange(HEAD_DIM).float().expand_as(rows)), "as if nothing were rounded"


def test_rows_that_cannot_be_stored_are_not_rounded():
    rows = torch.tensor([[1.0, torch.inf]])
    assert numbers.fake_quantize(rows, torch.tensor([[1]]), "int4") is rows


def test_numbers_whose_steps_would_be_too_large_are_not_written():
    rows = torch.tensor([[-65504.0, 0.0], [65504.0, 0.0]])
    with pytest.raises(StoreError, match=r"finite in float16; segment .* has others in int4"):
        numbers.packed("keys", rows, torch.tensor([[2]]), "int4", ID)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.dtype)
def test_heads_without_slots_and_channels_of_zeros(tmp_path, form):
    lengths = torch.tensor([[0, 3, 0], [1, 0, 2]])
    rows = torch.zeros(6, HEAD_DIM)
    rows[:, 0] = torch.arange(6)
    made = Segment(rows, rows, torch.full((6,), -torch.inf), lengths, 7)
    got = segments.read(saved(tmp_path, form, made)[0], ID, form)
    torch.testing.assert_close(got.keys.float(), rows, atol=0.07 if form.dtype == "int4" else 0.02, rtol=0)
    assert torch.equal(got.lengths, lengths) and torch.equal(got.bias, made.bias)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.dtype)
def test_every_flipped_byte_is_noticed(tmp_path, form):
    path, checksum = saved(tmp_path, form)
    whole = path.read_bytes()
    assert segments.verify(path, ID, form)[1] == checksum
    for at in range(0, len(whole), 7):
        if whole[at : at + 1] == b" ":
            continue  # the padding of the header means nothing
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        with pytest.raises(SegmentUnavailable):
            segments.verify(path, ID, form)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.dtype)
def test_every_truncation_is_noticed_without_the_checksum(tmp_path, form):
    path, _ = saved(tmp_path, form)
    whole = path.read_bytes()
    for size in (*range(0, len(whole), 11), len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(SegmentUnavailable, match="ingest its document again"):
            segments.read(path, ID, form)
    path.write_bytes(whole + b"x")
    with pytest.raises(SegmentUnavailable, match="not the"):
        segments.read(path, ID, form)


def test_a_file_of_another_shape_type_or_name_is_refused(tmp_path):
    path, _ = saved(tmp_path)
    with pytest.raises(SegmentUnavailable, match="its header says"):
        segments.read(path, "cd" * 16, FORM)
    for other in FORMS[1:]:
        with pytest.raises(SegmentUnavailable, match=r"keys is F16|its header says 'lloco\.segment\.1'"):
            segments.read(path, ID, other)
    with pytest.raises(SegmentUnavailable, match="lengths is I32"):
        segments.read(path, ID, CompactKVFormat(LAYERS + 1, KV_HEADS, HEAD_DIM, "float16"))
    with pytest.raises(SegmentUnavailable, match="missing"):
        segments.read(tmp_path / "none", ID, FORM)


def rewritten(path, change):
    """Change the header of a file and nothing else."""
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[start:])


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.pop("lengths"),
        lambda header: header.pop("__metadata__"),
        lambda header: header["__metadata__"].update(source_tokens="many"),
        lambda header: header["keys"].update(data_offsets=[-24, 0]),
        lambda header: header["keys"].update(data_offsets=[at + 10**9 for at in header["keys"]["data_offsets"]]),
        lambda header: header["keys"].update(data_offsets=[at + 10**30 for at in header["keys"]["data_offsets"]]),
        lambda header: header["bias"].update(shape=[float("inf")]),
        lambda header: header["values"].update(dtype="BF16"),
        lambda header: [header[name]["shape"].__setitem__(0, -1) for name in ("bias", "keys", "values")],
        lambda header: [header[name]["shape"].__setitem__(0, -5) for name in ("bias", "keys", "values")],
        lambda header: header.update(keys=header["values"], values=5),
    ],
)
@pytest.mark.parametrize("cut", [False, True])
def test_a_header_that_does_not_fit_the_file_is_noticed_without_the_checksum(tmp_path, change, cut):
    path, _ = saved(tmp_path)
    rewritten(path, change)
    if cut:  # also where sizes and offsets of nothing would add up
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SegmentUnavailable):
        segments.read(path, ID, FORM)


@pytest.mark.parametrize("rows", [0, -1])
def test_offsets_that_agree_with_a_wrong_shape_do_not_help(tmp_path, rows):
    path, _ = saved(tmp_path)

    def change(header):
        begin = 0
        for name, size in (("bias", 4), ("lengths", 4), ("keys", 8), ("values", 8)):
            if name == "lengths":
                end = begin + 4 * LAYERS * KV_HEADS
            else:
                header[name]["shape"][0] = rows
                end = begin + rows * size
            header[name]["data_offsets"] = [begin, end]
            begin = max(end, 0)

    rewritten(path, change)
    with pytest.raises(SegmentUnavailable):
        segments.read(path, ID, FORM)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.dtype)
def test_a_file_of_no_slots_is_refused(tmp_path, form):
    rows = torch.zeros(0, HEAD_DIM)
    made = Segment(rows, rows, torch.zeros(0), torch.zeros(LAYERS, KV_HEADS, dtype=torch.int64), 7)
    path, _ = saved(tmp_path, form, made)
    with pytest.raises(SegmentUnavailable, match="no slots"):
        segments.read(path, ID, form)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.dtype)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"keys": s.keys * torch.nan}, "keys .* must be finite"),
        (lambda s: {"values": s.values.sign() * 1e9}, "values .* must be finite in float16"),
        (lambda s: {"bias": s.bias + torch.inf}, "bias .* must be finite or minus infinity"),
        (lambda s: {"lengths": s.lengths[:1]}, r"lengths .* must be \(2, 3\), not \(1, 3\)"),
        (lambda s: {"keys": s.keys[1:]}, "keys of a segment must be"),
        (lambda s: {"values": s.values[:, 1:]}, "values of a segment must be"),
        (lambda s: {"bias": s.bias[:, None]}, "bias of a segment must be"),
    ],
)
def test_a_segment_of_wrong_shape_or_numbers_is_not_written(form, change, message):
    made = segment("x")
    fields = {name: getattr(made, name) for name in ("keys", "values", "bias", "lengths")}
    with pytest.raises(StoreError, match=message):
        segments.encode(Segment(**fields | change(made), source_tokens=1), ID, form)


def test_the_file_may_go_while_a_segment_is_in_use(tmp_path):
    path, _ = saved(tmp_path)
    got = segments.read(path, ID, FORM)
    path.unlink()
    assert torch.equal(got.keys, segment("some text").keys.half())


def test_writing_to_a_loaded_segment_leaves_its_file_alone(tmp_path):
    path, _ = saved(tmp_path)
    before = path.read_bytes()
    segments.read(path, ID, FORM).keys.zero_()
    assert path.read_bytes() == before
