"""Segment files: exact in float16, bounded in int8, and every kind of damage noticed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from store_cases import HEAD_DIM, KV_HEADS, LAYERS, segment

from lloco_engine.errors import SegmentUnavailable, StoreError
from lloco_engine.kinds.compact_kv import CompactKVFormat
from lloco_engine.store import segments
from lloco_engine.types import Segment

ID = "ab" * 16
FORMS = [CompactKVFormat(LAYERS, KV_HEADS, HEAD_DIM, dtype) for dtype in ("float16", "int8")]
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


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.dtype)
def test_heads_without_slots_and_channels_of_zeros(tmp_path, form):
    lengths = torch.tensor([[0, 3, 0], [1, 0, 2]])
    rows = torch.zeros(6, HEAD_DIM)
    rows[:, 0] = torch.arange(6)
    made = Segment(rows, rows, torch.full((6,), -torch.inf), lengths, 7)
    got = segments.read(saved(tmp_path, form, made)[0], ID, form)
    torch.testing.assert_close(got.keys.float(), rows, atol=0.02, rtol=0)
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
    with pytest.raises(SegmentUnavailable, match="keys is F16"):
        segments.read(path, ID, FORMS[1])
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
