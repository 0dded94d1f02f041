"""Score answers over questions: without context, with text, and with compressed memories, in one run on one decoder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lloco_engine import __version__
from lloco_engine.adapters.loading import DEFAULT, default_folder, facts_of, hash_of_named, load_named
from lloco_engine.adapters.manifest import AdapterManifest
from lloco_engine.compress import registry
from lloco_engine.config import ChunkConfig, CompressConfig, Config, GenerateConfig, PrefixConfig, RetrieveConfig
from lloco_engine.decoder.local import LocalDecoder
from lloco_engine.embedder import Embedder
from lloco_engine.errors import ConfigError, DocumentError
from lloco_engine.eval import results, tasks
from lloco_engine.eval.data import Group
from lloco_engine.eval.machine import check_writable, circumstances, write_json
from lloco_engine.eval.partial import Partial
from lloco_engine.eval.reading import METHODS, Encoder, Material, Method, Reader, Remembered
from lloco_engine.eval.results import Row
from lloco_engine.eval.scoring import Scorer
from lloco_engine.eval.segments import SegmentCache
from lloco_engine.eval.tasks.base import Task
from lloco_engine.models import DEFAULT_DECODER, DEFAULT_EMBEDDER, cache_folder

__all__ = ["EvalConfig", "run"]


@dataclass(frozen=True)
class EvalConfig(Config):
    """Settings of one evaluation.

    Args:
        data: file of records, or what else the task reads; empty for a task that has documents of its own.
        task: of `lloco_engine.eval.tasks.NAMES`.
        task_settings: the task's own.
        limit: documents to read, None for all.
        methods: of `lloco_engine.eval.reading.METHODS`; ``"full@none"`` has a row with that one of the adapters only.
        ratios: source tokens per slot, for the methods that have one; summary embeddings have their own.
        passages_per_chunk: consecutive documents whose texts form one chunk.
        segments: consecutive chunks that are compressed apart and placed together.
        top_k: chunks that the ``_retrieved`` methods read.
        focus, relevance: segments of a prompt that each query reads, and how search weighs in, as `PrefixConfig`
            has it.
        adapter: adapters with commas between them: ``"none"`` (the base weights), ``"default"`` (the shipped one), the
            name of a loaded one, or a folder; ``"auto"`` is the shipped one where it is for this decoder, else none.
        answers: also generate answers and score them.
        max_new_tokens: longest answer that is generated; None is the task's own.
        min_new_tokens: shortest; None is the task's own.
        no_repeat_ngram: tokens of which no run comes twice in an answer, 0 where it may; None is the task's own.
        beams: answers that are followed side by side.
        pointing: by how much words that are asked for are preferred, as `GenerateConfig` has it.
        decoder, device: as `LocalDecoder.load` takes them.
        embedder: as `lloco_engine.embedder.Embedder` takes it.
        compressor: of `lloco_engine.compress.registry.NAMES`, for ``kv``.
        segment_tokens: a single document longer than this becomes several segments.
        seed: of the bootstrap.
    """

    data: str
    task: str = "plain"
    task_settings: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None
    methods: tuple[str, ...] = ("none", "full", "kv")
    ratios: tuple[float, ...] = (8, 16, 32)
    passages_per_chunk: int = 1
    segments: int = 1
    top_k: int = 4
    focus: int = PrefixConfig.focus
    relevance: float = PrefixConfig.relevance
    adapter: str = "auto"
    answers: bool = True
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    no_repeat_ngram: int | None = None
    beams: int = 1
    pointing: float = GenerateConfig.pointing
    decoder: str = DEFAULT_DECODER
    device: str | None = None
    embedder: str = DEFAULT_EMBEDDER
    compressor: str = "attention_matching"
    segment_tokens: int = ChunkConfig.segment_tokens
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", tuple(dict.fromkeys(self.methods)))
        object.__setattr__(self, "ratios", tuple(dict.fromkeys(self.ratios)))
        asked = [name for name, _ in self._asked]
        if not asked or (unknown := [name for name in asked if name not in METHODS]):
            received = repr(unknown[0]) if asked else "none at all"
            raise ConfigError(f"methods must be some of {', '.join(METHODS)}, not {received}")
        if any(METHODS[name].by_ratio for name in asked) and not self.ratios:
            raise ConfigError(f"ratios must name at least one ratio for the methods {', '.join(self.methods)}")
        if bad := [ratio for ratio in self.ratios if ratio < 1]:
            raise ConfigError(f"ratios must be at least 1 (source tokens per slot), not {bad[0]}")
        for name in ("passages_per_chunk", "segments", "top_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("limit", "max_new_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                unit = "document" if name == "limit" else "token"
                raise ConfigError(f"{name} must be at least 1 {unit}, not {getattr(self, name)}")
        _ = self.placing, self.generation  # these raise where one breaks its rule
        if not self.adapters:
            raise ConfigError(f"adapter must be a name or 'none', not {self.adapter!r}")
        if other := [only for _, only in self._asked if only and only not in self.adapters]:
            raise ConfigError(
                f"the adapter after a method's @ must be one of {', '.join(self.adapters)}, not {other[0]!r}"
            )

    @property
    def generation(self) -> GenerateConfig:
        """How answers are generated: what is not said here is the task's own."""
        task = tasks.get(self.task, **self.task_settings)
        names = ("max_new_tokens", "min_new_tokens", "no_repeat_ngram")
        own = {name: getattr(self, name) for name in names}
        made = {name: getattr(task, name) if value is None else value for name, value in own.items()}
        if self.min_new_tokens is None:  # whoever asks for short answers need not know the task's least length
            made["min_new_tokens"] = min(made["min_new_tokens"], made["max_new_tokens"])
        return GenerateConfig(**made, beams=self.beams, pointing=self.pointing)

    @property
    def placing(self) -> PrefixConfig:
        """How segments are placed and read."""
        return PrefixConfig(focus=self.focus, relevance=self.relevance)

    @property
    def _asked(self) -> list[tuple[str, str]]:
        """Each method with the adapter that it is for, "" for all."""
        return [(name, only) for name, _, only in (method.partition("@") for method in self.methods)]

    @property
    def reads(self) -> tuple[Method, ...]:
        """The methods themselves."""
        return tuple(METHODS[name] for name in dict.fromkeys(name for name, _ in self._asked))

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters that there is a block of rows for."""
        return tuple(dict.fromkeys(name.strip() for name in self.adapter.split(",") if name.strip()))

    def rows(self, adapters: Mapping[str, str]) -> list[Row]:
        """What each row of the result is about; ``adapters`` has the names that `adapters` have in the decoder."""
        made = [
            Row(method, ratio, name)
            for reference, name in adapters.items()
            for method, only in self._asked
            if only in ("", reference)
            for ratio in (self.ratios if METHODS[method].by_ratio else (None,))
        ]
        return list(dict.fromkeys(made))


def run(
    config: EvalConfig,
    *,
    output: Path | None = None,
    predictions: Path | None = None,
    decoder: LocalDecoder | None = None,
    embedder: Encoder | None = None,
    cache: Path | None = None,
    progress: Callable[[str, float, float], None] | None = None,
) -> dict[str, Any]:
    """Evaluate; a run with an output file that was cut off goes on where it stopped.

    Args:
        config: the settings.
        output: JSON file to write.
        predictions: JSON Lines file to write: every answer with its scores.
        decoder, embedder: ones that are there already; else those of ``config``.
        cache: folder that keeps segments between runs; None is ``eval`` in the cache folder.
        progress: called with what is done, how many questions are, and how many there are, each row counted.

    Returns:
        ``{"config": ..., "results": [...], "differences": [...]}``, JSON-ready, and ``"cells"`` for a grid.

    Raises:
        DocumentError: the data are not as they must be.
        AdapterError: an adapter is not there, or is not for this decoder.
        ConfigError, ModelNotFound, PromptTooLong: as their messages say.
    """
    task = tasks.get(config.task, **config.task_settings)
    if config.data and not Path(config.data).exists():
        raise DocumentError(f"the data file {config.data} cannot be read: No such file or directory")
    for path in (output, predictions):
        if path is not None:
            check_writable(path)
    decoder = decoder or LocalDecoder.load(config.decoder, device=config.device)
    compressor = registry.get(config.compressor)
    if compressor.memory == "summary":  # its number of slots cannot be chosen
        config = replace(config, ratios=(compressor.ratio(decoder, CompressConfig.ratio, config.segment_tokens),))
    groups = task.groups(
        Path(config.data) if config.data else None,
        decoder,
        limit=config.limit,
        passages_per_chunk=config.passages_per_chunk,
        segments=config.segments,
    )
    fitting = {reference: _fitting(decoder, reference) for reference in config.adapters}
    adapters = {reference: load_named(decoder, fit) or "none" for reference, fit in fitting.items()}
    evaluation = _Evaluation(config, task, decoder, embedder, cache or cache_folder() / "eval")
    facts = evaluation.facts() | {
        "adapter": ",".join(dict.fromkeys(adapters.values())),
        "adapter_sha256": {adapters[ref]: hash_of_named(fit) for ref, fit in fitting.items() if fit != "none"},
    }
    partial = Partial(output, hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest())
    rows = config.rows(adapters)
    values = evaluation.measure_all(groups, rows, partial, progress or (lambda what, done, total: None))
    result = {
        "config": facts
        | circumstances(decoder.runner.device, decoder.runner.dtype)
        | {
            "seconds": round(sum(value["seconds"] for of_rows in values for value in of_rows), 1),
            "notes": _notes(rows, values),
        },
        "results": results.rows(rows, groups, values, config.seed),
        "differences": results.differences(rows, groups, values, config.seed),
    }
    if cells := results.cells(rows, groups, values):
        result["cells"] = cells
    if predictions is not None:
        _write_predictions(predictions, rows, groups, values)
    if output is not None:
        write_json(output, result)
    partial.finish()
    return result


def _fitting(decoder: LocalDecoder, reference: str) -> str:
    """What ``"auto"`` stands for with this decoder; any other reference is itself."""
    if reference != "auto":
        return reference
    folder = default_folder()
    manifest = None if folder is None else AdapterManifest.load(folder)
    fits = manifest is not None and all(getattr(manifest, name) == fact for name, fact in facts_of(decoder).items())
    return DEFAULT if fits else "none"


class _Evaluation:
    """Measures one row of one group at a time."""

    def __init__(
        self, config: EvalConfig, task: Task, decoder: LocalDecoder, embedder: Encoder | None, cache: Path
    ) -> None:
        self.config, self.task, self.decoder, self._given = config, task, decoder, embedder
        kinds = {method.memory for method in config.reads if method.compresses}
        self.compressors = {
            kind: registry.get(config.compressor if kind == "kv" else kind) for kind in sorted(kinds | {"kv"})
        }
        segments = {kind: SegmentCache(cache / "segments", decoder, each) for kind, each in self.compressors.items()}
        self.segments = segments
        self._generate = config.generation
        reader = Reader(decoder, segments, config.ratios, config.placing)
        self._scorer = Scorer(task, reader, self._generate, answers=config.answers)
        self._longest = min(each.longest_chunk(decoder) for each in self.compressors.values())
        if config.passages_per_chunk == 1:  # else the caller has said what a chunk is
            self._longest = min(self._longest, config.segment_tokens)

    @cached_property
    def _embedder(self) -> Encoder:
        return Remembered(self._given or Embedder(self.config.embedder, self.config.device))

    def material(self, group: Group) -> Material:
        """A group's chunks, not compressed yet."""
        return Material(group, self.decoder, self._longest, self._embedder, self.config.top_k)

    def measure_all(
        self,
        groups: Sequence[Group],
        rows: Sequence[Row],
        partial: Partial,
        progress: Callable[[str, float, float], None],
    ) -> list[list[dict[str, Any]]]:
        """Every row of every group, those in ``partial`` as they are there."""
        total, done = len(rows) * sum(len(group.questions) for group in groups), 0
        for number, group in enumerate(groups):
            material = self.material(group)
            for at, row in enumerate(rows):
                progress("questions", done, total)
                if number * len(rows) + at not in partial.done:
                    partial.add(number * len(rows) + at, self.measure(material, row))
                done += len(group.questions)
        return [[partial.done[number * len(rows) + at] for at in range(len(rows))] for number in range(len(groups))]

    def measure(self, material: Material, row: Row) -> dict[str, Any]:
        """What `Scorer.measure` gives, and how many chunks of the group had to be split where that mattered."""
        method = METHODS[row.method]
        value = self._scorer.measure(material, method, row.ratio, None if row.adapter == "none" else row.adapter)
        return value | {"split": material.split if method.compresses else 0}

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
        }


def _hash_of(data: str) -> str:
    """SHA-256 of a file, or of the texts of a folder; of nothing where the task has documents of its own."""
    path, digest = Path(data), hashlib.sha256()
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    for file in files if data else ():
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _notes(rows: Sequence[Row], values: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    notes = []
    if split := sum(max(value["split"] for value in of_rows) for of_rows in values):
        notes.append(f"{split} chunks were longer than a segment may be and became several, all placed")
    for at, row in enumerate(rows):
        left_out = [tokens for of_rows in values for tokens in of_rows[at]["left_out"]]
        if cut := [tokens for tokens in left_out if tokens]:
            part = "the middle" if row.method == "full" else "the end"
            notes.append(
                f"method {row.method}, adapter {row.adapter}: {len(cut)} of {len(left_out)} prompts did not fit the "
                f"decoder's window and lost {part} of their text, {sum(cut):,} tokens in all"
            )
    return notes


def _write_predictions(
    path: Path, rows: Sequence[Row], groups: Sequence[Group], values: Sequence[Sequence[Mapping[str, Any]]]
) -> None:
    """Every question of every row, one JSON object a line."""
    work = path.with_name(path.name + ".tmp")
    with work.open("w", encoding="utf-8") as lines:
        for group, of_rows in zip(groups, values, strict=True):
            for row, value in zip(rows, of_rows, strict=True):
                for question, scored in zip(group.questions, value["questions"], strict=True):
                    asked = {"id": question.id, "question": question.question, "answers": list(question.answers)}
                    lines.write(json.dumps(row.to_json() | asked | dict(scored), ensure_ascii=False) + "\n")
    work.replace(path)
