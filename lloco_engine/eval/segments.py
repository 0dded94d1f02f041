"""Compressed segments kept on disk between runs: compression is what an evaluation spends its time on.

A segment is found again by what it is made of and by what makes it, so runs with other methods, adapters or questions
share it, and a run that was cut off goes on with what it had. It is read as a store would give it back: in float16.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lloco_engine.compress.base import Compressor
from lloco_engine.errors import SegmentUnavailable
from lloco_engine.store.segments import AnyFormat, SegmentFormat, SummaryFormat, encode, verify
from lloco_engine.types import AnySegment

if TYPE_CHECKING:
    from types import ModuleType

    from lloco_engine.decoder.local import LocalDecoder

__all__ = ["SegmentCache"]


class SegmentCache:
    """Makes segments, or finds them.

    Args:
        folder: where they are kept; anything in it may be removed at any time.
        decoder: reads and compresses.
        compressor: what makes them.
    """

    def __init__(self, folder: Path, decoder: LocalDecoder, compressor: Compressor) -> None:
        self.decoder, self.compressor = decoder, compressor
        self.source = _source_hash(compressor)
        shape = decoder.shape
        self._form: AnyFormat = SegmentFormat(shape.layers, shape.kv_heads, shape.head_dim, "float16")
        if compressor.memory == "summary":
            self._form = SummaryFormat(shape.embedding, "float16")
        self._key = json.dumps(
            {
                "decoder": decoder.fingerprint,
                "template": decoder.template.fingerprint,
                "tokenizer": decoder.tokenizer_fingerprint,
                "compressor": compressor.name,
                "settings": compressor.settings,
                "source": self.source,
            },
            sort_keys=True,
        )
        self._folder = folder / hashlib.sha256(self._key.encode()).hexdigest()[:16]
        self.made = 0  # chunks compressed by this object

    def get(self, token_ids: Sequence[int], ratio: float, together: Sequence[float] = ()) -> AnySegment:
        """A chunk's segment at a ratio; where it is not kept yet, those of the other ratios are made along with it.

        Raises:
            ConfigError: as `Compressor.compress` does.
        """
        if (kept := self._kept(token_ids, ratio)) is not None:
            return kept
        ratios = [ratio, *(other for other in together if other != ratio and self._kept(token_ids, other) is None)]
        self.made += 1
        for each, segment in zip(ratios, self.compressor.compress(self.decoder, token_ids, ratios), strict=True):
            self._write(self._identity(token_ids, each), segment)
        made = self._kept(token_ids, ratio)
        assert made is not None
        return made

    def chain(self, chunks: Sequence[Sequence[int]], ratio: float) -> list[AnySegment]:
        """The segments of chunks that follow each other, each made after those before it."""
        made: list[AnySegment] = []
        past: list[int] = []
        for chunk in chunks:
            past = [*past, *([-1] if past else []), *chunk]  # the first one is found as a chunk by itself
            kept = self._kept(past, ratio)
            if kept is None:
                self.made += 1
                (segment,) = self.compressor.compress(self.decoder, chunk, [ratio], made)
                self._write(self._identity(past, ratio), segment)
                kept = self._kept(past, ratio)
                assert kept is not None
            made.append(kept)
        return made

    def _kept(self, token_ids: Sequence[int], ratio: float) -> AnySegment | None:
        """The segment, if it is there with every byte as it was written."""
        identity = self._identity(token_ids, ratio)
        try:
            return verify(self._path(identity), identity, self._form)[0]
        except SegmentUnavailable:
            return None

    def _identity(self, token_ids: Sequence[int], ratio: float) -> str:
        made_of = f"{self._key} {float(ratio)} {' '.join(map(str, token_ids))}"
        return hashlib.sha256(made_of.encode()).hexdigest()[:32]

    def _path(self, identity: str) -> Path:
        return self._folder / identity[:2] / f"{identity}.safetensors"

    def _write(self, identity: str, segment: AnySegment) -> None:
        path = self._path(identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        work = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two runs may make the same segment
        work.write_bytes(encode(segment, identity, self._form)[0])
        os.replace(work, path)


def _source_hash(compressor: Compressor) -> str:
    """Hash of the modules in compress/ that a compressor is made of: a changed method makes new segments."""
    digest = hashlib.sha256()
    for module in sorted(_modules(sys.modules[type(compressor).__module__], set()), key=lambda each: each.__name__):
        if module.__file__ is not None:
            digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()[:16]


def _modules(module: ModuleType, seen: set[str]) -> Iterator[ModuleType]:
    """A module and those of its package that its names come from."""
    if module.__name__ in seen:
        return
    seen.add(module.__name__)
    yield module
    package = module.__name__.rpartition(".")[0]
    for value in vars(module).values():
        home = getattr(value, "__module__", None) or ""
        if isinstance(home, str) and home.startswith(f"{package}.") and home in sys.modules:
            yield from _modules(sys.modules[home], seen)
