"""One evaluation made ready: what is measured, and with what; it measures one row of one group at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lloco_engine import __version__
from lloco_engine.adapters.loading import DEFAULT, default_folder, facts_of, hash_of_named, load_named
from lloco_engine.adapters.manifest import AdapterManifest
from lloco_engine.compress import registry
from lloco_engine.config import ChunkConfig, RefineConfig, RetrieveConfig
from lloco_engine.decoder.local import LocalDecoder
from lloco_engine.embedder import Embedder, Encodes
from lloco_engine.eval import tasks
from lloco_engine.eval.engines import Engines, GroupEngines, KeptSegments, Remembered
from lloco_engine.eval.methods import METHODS, Row
from lloco_engine.eval.reading import Reader
from lloco_engine.eval.scoring import Scorer
from lloco_engine.eval.settings import EvalConfig
from lloco_engine.models import cache_folder
from lloco_engine.segment_cache import SegmentCache

__all__ = ["Evaluation"]


class Evaluation:
    """An evaluation that is ready: the decoder, its adapters and the documents loaded, nothing measured.

    Args:
        config: the settings.
        decoder, embedder: ones that are there already; else those of ``config``.
        cache: folder that keeps segments between runs; None is ``eval`` in the cache folder.

    Raises:
        DocumentError: the data are not as they must be.
        AdapterError: an adapter is not there, or is not for this decoder.
        ConfigError, ModelNotFound: as their messages say.
    """

    def __init__(
        self,
        config: EvalConfig,
        decoder: LocalDecoder | None = None,
        embedder: Encodes | None = None,
        cache: Path | None = None,
    ) -> None:
        self.task = tasks.get(config.task, **config.task_settings)
        self.decoder = decoder = decoder or LocalDecoder.load(config.decoder, device=config.device)
        compressor = registry.get(config.compressor, **RefineConfig(steps=config.refine).settings)
        if slots := compressor.slots(decoder):  # which cannot be chosen
            config = replace(config, ratios=(max(1.0, config.segment_tokens / slots),))
        self.config = config
        self.groups = self.task.groups(
            Path(config.data) if config.data else None,
            decoder,
            limit=config.limit,
            passages_per_chunk=config.passages_per_chunk,
            segments=config.segments,
        )
        fitting = {reference: _fitting(decoder, reference) for reference in config.adapters}
        adapters = {reference: load_named(decoder, fit) or "none" for reference, fit in fitting.items()}
        self.rows = config.rows(adapters)
        self._adapters = {
            "adapter": ",".join(dict.fromkeys(adapters.values())),
            "adapter_sha256": {adapters[ref]: hash_of_named(fit) for ref, fit in fitting.items() if fit != "none"},
        }
        kinds = {method.memory for method in config.reads if method.compresses}
        self.compressors = {kind: compressor if kind == "kv" else registry.get(kind) for kind in sorted(kinds | {"kv"})}
        folder = (cache or cache_folder() / "eval") / "segments"
        self.segments = {kind: SegmentCache(folder, decoder, each) for kind, each in self.compressors.items()}
        self._generate = config.generation
        self._scorer = Scorer(self.task, Reader(decoder, self._generate), self._generate, answers=config.answers)
        longest = min(each.longest_chunk(decoder) for each in self.compressors.values())
        if config.passages_per_chunk == 1:  # else the caller has said what a chunk is
            longest = min(longest, config.segment_tokens)
        window = min(ChunkConfig.window_tokens, longest)
        self.engines = Engines(
            decoder,
            Remembered(embedder or Embedder(config.embedder, config.device)),
            {kind: KeptSegments(each, config.ratios) for kind, each in self.segments.items()},
            ChunkConfig(longest, window, min(ChunkConfig.window_overlap, window - 1)),
            config.keeping,
            RetrieveConfig(top_k=config.top_k),
            config.placing,
        )

    def measured(self, todo: Mapping[int, Sequence[int]]) -> Generator[tuple[int, int, dict[str, Any]]]:
        """Rows of groups, by the numbers of both, each with what was measured."""
        for number, ats in todo.items():
            with self.engines.about(self.groups[number]) as about:
                for at in ats:
                    yield number, at, self.measure(about, self.rows[at])

    def measure(self, about: GroupEngines, row: Row) -> dict[str, Any]:
        """What `Scorer.measure` gives, and how many chunks of the group had to be split where that mattered."""
        method = METHODS[row.method]
        value = self._scorer.measure(about, method, row.ratio, None if row.adapter == "none" else row.adapter)
        split = about.split(about.memory(method.memory, row.ratio)) if method.compresses and row.ratio else 0
        return value | {"split": split}

    def facts(self) -> dict[str, Any]:
        """Everything that the numbers depend on, JSON-ready."""
        config, decoder = self.config, self.decoder
        return config.to_json() | {
            "methods": list(config.methods),
            "ratios": [int(ratio) if ratio == int(ratio) else ratio for ratio in config.ratios],
            "lexical": RetrieveConfig.lexical,
            "task_settings": self.task.settings,
            "max_new_tokens": self._generate.max_new_tokens,
            "min_new_tokens": self._generate.min_new_tokens,
            "no_repeat_ngram": self._generate.no_repeat_ngram,
            "decoder": {
                "name": config.decoder,
                "fingerprint": decoder.fingerprint,
                "tokenizer_fingerprint": decoder.tokenizer_fingerprint,
                "template_fingerprint": decoder.template.fingerprint,
                "window": decoder.shape.window,
            },
            "compressor": {
                "name": config.compressor,
                "settings": self.compressors["kv"].settings,
                "source": {kind: each.source for kind, each in self.segments.items()},
            },
            "data": Path(config.data).name,  # a result must not carry a path of the machine that made it
            "data_sha256": _hash_of(config.data),
            "lloco": __version__,
            **self._adapters,
        }


def _fitting(decoder: LocalDecoder, reference: str) -> str:
    """What ``"auto"`` stands for with this decoder; any other reference is itself."""
    if reference != "auto":
        return reference
    folder = default_folder()
    fits = folder is not None and AdapterManifest.load(folder).fits(facts_of(decoder))
    return DEFAULT if fits else "none"


def _hash_of(data: str) -> str:
    """SHA-256 of a file, or of the texts of a folder; of nothing where the task has documents of its own."""
    path, digest = Path(data), hashlib.sha256()
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    for file in files if data else ():
        digest.update(file.read_bytes())
    return digest.hexdigest()
