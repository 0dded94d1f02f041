"""The values that flow along the spine: Document -> Chunk -> Segment -> Hit -> Prefix -> Answer.

All are frozen. Every tensor's shape, dtype and meaning is stated here and nowhere else.
Letters used for shapes: ``L`` layers, ``H`` KV heads, ``D`` head dimension, ``N`` slots of all heads together,
``E`` numbers of an input embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, cast

if TYPE_CHECKING:  # a type never costs the import of torch
    import torch

__all__ = [
    "Answer",
    "AnySegment",
    "Chunk",
    "Divergence",
    "Document",
    "Failure",
    "Hit",
    "IngestReport",
    "MetadataValue",
    "Page",
    "Prefix",
    "Segment",
    "SegmentReference",
    "Span",
    "Turn",
    "Usage",
]

# What JSON holds. `lloco_engine.metadata` says which other types become it.
MetadataValue: TypeAlias = str | int | float | bool | Sequence["MetadataValue"] | Mapping[str, "MetadataValue"] | None


@dataclass(frozen=True)
class Span:
    """Half-open range ``[start, end)`` of characters in a document's text."""

    start: int
    end: int


@dataclass(frozen=True)
class Page:
    """One page of a document: ``number`` counts from 1, ``label`` is what the page calls itself ("iv"; "" for nothing
    else than its number), ``span`` is the place of its text in the document."""

    number: int
    label: str
    span: Span

    @property
    def name(self) -> str:
        """What a citation calls it: its label, else its number."""
        return self.label or str(self.number)


@dataclass(frozen=True)
class Document:
    """One source text.

    ``doc_id`` is unique within a tenant; the same id with another text replaces the earlier version. ``metadata`` is
    what filters see; common types beside JSON's are taken too (`lloco_engine.metadata`). ``pages`` are in order, for
    formats that have them; ``encoding`` is that of the file it was read from, "" where it had none.
    ``origin`` is the file, and the record in it, that a reader found it in, as a URI; empty for a document that came
    otherwise. It says which document a file is, and is no part of what the document says. ``private`` is what the
    program that added the document keeps with it: no reader of files sets it, no user's filter sees it, no hit has it.
    """

    doc_id: str
    text: str
    title: str = ""
    source: str = ""
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)
    tenant: str = ""
    pages: tuple[Page, ...] = ()
    encoding: str = ""
    origin: str = field(default="", compare=False)
    private: Mapping[str, MetadataValue] = field(default_factory=dict)

    @property
    def content_hash(self) -> str:
        """SHA-256 of the text, 64 lowercase hex digits."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()


@dataclass(frozen=True)
class Chunk:
    """The stretch of a document that becomes one segment.

    ``span`` is its place in the document; ``text`` is exactly the document's text there;
    ``token_ids`` are the decoder's tokens of ``text``; ``windows`` are the search windows, in document characters.
    """

    doc_id: str
    ordinal: int
    span: Span
    text: str
    token_ids: tuple[int, ...]
    windows: tuple[Span, ...]


@dataclass(frozen=True)
class Divergence:
    """How far the decoder is from what it expects with the whole chunk when it reads a segment instead.

    Kullback-Leibler divergence of the next token's distribution, in nats a token, on parts of the chunk's repetition
    that no step of refinement aimed at: ``before`` the ``steps`` that were tried, and ``after`` them, of what was kept.
    Without steps it was only measured.
    """

    before: float
    after: float
    steps: int


@dataclass(frozen=True, eq=False)
class Segment:
    """The compressed memory of one chunk as compact KV: the slots that each KV head of each layer keeps.

    Heads are ragged. Slots lie flat, by layer, then KV head, then position in the chunk.

    keys    : (N, D)  rotary embedding applied at the chunk's own positions (template prefix, then chunk)
    values  : (N, D)
    bias    : (N,)    float32, added to the attention logit of the slot (log of its mass)
    lengths : (L, H)  int64, slots of each head; its sum is N
    source_tokens : decoder tokens of the chunk that the slots stand for
    positions : (N,)  int32, the position of each slot among those, or None where it is not known (segments of former
              releases): such a segment is read where every layer reads all that lies before a token
    divergence : where it was measured, as it is when a segment is refined, else None

    Where a decoder's layers differ in head size, D is the largest, and the others are filled up with zeros.
    """

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    lengths: torch.Tensor
    source_tokens: int
    positions: torch.Tensor | None = None
    divergence: Divergence | None = None

    @property
    def slots(self) -> int:
        """Slots of the segment: the mean over all KV heads, rounded up."""
        heads = self.lengths.numel()
        return -(-int(self.keys.shape[0]) // heads)


class AnySegment(Protocol):
    """The compressed memory of one chunk, of any kind (`lloco_engine.kinds`)."""

    @property
    def slots(self) -> int:
        """What it costs in a prompt."""
        ...

    @property
    def source_tokens(self) -> int:
        """Decoder tokens of the chunk that it stands for."""
        ...


@dataclass(frozen=True)
class SegmentReference:
    """A segment that is read elsewhere: its id, the name of its kind of memory, and what it costs in a prompt."""

    segment_id: str
    memory: str
    slots: int
    source_tokens: int


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation before the question, untrusted like the question itself."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True)
class Hit:
    """One retrieved segment and why it was retrieved.

    ``score`` is that of its best search window, at most 1 (`Store.search`; 1.0 where nothing was searched for);
    ``windows`` are the matching search windows, best first; ``text`` is the chunk's verbatim text;
    ``slots`` is what the segment costs in a prompt (mean over heads, rounded up); ``also_in`` are ids of other
    documents of the tenant that have the very same text, which the segment stands for too; ``pages`` are those that the
    chunk touches, in order, where the document has pages.
    """

    segment_id: str
    doc_id: str
    ordinal: int
    span: Span
    text: str
    source_tokens: int
    score: float
    windows: tuple[Span, ...] = ()
    title: str = ""
    source: str = ""
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)
    tenant: str = ""
    version: int = 1
    slots: int = 0
    also_in: tuple[str, ...] = ()
    pages: tuple[Page, ...] = ()

    @property
    def page(self) -> Page | None:
        """The page on which its best search window begins, or the chunk where there is none; None without pages."""
        pages = self.pages_of(self.windows[0] if self.windows else self.span)
        return pages[0] if pages else None

    def pages_of(self, span: Span) -> tuple[Page, ...]:
        """The pages that a part of the chunk touches, in order."""
        return tuple(page for page in self.pages if page.span.start < span.end and span.start < page.span.end)

    def quote(self, window: Span) -> str:
        """The document's verbatim text in ``window``, which lies inside ``span``."""
        return self.text[window.start - self.span.start : window.end - self.span.start]


@dataclass(frozen=True, eq=False)
class Prefix:
    """Segments placed for one prompt, all of one kind, as the decoder reads them.

    ``segments`` in placement order; ``start`` is the position of the first text token after them; ``placement`` is
    ``"parallel"`` (each at the positions it was made at) or ``"sequence"`` (one after another); ``offsets`` are the
    positions added to each segment's own. ``focus`` is how many segments of compact KV each query reads,
    those in which the largest of its logits lie (0: all); ``prior``, one number a segment, is added to its largest
    logit where they are compared (empty: 0 for all).

    embeddings : (S, E) what stands before all text, the template prefix too, in the place of input embeddings; None
        where the segments are compact KV, read in attention after the template prefix
    """

    segments: tuple[AnySegment, ...]
    offsets: tuple[int, ...]
    start: int
    placement: Literal["parallel", "sequence"] = "parallel"
    focus: int = 0
    prior: tuple[float, ...] = ()
    embeddings: torch.Tensor | None = None

    @property
    def compact(self) -> tuple[Segment, ...]:
        """The segments that attention reads, where it does so in this process: all or none."""
        return cast("tuple[Segment, ...]", self.segments) if self.embeddings is None else ()

    @property
    def slots(self) -> int:
        """Slots of all segments together (mean over heads, each segment rounded up)."""
        return sum(segment.slots for segment in self.segments)

    @property
    def source_tokens(self) -> int:
        """Decoder tokens that the segments stand for."""
        return sum(segment.source_tokens for segment in self.segments)


@dataclass(frozen=True)
class Usage:
    """The cost ledger of one question. Times in seconds, memory in bytes."""

    prompt_tokens: int = 0  # text tokens prefilled for this question, the shared template prefix not counted
    prompt_slots: int = 0  # slots read from segments (mean over heads)
    template_tokens: int = 0  # tokens of the template prefix, computed once per process
    source_tokens: int = 0  # decoder tokens that the slots replace
    source_tokens_tiktoken: int = 0  # the same text counted by tiktoken
    completion_tokens: int = 0
    retrieve_s: float = 0.0
    load_s: float = 0.0  # reading segments from disk and placing them
    ttft_s: float = 0.0  # question in -> first token out, retrieval and loading included
    decode_s: float = 0.0  # first token -> last token
    peak_memory: int = 0  # of the process (CPU) or the device's allocator (GPU)

    @property
    def tokens_per_s(self) -> float:
        """Decode speed after the first token; 0 when there was only one."""
        return (self.completion_tokens - 1) / self.decode_s if self.decode_s > 0 and self.completion_tokens > 1 else 0.0


@dataclass(frozen=True)
class Answer:
    """What a question came back with.

    ``reasoning`` is what a decoder that thinks aloud thought before, which is no part of ``text``;
    ``finish`` is ``"stop"`` or ``"length"``; ``adapter`` is the name of the adapter that answered, or ``"none"``;
    ``hints`` are those of `GenerateConfig.hints` that it was made with.
    """

    text: str
    hits: tuple[Hit, ...] = ()
    usage: Usage = field(default_factory=Usage)
    finish: Literal["stop", "length"] = "stop"
    warnings: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    adapter: str = "none"
    reasoning: str = ""
    hints: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """One input that was not ingested, and the rule it broke; ``doc_id`` is its document's, where it was one."""

    source: str
    reason: str
    doc_id: str = ""


@dataclass(frozen=True)
class IngestReport:
    """What an ingest did. Lists hold document ids; ``seconds`` is wall time.

    ``replaced`` have another text, title or metadata; ``moved`` the same text in another place; ``vanished`` were read
    before from a folder or file that was read now, and are no longer there; ``pruned`` are those of them that were
    removed. ``skipped`` counts what folders hold and was left out, by reason.
    """

    added: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    repaired: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    vanished: tuple[str, ...] = ()
    pruned: tuple[str, ...] = ()
    failed: tuple[Failure, ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)
    segments: int = 0
    source_tokens: int = 0
    slots: int = 0
    bytes_written: int = 0
    compress_s: float = 0.0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        from dataclasses import asdict

        return asdict(self)
