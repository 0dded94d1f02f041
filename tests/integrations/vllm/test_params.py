"""What requests say about their memory: who signed it, whether it is still so, and nothing else is believed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from lloco_engine.store import Manifest
from lloco_integrations.vllm.params import (
    FIELD,
    KEY,
    KEY_FILE,
    Memory,
    Refused,
    read_keys,
    sign,
    store_fingerprint,
    verify,
)

KEYS = (b"k" * 32,)
STORE, IDS = "5" * 64, ("a" * 32, "0123456789abcdef" * 2)
MEMORY = Memory(STORE, IDS, 24, focus=1, priors=(0.0, -1.25), tenant="acmé", expires=1000)
SIGNED = sign(MEMORY, KEYS)
ALTERED = {
    "store": "6" * 64,
    "segments": ["a" * 32, "b" * 32],
    "template": 25,
    "focus": 2,
    "priors": [0.0, -1.5],
    "tenant": "acme",
    "expires": 1001,
    "signature": "0" * 64,
}
MALFORMED = {
    "version": [2, "1", True, None],
    "store": ["", "A" * 64, 5, None],
    "segments": [
        [],
        "a" * 32,
        ["../" * 10 + "ab"],
        ["A" * 32],
        ["a" * 32] * 2,
        ["a" * 31],
        [5],
        [f"{n:032x}" for n in range(1025)],
    ],
    "template": [-1, 1.5, True, "24", 1 << 30],
    "focus": [-1, None, 1e9],
    "priors": [[0.0], [float("nan"), 0.0], [float("inf"), 0.0], ["0", 0.0], [True, 0.0], None, [10**400, 0.0]],
    "tenant": [None, 5, "\ud800", "t" * 1025],
    "expires": [-1, 1.5, None, 2**60],
    "signature": [None, 5, "", "0" * 63, SIGNED[FIELD]["signature"].upper(), SIGNED[FIELD]["signature"] + "\n"],
}


def sent(**changes):
    """A signed request as it comes out of JSON, with changes that nobody signed."""
    return {FIELD: json.loads(json.dumps(SIGNED))[FIELD] | changes}


def test_a_signed_request_is_read_as_it_was_meant():
    assert verify(sent(), KEYS, store=STORE, now=999) == MEMORY
    assert verify(sent(), (b"n" * 32, *KEYS), now=999) == MEMORY, "an old key is accepted beside a new one"
    assert verify({"other": 1}, KEYS) is None
    assert verify(None, KEYS) is None


@pytest.mark.parametrize("name", ALTERED)
def test_an_altered_field_is_refused(name):
    assert sent()[FIELD][name] != ALTERED[name]
    with pytest.raises(Refused, match="signed with the server's key"):
        verify(sent(**{name: ALTERED[name]}), KEYS, now=1)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in MALFORMED for value in MALFORMED[name]])
def test_a_malformed_field_is_refused(name, value):
    with pytest.raises(Refused):
        verify({FIELD: SIGNED[FIELD] | {name: value}}, KEYS, now=1)


def test_a_missing_or_unknown_field_and_what_is_no_object_are_refused():
    for name in SIGNED[FIELD]:
        with pytest.raises(Refused):
            verify({FIELD: {key: value for key, value in SIGNED[FIELD].items() if key != name}}, KEYS, now=1)
    for wrong in ({FIELD: SIGNED[FIELD] | {"more": 1}}, {FIELD: None}, {FIELD: []}, {FIELD: "memory"}):
        with pytest.raises(Refused):
            verify(wrong, KEYS, now=1)


def test_an_old_request_another_store_and_another_key_are_refused():
    with pytest.raises(Refused, match="expired, not 1000"):
        verify(SIGNED, KEYS, now=1000)
    with pytest.raises(Refused, match="expired"):
        verify(SIGNED, KEYS)
    with pytest.raises(Refused, match="another store"):
        verify(SIGNED, KEYS, store="6" * 64, now=1)
    with pytest.raises(Refused, match="server's key"):
        verify(SIGNED, (b"x" * 32,), now=1)


def test_the_salt_tells_memories_and_tenants_apart_and_not_the_hour():
    others = [
        replace(MEMORY, segments=IDS[::-1]),
        replace(MEMORY, focus=2),
        replace(MEMORY, priors=()),
        replace(MEMORY, template=25),
        replace(MEMORY, tenant=""),
        replace(MEMORY, store="6" * 64),
    ]
    salts = [MEMORY.salt(), MEMORY.salt("its own"), *(other.salt() for other in others)]
    assert len(set(salts)) == len(salts)
    assert all(len(salt) == 64 for salt in salts)
    assert replace(MEMORY, expires=5).salt() == MEMORY.salt()


def test_keys_come_from_a_file_or_the_environment_and_short_ones_are_refused(tmp_path, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.delenv(KEY_FILE, raising=False)
    with pytest.raises(ValueError, match=r"there is none; make one with `openssl rand"):
        read_keys()
    monkeypatch.setenv(KEY, "short")
    with pytest.raises(ValueError, match="one is shorter"):
        read_keys()
    monkeypatch.setenv(KEY, "e" * 64)
    assert read_keys() == (b"e" * 64,)
    file = tmp_path / "keys"
    file.write_text("n" * 64 + "\n\n" + "o" * 64 + "\n")
    assert read_keys(file) == (b"n" * 64, b"o" * 64)
    monkeypatch.setenv(KEY_FILE, str(file))
    assert read_keys()[0] == b"n" * 64, "the file goes before the key"
    with pytest.raises(ValueError, match="cannot be read"):
        read_keys(tmp_path / "missing")
    with pytest.raises(ValueError, match="at least 32 bytes"):
        sign(MEMORY, (b"short",))


def test_a_stores_fingerprint_is_that_of_what_its_segments_need():
    names = {
        "decoder_fingerprint": "d",
        "template_fingerprint": "t",
        "memory": "compact_kv",
        "layers": 2,
        "kv_heads": 1,
    }
    manifest = names | {"head_dim": 8, "decoder": "a name", "created": "today"}
    one = store_fingerprint(manifest)
    assert store_fingerprint(manifest | {"decoder": "a folder", "created": "later"}) == one
    for name in (*names, "head_dim"):
        assert store_fingerprint(manifest | {name: "other"}) != one
    assert {*names, "head_dim"} <= set(Manifest.__dataclass_fields__)
