"""One frozen dataclass per stage, with a JSON round trip.

A value outside its rule raises `ConfigError` when the object is made, so no stage checks again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, Self, get_args

from lloco_engine.errors import ConfigError

__all__ = [
    "HINTS",
    "NUMBERS",
    "ChunkConfig",
    "CompressConfig",
    "Config",
    "DType",
    "GenerateConfig",
    "PrefixConfig",
    "ReadConfig",
    "RefineConfig",
    "RetrieveConfig",
    "StoreConfig",
]

# hints of answers by name, with their weights in nats
HINTS = {"spelling": 3.0, "pointing": 8.0}

DType = Literal["float16", "int8", "int4"]
NUMBERS: tuple[DType, ...] = get_args(DType)  # types that a segment's numbers have on disk


def setting(default: Any, help: str, **how: Any) -> Any:
    """A setting of a question: a field whose flag and parameters in frameworks are made from what is said here.

    Args:
        default: its value where nothing is said.
        help: what it does, in a line.
        how: ``least`` and ``most``, its bounds; ``metavar``, what stands for a value in a flag's help; ``flags``, other
            names of its flag; ``switch``, the value that a flag of this name sets, where there are two; ``only``,
            ``"search"`` or ``"answer"`` where it says nothing of the other; ``each``, what the parts are of a flag with
            commas in it; ``envvar``, that a flag is taken from.
    """
    return field(default=default, metadata={"help": help, **how})


def same_setting(kind: type[Any], name: str, default: str | None = None) -> Any:
    """The setting of another dataclass: its flag, and its default unless ``default`` says what None stands for."""
    (one,) = (one for one in fields(kind) if one.name == name)
    if default is None:
        return field(default=one.default, metadata=one.metadata)
    return field(default=None, metadata={**one.metadata, "help": f"{one.metadata['help']} {default}"})


class Config:
    """Mixin of every stage's dataclass: JSON out, JSON in, rules checked."""

    def but(self, given: Mapping[str, Any]) -> Self:
        """The settings, with those that are given in place of theirs. None says nothing, and other names are let be.

        Raises:
            ConfigError: a value breaks its rule.
        """
        names = {one.name for one in fields(self)}  # type: ignore[arg-type]
        own = {name: value for name, value in given.items() if name in names and value is not None}
        return replace(self, **own) if own else self  # type: ignore[type-var]

    def check_bounds(self) -> None:
        """Check every `setting` against its bounds.

        Raises:
            ConfigError: a value is outside of them.
        """
        for one in fields(self):  # type: ignore[arg-type]
            least, most, value = one.metadata.get("least"), one.metadata.get("most"), getattr(self, one.name)
            if value is None or (least is None and most is None):
                continue
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ConfigError(f"{one.name} must be a number, not {value!r}")
            least = 0 if least is None else least
            if most is not None:
                _require(least <= value <= most, f"{one.name} must be between {least} and {most}", value)
            elif least:
                _require(value >= least, f"{one.name} must be at least {least}", value)
            else:
                _require(value >= 0, f"{one.name} must not be negative", value)

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
        steps: of Adam; 0 leaves a segment as it was fitted. The default is what ``auto`` stands for (docs/log.md).
        stretch: tokens of the chunk that a step reads; 0 reads all of it in every step. Short chunks are read whole,
            which gains more than parts of them do (docs/log.md).
        keys, values, biases: size of a step, as far as ``pace`` leaves it. Values bear the largest ones (docs/log.md).
        pace: a step goes so far that by its slope this share of the divergence would be gone, five times its size at
            most; 0: it has its size. Either falls linearly to nothing after the last step.
    """

    steps: int = 8
    stretch: int = 256
    keys: float = 0.01
    values: float = 0.03
    biases: float = 0.01
    pace: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "stretch"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            _require(whole and value >= 0, f"{name} must be a whole number, not negative", value)
        _require(self.stretch == 0 or self.stretch >= 16, "stretch must be 0 (all) or at least 16 tokens", self.stretch)
        for name in ("keys", "values", "biases"):
            value = getattr(self, name)
            _require(isinstance(value, int | float) and 0 <= value <= 1, f"{name} must be a step from 0 to 1", value)
        told = isinstance(self.pace, int | float) and 0 <= self.pace <= 2
        _require(told, "pace must be a share of the divergence from 0 to 2", self.pace)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of a compressor that refines like this; none where there is nothing to do."""
        return {("refine" if name == "steps" else name): value for name, value in self.to_json().items() if self.steps}


@dataclass(frozen=True)
class StoreConfig(Config):
    """How segments and vectors are kept.

    Args:
        dtype: of the numbers of segments on disk; ``"auto"`` is what a store that is there has, and a new one gets what
            suits its kind of memory (`lloco_engine.kinds.MemoryKind.dtype`).
        hnsw_above: search windows up to which search is exact; beyond, by HNSW.
    """

    dtype: DType | Literal["auto"] = "auto"
    hnsw_above: int = 50_000

    def __post_init__(self) -> None:
        _require(self.dtype in ("auto", *NUMBERS), f"store dtype must be one of auto, {', '.join(NUMBERS)}", self.dtype)
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

    top_k: int = setting(4, "Segments to retrieve.", least=1, flags=("-k",), only="search")
    neighbours: int = setting(0, "Segments to add before and after each hit.", least=0, only="search")
    min_score: float = setting(-1.0, "Cut hits with a lower score; -1: none.", least=-1.0, most=1.0, metavar="X")
    lexical: float = setting(
        0.5, "Share of the question's own words in a score.", least=0.0, most=1.0, metavar="X", only="search"
    )
    floor: float | None = setting(
        None,
        "Warn where the best score is lower; -1: never. Default: the one measured for the embedder.",
        least=-1.0,
        most=1.0,
        metavar="X",
    )
    when_nothing: Literal["answer", "refuse"] = setting(
        "answer",
        "Say that no document answers where none seems to, instead of answering.",
        switch="refuse",
        only="answer",
    )

    def __post_init__(self) -> None:
        self.check_bounds()
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

    placement: Literal["parallel", "sequence"] = setting("parallel", "How segments are placed: parallel or sequence.")
    max_slots: int = setting(0, "Most slots in a prompt; 0: as many as the window holds.", least=0, metavar="N")
    focus: int = setting(2, "Segments that each query of attention reads; 0: all of them.", least=0, metavar="K")
    relevance: float = setting(
        20.0, "How much search weighs in where queries choose segments; 0: nothing.", least=0.0, metavar="X"
    )

    def __post_init__(self) -> None:
        self.check_bounds()
        _require(
            self.placement in ("parallel", "sequence"), "placement must be 'parallel' or 'sequence'", self.placement
        )


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

    max_new_tokens: int = setting(128, "Longest answer.", least=1)
    temperature: float = setting(0.0, "0 is greedy.", least=0.0)
    top_p: float = setting(1.0, "Share of probability to sample from.", least=0.0, most=1.0)
    sample_top_k: int = setting(0, "Likeliest tokens to sample from; 0: all.", least=0, metavar="N")
    stop: tuple[str, ...] = setting((), "End the answer here; repeatable.", metavar="TEXT")
    seed: int | None = setting(None, "Makes sampling repeatable.", least=-(2**63), most=2**64 - 1)
    lookup: bool = setting(True, "Guess ahead in the sources' text, which is quicker and changes nothing.")
    hints: tuple[str, ...] = setting((), "Hints that are on, with commas between: spelling,pointing.", metavar="NAMES")
    spelling: float | None = setting(None, "Prefer words as the sources spell them; 0: not.", least=0.0, metavar="NATS")
    pointing: float | None = setting(None, "Prefer words beside the question's; 0: not.", least=0.0, metavar="NATS")
    repetition_penalty: float = setting(1.0, "Above 1, what was said is less likely.", least=0.0, metavar="X")
    no_repeat_ngram: int = setting(0, "No run of N tokens comes twice; 0: it may.", least=0, metavar="N")
    min_new_tokens: int = setting(0, "Shortest answer.", least=0)
    beams: int = setting(1, "Answers followed side by side; the likeliest is given.", least=1, metavar="N")
    reasoning_tokens: int = setting(1024, "A decoder's thoughts, besides; 0: it does not think.", least=0, metavar="N")

    @property
    def hint_weights(self) -> dict[str, float]:
        """The hints that are on, with their weights in nats."""
        own = {name: getattr(self, name) for name in self.hints}
        return {name: HINTS[name] if weight is None else weight for name, weight in own.items() if weight != 0}

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _texts(self.stop))
        parts = (part.strip() for names in _texts(self.hints) for part in names.split(","))
        object.__setattr__(self, "hints", tuple(dict.fromkeys(part for part in parts if part)))
        self.check_bounds()
        most = f"min_new_tokens must be from 0 to max_new_tokens ({self.max_new_tokens})"
        _require(self.min_new_tokens <= self.max_new_tokens, most, self.min_new_tokens)
        _require(self.top_p > 0, "top_p must be above 0 and at most 1", self.top_p)
        _require(self.repetition_penalty > 0, "repetition_penalty must be above 0 (1: none)", self.repetition_penalty)
        _require(all(self.stop), "a stop string must not be empty", self.stop)
        greedy = self.beams == 1 or self.temperature == 0
        _require(greedy, "temperature must be 0 where there are several beams", self.temperature)
        self._check_hints()

    def _check_hints(self) -> None:
        names = ", ".join(HINTS)
        for name in self.hints:
            _require(name in HINTS, f"hints must be some of {names}", name)
        for name in HINTS:
            weight = getattr(self, name)
            on = not weight or name in self.hints
            _require(on, f"{name} is the weight of a hint that must be on (add {name!r} to hints) or 0", weight)
