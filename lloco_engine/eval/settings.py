"""Settings of one evaluation, and of one bench."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lloco_engine.config import (
    ChunkConfig,
    CompressConfig,
    Config,
    GenerateConfig,
    PrefixConfig,
    StoreConfig,
    same_setting,
    setting,
)
from lloco_engine.errors import ConfigError
from lloco_engine.eval import tasks
from lloco_engine.eval.methods import METHODS, Method, Row
from lloco_engine.models import DEFAULT_DECODER, DEFAULT_EMBEDDER

__all__ = ["BenchConfig", "EvalConfig"]


@dataclass(frozen=True)
class EvalConfig(Config):
    """Settings of one evaluation; those with a help are flags of ``lloco eval``.

    Args:
        data: file of records, or what else the task reads; empty for a task that has documents of its own.
        task: of `lloco_engine.eval.tasks.NAMES`.
        task_settings: the task's own.
        methods: of `lloco_engine.eval.methods.METHODS`; ``"full@none"`` has a row with that one of the adapters only.
        adapter: adapters with commas between them: ``"none"`` (the base weights), ``"default"`` (the shipped one), the
            name of a loaded one, or a folder; ``"auto"`` is the shipped one where it is for this decoder, else none.
        embedder: as `lloco_engine.embedder.Embedder` takes it.
        segment_tokens: a single document longer than this becomes several segments.
        seed: of the bootstrap.
        others: as their help says, and as `PrefixConfig` and `GenerateConfig` have them.
    """

    data: str
    task: str = "plain"
    task_settings: dict[str, Any] = field(default_factory=dict)
    limit: int | None = setting(None, "Read only the first documents.", least=1, metavar="DOCS")
    methods: tuple[str, ...] = setting(
        ("none", "full", "kv"), "What the decoder reads; see below.", each=str, metavar="NAMES"
    )
    ratios: tuple[float, ...] = setting(
        (8, 16, 32), "Source tokens per slot, for kv; summary embeddings have their own.", each=float, metavar="NUMBERS"
    )
    passages_per_chunk: int = setting(
        1, "Join the texts of K consecutive documents into one chunk.", least=1, metavar="K"
    )
    segments: int = setting(1, "Compress K consecutive chunks apart and place them together.", least=1, metavar="K")
    top_k: int = setting(4, "Chunks that the _retrieved methods read.", least=1, metavar="K")
    focus: int = same_setting(PrefixConfig, "focus")
    relevance: float = same_setting(PrefixConfig, "relevance")
    adapter: str = setting(
        "auto",
        "Adapters, a block of rows each: none, default, a folder; auto: the shipped one that fits.",
        metavar="NAMES",
    )
    answers: bool = setting(True, "Also generate answers and score them.")
    max_new_tokens: int | None = same_setting(GenerateConfig, "max_new_tokens", "Default: the task's own.")
    min_new_tokens: int | None = same_setting(GenerateConfig, "min_new_tokens", "Default: the task's own.")
    no_repeat_ngram: int | None = same_setting(GenerateConfig, "no_repeat_ngram", "Default: the task's own.")
    beams: int = same_setting(GenerateConfig, "beams")
    hints: tuple[str, ...] = setting(
        (), "Hints that are on, with commas between them: spelling,pointing.", each=str, metavar="NAMES"
    )
    spelling: float | None = same_setting(GenerateConfig, "spelling")
    pointing: float | None = same_setting(GenerateConfig, "pointing")
    compressor: str = setting(
        "attention_matching",
        "What makes kv: attention_matching, or autocompressor (summaries).",
        metavar="NAME",
    )
    refine: int = setting(0, "Steps of refinement for each segment of kv; 0: the fit alone.", least=0, metavar="N")
    dtype: str = setting("float16", "Numbers of segments on disk: float16, int8 or int4.", metavar="TYPE")
    decoder: str = setting(
        DEFAULT_DECODER, "'embedded', a local folder or a hub id.", envvar="LLOCO_DECODER", metavar="NAME"
    )
    device: str | None = setting(None, "cpu, cuda, cuda:N or mps. Default: the best there is.", metavar="NAME")
    embedder: str = DEFAULT_EMBEDDER
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
        self.check_bounds()
        object.__setattr__(
            self, "hints", self.generation.hints
        )  # this and what follows raise where one breaks its rule
        _ = self.placing, self.keeping
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
    def keeping(self) -> StoreConfig:
        """How segments are kept."""
        return StoreConfig.from_json({"dtype": self.dtype})

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


@dataclass(frozen=True)
class BenchConfig(Config):
    """Settings of a bench. The defaults of all but ``source_tokens`` and ``repeats`` are part of what the keys mean.

    Args:
        source_tokens: tokens of the searched store and of the longest whole source.
        repeats: measurements of each kind.
        shortest: the shortest whole source; each is twice as long as the one before.
        segment_tokens, ratio, top_k: of the retrieved segments.
        whole_ratio: source tokens per slot where a whole source is read.
        new_tokens: greedy tokens over which decoding is timed.
        reference_context: tokens of text in the prompts that transformers' generate answers too.
        reference_tokens: most tokens of those answers.
        decoder, device, embedder: as elsewhere.
        compressor: of `lloco_engine.compress.registry.NAMES`.
    """

    source_tokens: int = 131072
    repeats: int = 7
    shortest: int = 2048
    segment_tokens: int = ChunkConfig.segment_tokens
    ratio: float = CompressConfig.ratio
    top_k: int = 4
    whole_ratio: float = 30.0
    new_tokens: int = 32
    reference_context: int = 1024
    reference_tokens: int = 64
    decoder: str = DEFAULT_DECODER
    device: str | None = None
    embedder: str = DEFAULT_EMBEDDER
    compressor: str = CompressConfig.name

    def __post_init__(self) -> None:
        if self.source_tokens < max(self.shortest, self.segment_tokens):
            least = max(self.shortest, self.segment_tokens)
            raise ConfigError(f"source_tokens must be at least {least}, not {self.source_tokens}")
        if self.new_tokens < 2 or self.repeats < 1:
            raise ConfigError(
                f"new_tokens must be at least 2 and repeats at least 1, not {self.new_tokens} and {self.repeats}"
            )

    @property
    def lengths(self) -> tuple[int, ...]:
        """The source lengths: doubling from the shortest, and the longest itself."""
        made = []
        length = self.shortest
        while length < self.source_tokens:
            made.append(length)
            length *= 2
        return (*made, self.source_tokens)
