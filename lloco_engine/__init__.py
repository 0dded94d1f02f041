"""LLoCO: documents are compressed offline into small memories that a decoder reads directly.

::

    from lloco_engine import Engine

    with Engine.open("my-store") as engine:
        engine.ingest(["docs/"])
        print(engine.ask("What does the pump in hall 3 need?").text)

Importing this package is light: torch and the rest load when they are first needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lloco_engine.cluster import RayCluster
    from lloco_engine.compress.base import Compressor
    from lloco_engine.compress.registry import register
    from lloco_engine.compress.scorer import Observed, ScorerCompressor
    from lloco_engine.config import (
        ChunkConfig,
        CompressConfig,
        GenerateConfig,
        PrefixConfig,
        ReadConfig,
        RetrieveConfig,
        StoreConfig,
    )
    from lloco_engine.decoder.facts import DecoderFacts
    from lloco_engine.decoder.memory import segment_slots
    from lloco_engine.decoder.prompt import Prompt
    from lloco_engine.engine import Engine
    from lloco_engine.errors import (
        AdapterError,
        ConfigError,
        DecoderUnavailable,
        DocumentError,
        LLoCOError,
        ModelNotFound,
        NotInStore,
        PromptTooLong,
        SegmentUnavailable,
        StoreCorrupt,
        StoreError,
        StoreFull,
        StoreLocked,
        StoreMismatch,
        StoreNotFound,
        UnsupportedModel,
        WrongProcess,
    )
    from lloco_engine.filters import And, Condition, Filter, Filters, Not, Or, parse_filter
    from lloco_engine.kinds import MemoryKind, register_memory
    from lloco_engine.metadata import plain_metadata
    from lloco_engine.reasoning import without_thoughts
    from lloco_engine.remote import RemoteDecoder, register_decoder
    from lloco_engine.request import AskRequest
    from lloco_engine.store.segment_reader import SegmentReader
    from lloco_engine.streaming import AnswerStream, AsyncAnswerStream
    from lloco_engine.types import (
        Answer,
        Chunk,
        Document,
        Failure,
        Hit,
        IngestReport,
        Page,
        Prefix,
        Segment,
        SegmentReference,
        Span,
        Turn,
        Usage,
    )

__version__ = "0.1.0"

_HOMES = {
    "streaming": ("AnswerStream", "AsyncAnswerStream"),
    "cluster": ("RayCluster",),
    "compress.base": ("Compressor",),
    "compress.registry": ("register",),
    "compress.scorer": ("Observed", "ScorerCompressor"),
    "kinds": ("MemoryKind", "register_memory"),
    "config": (
        "ChunkConfig",
        "CompressConfig",
        "GenerateConfig",
        "PrefixConfig",
        "ReadConfig",
        "RetrieveConfig",
        "StoreConfig",
    ),
    "engine": ("Engine",),
    "errors": (
        "AdapterError",
        "ConfigError",
        "DecoderUnavailable",
        "DocumentError",
        "LLoCOError",
        "ModelNotFound",
        "NotInStore",
        "PromptTooLong",
        "SegmentUnavailable",
        "StoreCorrupt",
        "StoreError",
        "StoreFull",
        "StoreLocked",
        "StoreMismatch",
        "StoreNotFound",
        "UnsupportedModel",
        "WrongProcess",
    ),
    "filters": ("And", "Condition", "Filter", "Filters", "Not", "Or", "parse_filter"),
    "metadata": ("plain_metadata",),
    "decoder.facts": ("DecoderFacts",),
    "decoder.memory": ("segment_slots",),
    "decoder.prompt": ("Prompt",),
    "reasoning": ("without_thoughts",),
    "remote": ("RemoteDecoder", "register_decoder"),
    "request": ("AskRequest",),
    "store.segment_reader": ("SegmentReader",),
    "types": (
        "Answer",
        "Chunk",
        "Document",
        "Failure",
        "Hit",
        "IngestReport",
        "Page",
        "Prefix",
        "Segment",
        "SegmentReference",
        "Span",
        "Turn",
        "Usage",
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AdapterError",
    "And",
    "Answer",
    "AnswerStream",
    "AskRequest",
    "AsyncAnswerStream",
    "Chunk",
    "ChunkConfig",
    "CompressConfig",
    "Compressor",
    "Condition",
    "ConfigError",
    "DecoderFacts",
    "DecoderUnavailable",
    "Document",
    "DocumentError",
    "Engine",
    "Failure",
    "Filter",
    "Filters",
    "GenerateConfig",
    "Hit",
    "IngestReport",
    "LLoCOError",
    "MemoryKind",
    "ModelNotFound",
    "Not",
    "NotInStore",
    "Observed",
    "Or",
    "Page",
    "Prefix",
    "PrefixConfig",
    "Prompt",
    "PromptTooLong",
    "RayCluster",
    "ReadConfig",
    "RemoteDecoder",
    "RetrieveConfig",
    "ScorerCompressor",
    "Segment",
    "SegmentReader",
    "SegmentReference",
    "SegmentUnavailable",
    "Span",
    "StoreConfig",
    "StoreCorrupt",
    "StoreError",
    "StoreFull",
    "StoreLocked",
    "StoreMismatch",
    "StoreNotFound",
    "Turn",
    "UnsupportedModel",
    "Usage",
    "WrongProcess",
    "__version__",
    "parse_filter",
    "plain_metadata",
    "register",
    "register_decoder",
    "register_memory",
    "segment_slots",
    "without_thoughts",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
