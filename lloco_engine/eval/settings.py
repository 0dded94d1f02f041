"""Settings of one evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lloco_engine.config import ChunkConfig, Config, GenerateConfig, PrefixConfig
from lloco_engine.errors import ConfigError
from lloco_engine.eval import tasks
from lloco_engine.eval.reading import METHODS, Method
from lloco_engine.eval.results import Row
from lloco_engine.models import DEFAULT_DECODER, DEFAULT_EMBEDDER

__all__ = ["EvalConfig"]


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
        hints: that are on for the answers of methods that search, of `lloco_engine.config.HINTS`.
        spelling, pointing: their weights, as `GenerateConfig` has it.
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
    hints: tuple[str, ...] = ()
    spelling: float | None = None
    pointing: float | None = None
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
        object.__setattr__(self, "hints", self.generation.hints)  # this and the next raise where one breaks its rule
        _ = self.placing
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
        return GenerateConfig(
            **made, beams=self.beams, hints=self.hints, spelling=self.spelling, pointing=self.pointing
        )

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
