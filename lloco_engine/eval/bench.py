"""``lloco bench``: speed, size and memory in one run, as ratios of measurements taken in turn."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lloco_engine import kinds
from lloco_engine.compress import registry
from lloco_engine.compress.base import Compressor
from lloco_engine.config import NUMBERS, ChunkConfig, CompressConfig, RetrieveConfig
from lloco_engine.decoder.local import LocalDecoder
from lloco_engine.embedder import Embedder
from lloco_engine.engine import Engine, Progress
from lloco_engine.errors import StoreError
from lloco_engine.eval.corpus import parts, source_ids
from lloco_engine.eval.costs import SLOW, QuestionCosts
from lloco_engine.eval.engines import KeptSegments, Remembered, filled
from lloco_engine.eval.machine import PeakMemory, circumstances
from lloco_engine.eval.reference import against_transformers
from lloco_engine.eval.settings import BenchConfig
from lloco_engine.eval.timing import median_ratio, seconds
from lloco_engine.models import cache_folder
from lloco_engine.segment_cache import SegmentCache
from lloco_engine.store import Store
from lloco_engine.types import Document

if TYPE_CHECKING:
    from lloco_engine.embedder import Encodes
    from lloco_engine.eval.progress import Report

__all__ = ["BenchConfig", "run"]


def run(
    config: BenchConfig,
    *,
    decoder: LocalDecoder | None = None,
    embedder: Encodes | None = None,
    folder: Path | None = None,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Measure everything; minutes, and longer when the source has to be compressed first.

    Args:
        config: the settings.
        decoder, embedder: loaded ones; else those of ``config``.
        folder: where the compressed source is kept; None is in the cache folder.
        progress: is told what is done.

    Returns:
        the keys of ``lloco bench``, JSON-ready; ``details`` says what they were computed from.

    Raises:
        ConfigError, ModelNotFound, StoreError: as their messages say.
    """
    began = time.perf_counter()
    decoder = decoder or LocalDecoder.load(config.decoder, device=config.device)
    embedder = Remembered(embedder or Embedder(config.embedder, config.device))
    compressor = registry.get(config.compressor)
    memory = PeakMemory(decoder.runner.device)
    tell = progress or (lambda what, done, total: None)
    source = parts(decoder.tokenizer, config.lengths)
    if folder is None:
        folder = cache_folder() / "bench" / _fingerprint(config, decoder, embedder, compressor, source)
    with ExitStack() as opened:
        (engine, whole), built_s = _engines(config, decoder, embedder, compressor, source, folder, tell)
        opened.enter_context(engine)
        opened.enter_context(whole)
        costs = QuestionCosts(config, engine, whole, source, memory, tell)
        settings = costs.settings()
        retrieved, of_lengths, in_context = costs.retrieved(), costs.whole(), costs.in_context(settings["adapter"])
        with memory.phase("transformers_generate"):
            generate = against_transformers(
                decoder,
                context_tokens=config.reference_context,
                new_tokens=config.reference_tokens,
                repeats=min(config.repeats, SLOW),
                progress=tell,
            )
        with memory.phase("compress"):
            compress = _compress(decoder, compressor, config, tell)
        size = _bytes(engine)
    details = {
        "settings": settings,
        "retrieved": retrieved,
        "whole": of_lengths,
        "in_context": in_context,
        "transformers_generate": generate,
        "compress": compress,
        "bytes_per_source_token": size,
        "peak_memory_mb_by_phase": memory.phases,
        "config": config.to_json()
        | {
            "decoder_fingerprint": decoder.fingerprint,
            "dtype": engine.manifest.dtype,
            "compressor_settings": compressor.settings,
            "lengths": list(config.lengths),
        },
        **circumstances(decoder.runner.device, decoder.runner.dtype),
        "seconds": time.perf_counter() - began,
        "seconds_of_compressing_the_source": built_s,
    }
    keys = _keys(details) | {"peak_memory_mb": memory.highest, "details": details}
    return {name: _rounded(value) for name, value in keys.items()}


def _engines(
    config: BenchConfig,
    decoder: LocalDecoder,
    embedder: Encodes,
    compressor: Compressor,
    source: Mapping[int, Document],
    folder: Path,
    tell: Report,
) -> tuple[list[Engine], float]:
    """The engine of retrieved segments and that of whole sources, the source in both; and seconds of compressing it.

    Raises:
        StoreError: what is there cannot be used; says which folder to remove.
    """
    ratios = (config.ratio, config.whole_ratio)
    made = folder / "made"  # one pass over a chunk serves both stores; kept until they hold all
    kept = KeptSegments(SegmentCache(made, decoder, compressor), ratios)
    window = min(ChunkConfig.window_tokens, config.segment_tokens)
    chunk = ChunkConfig(config.segment_tokens, window, min(ChunkConfig.window_overlap, window - 1))
    begins = dict(zip((document.doc_id for document in source.values()), (0, *source), strict=False))
    ends = {document.doc_id: length for length, document in source.items()}

    def show(state: Progress) -> None:
        begin, end = begins[state.document], ends[state.document]
        share = state.done_segments / max(1, state.total_segments_of_document)
        tell("compressing the source (once)", begin + share * (end - begin), config.source_tokens)

    opened: list[Engine] = []
    began = time.perf_counter()
    try:
        for name, ratio in zip(("retrieved", "whole"), ratios, strict=True):
            engine = Engine.open(
                folder / name,
                decoder=decoder,
                embedder=embedder,
                compressor=kept,
                compress=CompressConfig(ratio=ratio),
                chunk=chunk,
                retrieve=RetrieveConfig(top_k=config.top_k),
            )
            opened.append(filled(engine, source.values(), progress=show))
    except StoreError as error:
        raise type(error)(
            f"{error} (the bench keeps its source there; remove {folder} to have it made again)"
        ) from error
    shutil.rmtree(made, ignore_errors=True)
    return opened, time.perf_counter() - began if kept.cache.made else 0.0


def _fingerprint(
    config: BenchConfig,
    decoder: LocalDecoder,
    embedder: Encodes,
    compressor: Compressor,
    source: Mapping[int, Document],
) -> str:
    """16 hex digits of everything that the stores are made from."""
    made_of = [
        [decoder.fingerprint, decoder.tokenizer_fingerprint, decoder.template.fingerprint, embedder.fingerprint],
        [
            kinds.get(compressor.memory).dtype,
            compressor.name,
            compressor.settings,
            config.segment_tokens,
            config.ratio,
            config.whole_ratio,
        ],
        [document.content_hash for document in source.values()],
    ]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


def _keys(details: dict[str, Any]) -> dict[str, Any]:
    """The numbers that stand for the measurements."""
    retrieved, whole, in_context = details["retrieved"], details["whole"], details["in_context"]
    return {
        "ttft_retrieved_over_no_context": retrieved["ttft_over_no_context"],
        "decode_retrieved_over_no_context": retrieved["decode_over_no_context"],
        "ttft_whole_over_no_context": {length: row["ttft_over_no_context"] for length, row in whole.items()},
        "decode_whole_over_no_context": {length: row["decode_over_no_context"] for length, row in whole.items()},
        "in_context_ttft_over_lloco": {length: row["ttft_over_lloco"] for length, row in in_context.items()},
        "decode_over_transformers_generate": details["transformers_generate"]["ratio"],
        "compress_over_prefill": details["compress"]["ratio"],
        "bytes_per_source_token": details["bytes_per_source_token"][details["config"]["dtype"]]["store"],
    }


def _compress(decoder: LocalDecoder, compressor: Compressor, config: BenchConfig, tell: Report) -> dict[str, Any]:
    """Compressing chunks at the default ratio beside plainly prefilling them."""
    tokens = config.segment_tokens
    count = min(config.source_tokens // tokens, max(2, min(config.repeats, SLOW)))
    ids = source_ids(decoder.tokenizer, count * tokens)
    chunks: Sequence[list[int]] = [ids[at : at + tokens] for at in range(0, len(ids), tokens)]
    pairs: list[tuple[float, float]] = []
    for number, chunk in enumerate([chunks[0], *chunks]):
        tell("compressing beside prefilling", number, len(chunks) + 1)
        prefill_s = seconds(partial(decoder.prefill, chunk))
        pairs.append((prefill_s, seconds(partial(compressor.compress, decoder, chunk, [config.ratio]))))
    del pairs[0]  # it warmed up
    return {
        "ratio": median_ratio(pairs),
        "prefill_tokens_per_s": tokens / median(prefill for prefill, _ in pairs),
        "compress_tokens_per_s": tokens / median(compress for _, compress in pairs),
        "chunks": len(pairs),
        "chunk_tokens": tokens,
    }


def _bytes(engine: Engine) -> dict[str, Any]:
    """Bytes on disk per source token: of the whole store, catalogue and index too, and of its segments alone."""
    kept, stats = engine.store, engine.stats()
    tokens, beside = stats["source_tokens"], stats["bytes"]["total"] - stats["bytes"]["segments"]
    identities = dict.fromkeys(hit.segment_id for info in kept.documents() for hit in kept.chunks(info.doc_id))
    with TemporaryDirectory() as folder:
        sizes: dict[str, int] = {}
        for dtype in NUMBERS:
            manifest = replace(kept.manifest, dtype=dtype)
            with Store.create(Path(folder) / dtype, manifest) as store, store.writer() as writer:
                sizes[dtype] = sum(writer.save_segment(each, kept.load_segment(each)).bytes for each in identities)
    return {dtype: {"store": (size + beside) / tokens, "segments": size / tokens} for dtype, size in sizes.items()}


def _rounded(value: Any) -> Any:
    """Floats to four significant digits, all the way down."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return value
