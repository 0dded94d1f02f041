"""One frozen dataclass per stage, with a JSON round trip.

A value outside its rule raises `ConfigError` when the object is made, so no stage checks again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

from lloco_engine.errors import ConfigError

__all__ = [
    "HINTS",
    "ChunkConfig",
    "CompressConfig",
    "Config",
    "GenerateConfig",
    "PrefixConfig",
    "ReadConfig",
    "RefineConfig",
    "RetrieveConfig",
    "StoreConfig",
]

# hints of answers by name, with their weights in nats
HINTS = {"spelling": 3.0, "pointing": 8.0}


class Config:
    """Mixin of every stage's dataclass: JSON out, JSON in, rules checked."""

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Settings from JSON values.

        Raises:
            ConfigError: a name is unknown or a value breaks its rule.
        """
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"{cls.__name__} has no setting {unknown[0]!r}; it has {', '.join(sorted(known))}")
        return cls(**values)


def _require(holds: bool, rule: str, received: object) -> None:
    if not holds:
        raise ConfigError(f"{rule}, not {received!r}")


def _texts(value: str | Sequence[str]) -> tuple[str, ...]:
    """Texts, of which a single one may be given alone."""
    return (value,) if isinstance(value, str) else tuple(value)


@dataclass(frozen=True)
class ReadConfig(Config):
    """What a file may ask of the readers (docs/documents.md); what asks more is refused, and told which limit.

    Args:
        max_bytes: size of a file; of JSON Lines: of a line.
        max_text: bytes of one document's text, in UTF-8; an ingest takes several times as much memory.
        max_unpacked: bytes that an archive (.docx, .epub, ...) holds unpacked.
        max_pages: pages or slides.
        max_nesting: tags of HTML that are open at once.
        max_seconds: for one file.
        max_memory: bytes of the process that reads all but plain text, where the system can limit it.
    """

    max_bytes: int = 100_000_000
    max_text: int = 20_000_000
    max_unpacked: int = 200_000_000
    max_pages: int = 5_000
    max_nesting: int = 10_000
    max_seconds: float = 30.0
    max_memory: int = 700_000_000

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_text", "max_unpacked", "max_pages", "max_nesting", "max_seconds"):
            value = getattr(self, name)
            whole = isinstance(value, int) or (name == "max_seconds" and isinstance(value, float))
            _require(whole and value > 0, f"{name} must be a number above 0", value)
        _require(isinstance(self.max_memory, int), "max_memory must be a number of bytes", self.max_memory)
        _require(self.max_memory >= 200_000_000, "max_memory must be at least 200,000,000 bytes", self.max_memory)


@dataclass(frozen=True)
class ChunkConfig(Config):
    """Sizes in decoder tokens. 1536 is LLoCO's own segment size (Tan et al. 2024, section 3)."""

    segment_tokens: int = 1536
    window_tokens: int = 200
    window_overlap: int = 40

    def __post_init__(self) -> None:
        _require(self.segment_tokens >= 16, "segment_tokens must be at least 16", self.segment_tokens)
        _require(
            8 <= self.window_tokens <= self.segment_tokens,
            f"window_tokens must be between 8 and segment_tokens ({self.segment_tokens})",
            self.window_tokens,
        )
        _require(
            0 <= self.window_overlap < self.window_tokens,
            f"window_overlap must be between 0 and window_tokens - 1 ({self.window_tokens - 1})",
            self.window_overlap,
        )


@dataclass(frozen=True)
class CompressConfig(Config):
    """Which compressor, how hard, and its own settings (checked by the compressor)."""

    name: str = "attention_matching"
    ratio: float = 16.0
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(self.ratio >= 1, "ratio must be at least 1 (source tokens per slot)", self.ratio)


@dataclass(frozen=True)
class RefineConfig(Config):
    """How a segment is refined (`lloco_engine.compress.refinement`).

    Args:
        steps: of Adam; 0 leaves a segment as it was fitted.
        stretch: tokens of the chunk that a step reads; 0 reads all of it in every step.
        keys, values, biases: size of the first step, falling linearly to nothing after the last.
    """

    steps: int = 16
    stretch: int = 128
    keys: float = 0.01
    values: float = 0.01
    biases: float = 0.01

    def __post_init__(self) -> None:
        for name in ("steps", "stretch"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            _require(whole and value >= 0, f"{name} must be a whole number, not negative", value)
        _require(self.stretch == 0 or self.stretch >= 16, "stretch must be 0 (all) or at least 16 tokens", self.stretch)
        for name in ("keys", "values", "biases"):
            value = getattr(self, name)
            _require(isinstance(value, int | float) and 0 <= value <= 1, f"{name} must be a step from 0 to 1", value)


@dataclass(frozen=True)
class StoreConfig(Config):
    """How segments and vectors are kept."""

    dtype: Literal["float16", "int8"] = "float16"
    hnsw_above: int = 50_000  # windows; exact search up to here, HNSW beyond

    def __post_init__(self) -> None:
        _require(self.dtype in ("float16", "int8"), "store dtype must be 'float16' or 'int8'", self.dtype)
        _require(self.hnsw_above >= 0, "hnsw_above must not be negative", self.hnsw_above)


@dataclass(frozen=True)
class RetrieveConfig(Config):
    """How a question finds segments, and what becomes of one that none answers.

    Args:
        top_k: how many segments.
        neighbours: segments before and after each hit, of the same document.
        min_score: hits with a lower score are cut (-1: none is).
        lexical: share of the question's own words in a score (docs/decisions/0008).
        floor: best score below which an answer warns that no document seems to answer; None takes the one measured
            for the store's embedder, if there is one (`lloco_engine.relevance`); -1 is none.
        when_nothing: below the floor, or where nothing was found: ``"answer"`` all the same, with a warning, or
            ``"refuse"``, which says that no document answers and does not ask the decoder.
    """

    top_k: int = 4
    neighbours: int = 0
    min_score: float = -1.0
    lexical: float = 0.5
    floor: float | None = None
    when_nothing: Literal["answer", "refuse"] = "answer"

    def __post_init__(self) -> None:
        _require(self.top_k >= 1, "top_k must be at least 1", self.top_k)
        _require(self.neighbours >= 0, "neighbours must not be negative", self.neighbours)
        _require(-1 <= self.min_score <= 1, "min_score must be between -1 (none) and 1", self.min_score)
        _require(0 <= self.lexical <= 1, "lexical must be between 0 and 1", self.lexical)
        floor = self.floor is None or -1 <= self.floor <= 1
        _require(floor, "floor must be between -1 (none) and 1, or None for the embedder's own", self.floor)
        _require(
            self.when_nothing in ("answer", "refuse"), "when_nothing must be 'answer' or 'refuse'", self.when_nothing
        )


@dataclass(frozen=True)
class PrefixConfig(Config):
    """How segments are placed and read (docs/decisions/0009).

    Args:
        placement: ``"parallel"`` (each at the positions it was made at) or ``"sequence"`` (one after another).
        max_slots: the budget (0: no limit but the decoder's window).
        focus: segments that each query of each head reads of those placed in parallel, the ones that it looks at most
            (0: all of them).
        relevance: by how much a segment's largest logit counts for more where it is compared, for each point of its
            score in search (0: search has no say in it).
    """

    placement: Literal["parallel", "sequence"] = "parallel"
    max_slots: int = 0
    focus: int = 2
    relevance: float = 20.0

    def __post_init__(self) -> None:
        _require(
            self.placement in ("parallel", "sequence"), "placement must be 'parallel' or 'sequence'", self.placement
        )
        _require(self.max_slots >= 0, "max_slots must not be negative (0 is no limit)", self.max_slots)
        _require(self.focus >= 0, "focus must not be negative (0 is all segments)", self.focus)
        _require(self.relevance >= 0, "relevance must not be negative (0 is none)", self.relevance)


@dataclass(frozen=True)
class GenerateConfig(Config):
    """How tokens are chosen.

    Args:
        max_new_tokens: of the longest answer, thoughts not counted.
        temperature: 0 is greedy; above, tokens are drawn.
        top_p: share of the probability that tokens are drawn from.
        sample_top_k: likeliest tokens that they are drawn from (0: all).
        stop: texts that end an answer, and are left out of it.
        seed: of drawing.
        lookup: whether a greedy answer guesses ahead in the sources' text; the output does not change.
        hints: of `HINTS`, those that are on, as names or with commas between them (docs/decisions/0010).
        spelling: by how much, in nats, a token is made likelier that goes on to a word of the sources, where that hint
            is on; None is its own weight.
        pointing: by how much at most one that begins or goes on to a word that stands beside the question's words.
        repetition_penalty: above 1 makes what the answer has said less likely (Keskar et al. 2019).
        no_repeat_ngram: tokens of which no run comes twice in an answer: small decoders go round in circles when they
            summarise (0: it may).
        min_new_tokens: before which no answer ends by itself; a stop string still ends it.
        beams: answers that are followed side by side, of which the likeliest by token is given, whole and at the end
            (`lloco_engine.decoder.beams`), for as many times the work; nothing is then guessed ahead.
        reasoning_tokens: that a decoder that thinks aloud may take for it besides, as far as its window has room; then
            its thoughts are ended, and it answers (0: no thoughts).
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    sample_top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    lookup: bool = True
    hints: tuple[str, ...] = ()
    spelling: float | None = None
    pointing: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    min_new_tokens: int = 0
    beams: int = 1
    reasoning_tokens: int = 1024

    @property
    def hint_weights(self) -> dict[str, float]:
        """The hints that are on, with their weights in nats."""
        own = {name: getattr(self, name) for name in self.hints}
        return {name: HINTS[name] if weight is None else weight for name, weight in own.items() if weight != 0}

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _texts(self.stop))
        parts = (part.strip() for names in _texts(self.hints) for part in names.split(","))
        object.__setattr__(self, "hints", tuple(dict.fromkeys(part for part in parts if part)))
        _require(self.max_new_tokens >= 1, "max_new_tokens must be at least 1", self.max_new_tokens)
        most = f"min_new_tokens must be from 0 to max_new_tokens ({self.max_new_tokens})"
        _require(0 <= self.min_new_tokens <= self.max_new_tokens, most, self.min_new_tokens)
        _require(self.reasoning_tokens >= 0, "reasoning_tokens must not be negative", self.reasoning_tokens)
        _require(self.temperature >= 0, "temperature must not be negative", self.temperature)
        _require(0 < self.top_p <= 1, "top_p must be above 0 and at most 1", self.top_p)
        _require(self.sample_top_k >= 0, "sample_top_k must not be negative (0 is all tokens)", self.sample_top_k)
        _require(self.repetition_penalty > 0, "repetition_penalty must be above 0 (1: none)", self.repetition_penalty)
        _require(all(self.stop), "a stop string must not be empty", self.stop)
        self._check_hints()
        _require(self.beams >= 1, "beams must be at least 1", self.beams)
        greedy = self.beams == 1 or self.temperature == 0
        _require(greedy, "temperature must be 0 where there are several beams", self.temperature)
        _require(self.no_repeat_ngram >= 0, "no_repeat_ngram must not be negative (0: it may)", self.no_repeat_ngram)

    def _check_hints(self) -> None:
        names = ", ".join(HINTS)
        for name in self.hints:
            _require(name in HINTS, f"hints must be some of {names}", name)
        for name in HINTS:
            weight = getattr(self, name)
            _require(weight is None or weight >= 0, f"{name} must not be negative (0 is not at all)", weight)
            on = not weight or name in self.hints
            _require(on, f"{name} is the weight of a hint that must be on (add {name!r} to hints) or 0", weight)
