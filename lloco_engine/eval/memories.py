"""What the two kinds of memory cost beside each other: bytes on disk, time to first token, seconds of compressing.

Sizes and times do not depend on what a summary says, so summary tokens of random numbers serve where no trained
compressor fits the decoder; the result says so. Quality cannot be measured with them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lloco_engine.compress import registry
from lloco_engine.compress.autocompressor import AutoCompressor
from lloco_engine.compress.summary_tokens import SummaryTokens
from lloco_engine.config import NUMBERS, ChunkConfig, Config, DType, GenerateConfig
from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.errors import ConfigError
from lloco_engine.eval.corpus import source_ids
from lloco_engine.eval.machine import circumstances
from lloco_engine.eval.timing import seconds
from lloco_engine.kinds import Format, Sizes
from lloco_engine.kinds.compact_kv import CompactKV
from lloco_engine.kinds.summary import Summary, SummarySegment
from lloco_engine.models import DEFAULT_DECODER
from lloco_engine.prefix import Room, assemble
from lloco_engine.shape import DecoderShape
from lloco_engine.store import segments as files
from lloco_engine.types import AnySegment, Prefix

__all__ = ["LLAMA_2_7B", "MemoriesConfig", "run", "segment_bytes"]

_QUESTION = "What is said about the clamp?"
_SEED = 0
# Of the decoder that the published summary compressor was made from: its sizes on disk are computed, not measured.
LLAMA_2_7B = DecoderShape(32, 32, 32, 128, 4096, 4096, 32000, 4096, True)


@dataclass(frozen=True)
class MemoriesConfig(Config):
    """Settings.

    Args:
        decoder, device: as `LocalDecoder.load` takes them.
        segments: chunks that are compressed and read together.
        segment_tokens: tokens of each.
        summary_length: vectors of a segment; the published models have 50.
        ratio: source tokens per slot of compact KV, beside one row with as many slots as summaries have.
        repeats: measurements of each time, taken in turn.
    """

    decoder: str = DEFAULT_DECODER
    device: str | None = None
    segments: int = 4
    segment_tokens: int = ChunkConfig.segment_tokens
    summary_length: int = 50
    ratio: float = 16.0
    repeats: int = 5

    def __post_init__(self) -> None:
        for name in ("segments", "segment_tokens", "summary_length", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.segment_tokens < self.summary_length:
            raise ConfigError(f"segment_tokens must be at least summary_length, {self.summary_length}")


@dataclass(frozen=True)
class _Kind:
    """One row: how its segments are made (from those before, in document order) and kept."""

    name: str
    make: Callable[[Sequence[int], Sequence[AnySegment]], AnySegment]
    form: Callable[[DType], Format]


def run(
    config: MemoriesConfig,
    *,
    decoder: LocalDecoder | None = None,
    progress: Callable[[str, float, float], None] | None = None,
) -> dict[str, Any]:
    """Measure both kinds on one decoder; a minute or two.

    Args:
        config: the settings.
        decoder: one that is loaded already.
        progress: is told what is done.

    Returns:
        ``rows``, one a kind, and ``no_context``; ``llama_2_7b``, sizes computed from its shape; the configuration and
        the machine. JSON-ready.

    Raises:
        ConfigError, ModelNotFound: as their messages say.
    """
    decoder = decoder or LocalDecoder.load(config.decoder, device=config.device)
    size = config.segment_tokens
    ids = source_ids(decoder.tokenizer, size * config.segments)
    chunks = [ids[at : at + size] for at in range(0, len(ids), size)]
    kinds = _kinds(config, decoder)
    rows = []
    with TemporaryDirectory() as folder:
        prepared = []
        for number, kind in enumerate(kinds):
            made: list[AnySegment] = []
            spent = []
            for done, chunk in enumerate(chunks):
                if progress is not None:
                    progress("compressing", number * len(chunks) + done, len(kinds) * len(chunks))
                began = time.perf_counter()
                made.append(kind.make(chunk, made))
                spent.append(time.perf_counter() - began)
            paths = [_write(Path(folder), f"{number:02d}{at:030d}", one, kind) for at, one in enumerate(made)]
            prepared.append((kind, made, spent, paths))
        times = _first_tokens(decoder, config, prepared)
        for (kind, made, spent, _), ttft in zip(prepared, times[1:], strict=True):
            on_disk = {
                dtype: median(len(files.encode(one, "0" * 32, kind.form(dtype))[0]) for one in made)
                for dtype in NUMBERS
            }
            rows.append(
                {
                    "memory": kind.name,
                    "slots_per_segment": made[0].slots,
                    "bytes_per_segment": on_disk,
                    "bytes_per_source_token": {dtype: value / size for dtype, value in on_disk.items()},
                    "prompt_slots": sum(one.slots for one in made),
                    "ttft_s": median(ttft),
                    "ttft_over_no_context": median(own / plain for own, plain in zip(ttft, times[0], strict=True)),
                    "compress_s_per_segment": median(spent),
                }
            )
    return {
        "rows": rows,
        "no_context": {"ttft_s": median(times[0])},
        "llama_2_7b": {
            "note": "computed from the shape; bytes of one segment's numbers in float16",
            "summary": segment_bytes(LLAMA_2_7B, "summary", config.summary_length),
            "compact_kv_same_slots": segment_bytes(LLAMA_2_7B, "compact_kv", config.summary_length),
            "compact_kv": segment_bytes(LLAMA_2_7B, "compact_kv", size / config.ratio),
        },
        "config": config.to_json()
        | {"summary_tokens": f"random numbers, seed {_SEED}; nothing here says how good a summary is"}
        | {"decoder_fingerprint": decoder.fingerprint, "source_tokens": len(ids)},
        **circumstances(decoder.runner.device, decoder.runner.dtype),
    }


def segment_bytes(shape: DecoderShape, memory: str, slots: float) -> int:
    """Bytes of a segment's numbers in float16, the file's header and lengths not counted.

    Args:
        shape: of the decoder.
        memory: ``"compact_kv"`` or ``"summary"``.
        slots: of the segment; for compact KV the mean over heads.
    """
    if memory == "summary":
        return round(slots * shape.embedding * 2)
    return round(slots * shape.layers * shape.kv_heads * (2 * shape.head_dim * 2 + 8))  # bias float32, position int32


def _kinds(config: MemoriesConfig, decoder: LocalDecoder) -> list[_Kind]:
    shape = decoder.shape
    generator = torch.Generator().manual_seed(_SEED)
    tokens = SummaryTokens(torch.randn(config.summary_length, shape.embedding, generator=generator), accumulate=True)
    matching = registry.get("attention_matching")

    def kv(ids: Sequence[int], _before: Sequence[AnySegment], ratio: float) -> AnySegment:
        return matching.compress(decoder, ids, [ratio])[0]

    def summary(ids: Sequence[int], before: Sequence[AnySegment]) -> AnySegment:
        earlier = [one.vectors for one in before if isinstance(one, SummarySegment)]
        with decoder.base() as runner:
            model = AutoCompressor(runner, tokens)
            (vectors,) = model.summarise([ids], torch.cat([model.embeddings[:0], *earlier])[None])
        return SummarySegment(vectors, len(ids))

    same = config.segment_tokens / config.summary_length
    return [
        *(
            _Kind(
                f"compact KV {ratio:.3g}x",
                partial(kv, ratio=ratio),
                partial(CompactKV().format, Sizes.of(shape)),
            )
            for ratio in dict.fromkeys((config.ratio, same))
        ),
        _Kind(
            f"summary {same:.3g}x",
            summary,
            partial(Summary().format, Sizes.of(shape)),
        ),
    ]


def _write(folder: Path, identity: str, segment: AnySegment, kind: _Kind) -> tuple[Path, str]:
    path = folder / identity
    path.write_bytes(files.encode(segment, identity, kind.form("float16"))[0])
    return path, identity


def _first_tokens(
    decoder: LocalDecoder, config: MemoriesConfig, prepared: Sequence[tuple[_Kind, Any, Any, list[tuple[Path, str]]]]
) -> list[list[float]]:
    """Seconds to the first token without context and for each kind, reading its files included, taken in turn."""

    def ask(prefix: Prefix | None) -> None:
        _, pieces = decoder.stream(Prompt(_QUESTION, prefix), GenerateConfig(1, lookup=False))
        for _ in pieces:
            pass

    def remember(kind: _Kind, paths: Sequence[tuple[Path, str]]) -> None:
        read = [files.read(path, identity, kind.form("float16")) for path, identity in paths]
        assembly = assemble(read, room=Room.of(decoder, 64))
        ask(assembly.prefix)

    works = [partial(ask, None), *(partial(remember, kind, paths) for kind, _, _, paths in prepared)]
    for work in works:
        work()  # warms up
    rounds = [[seconds(work) for work in works] for _ in range(config.repeats)]
    return [list(column) for column in zip(*rounds, strict=True)]
