"""Handles that were guessed, changed, cut, borrowed or outlived: none may stand for a segment."""

from __future__ import annotations

import random

import pytest
from changes import open_engine

from lloco_engine import Document
from lloco_integrations.handle_syntax import write
from lloco_integrations.handles import HandleFragment, Handles

KEY = b"k" * 32
A_PROMPT = 1000  # forged handles in one prompt


@pytest.mark.parametrize("key", [None, KEY], ids=["nonces", "signed"])
def test_no_forged_handle_resolves(request, report, tmp_path, tiny_loaded, key):
    count, seed = request.config.getoption("--forgeries"), request.config.getoption("--seed")
    rng = random.Random(seed)
    clock = [1e9]
    with open_engine(tmp_path / "store", tiny_loaded) as engine:
        for tenant in ("red", "blue"):
            engine.ingest([Document("a.md", "The pump of hall nine needs oil.")], tenant=tenant)
        red, blue = (engine.store.chunks("a.md", tenant)[0] for tenant in ("red", "blue"))
        handles = Handles(engine, key=key, clock=lambda: clock[0])
        old = handles.mint([red])
        clock[0] += 10_000
        strangers = [handles.mint([blue]) for _ in range(100)]
        elsewhere = Handles(engine, key=None if key is None else b"another key of 16 bytes or more")
        foreign = [elsewhere.mint([red]) for _ in range(100)]
        mine = handles.mint([red])

        def changed(text: str) -> str:
            at = rng.randrange(6, len(text) - 2)
            return text[:at] + rng.choice([c for c in "0123456789abcdef" if c != text[at]]) + text[at + 1 :]

        def forge() -> str:
            kind = rng.randrange(6)
            if kind == 0:
                return write(f"{rng.getrandbits(128):032x}")
            if kind == 1:
                claim = f"{red.segment_id}:1:{int(clock[0]) + rng.randrange(10_000):08x}:{rng.randrange(99):x}"
                return write(f"{claim}:{rng.getrandbits(128):032x}")
            if kind == 2:
                return old
            return rng.choice(strangers) if kind == 3 else rng.choice(foreign) if kind == 4 else changed(mine)

        resolved = tried = refused = 0
        while tried < count:
            prompt = " ".join(forge() for _ in range(A_PROMPT))
            tried += A_PROMPT
            try:
                resolved += len(handles.resolve([prompt], "red").hits)
            except HandleFragment:  # a changed handle is a part of the live one: refused, not read
                refused += 1
        assert [hit.tenant for hit in handles.resolve([mine], "red").hits] == ["red"]  # and the real one does
    report(f"forged handles, {'signed' if key else 'remembered'}", tried, resolved, f"{refused} prompts were refused")
    assert not resolved
