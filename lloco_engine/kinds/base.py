"""The contract of a kind of memory, and the kinds by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from lloco_engine.config import DType, PrefixConfig
from lloco_engine.errors import ConfigError, StoreError
from lloco_engine.plugins import run_plugins
from lloco_engine.types import AnySegment, Prefix, SegmentReference

if TYPE_CHECKING:
    import torch

    from lloco_engine.shape import DecoderShape

__all__ = ["GROUP", "Format", "MemoryKind", "Room", "Sizes", "Tensors", "get", "of", "register_memory"]

GROUP = "lloco.memories"  # entry points of installed packages

Tensors = dict[str, "torch.Tensor"]


class _Decoder(Protocol):
    """What a decoder's prompts take their positions from."""

    @property
    def shape(self) -> DecoderShape: ...

    @property
    def template_tokens(self) -> int: ...


@dataclass(frozen=True)
class Sizes:
    """A decoder's, as a kind may need them: ``embedding`` are the numbers of an input embedding."""

    layers: int
    kv_heads: int
    head_dim: int
    embedding: int = 0

    @classmethod
    def of(cls, shape: DecoderShape) -> Sizes:
        """Those of a decoder."""
        return cls(shape.layers, shape.kv_heads, shape.head_dim, shape.embedding)


@dataclass(frozen=True)
class Room:
    """The positions of a prompt.

    Args:
        template: tokens of the template prefix.
        text: tokens of the question and of the longest answer, which follow the segments.
        window: positions that the decoder can attend over.
        rotary: whether what stands in the place of input embeddings takes a position each, as it does where positions
            are rotary.
        immovable: why keys cannot be moved to other positions; "" where they can.
    """

    template: int
    text: int
    window: int
    rotary: bool = True
    immovable: str = ""

    @classmethod
    def of(cls, decoder: _Decoder, text: int) -> Room:
        """Those of a prompt to a decoder."""
        shape = decoder.shape
        return cls(decoder.template_tokens, text, shape.window, shape.rotary, shape.immovable)


class Format(ABC):
    """What the segment files of one kind have in common in a store."""

    called: ClassVar[str]  # as `MemoryKind.called`
    segment: ClassVar[type[AnySegment]]  # what it packs

    @abstractmethod
    def marker(self, tensors: Collection[str]) -> str:
        """What a file with tensors of these names says that it is."""

    def pack(self, segment: AnySegment, segment_id: str) -> Tensors:
        """The tensors of a segment's file.

        Raises:
            StoreError: it is of another kind or shape, or has numbers that cannot be kept.
        """
        if not isinstance(segment, self.segment):
            raise StoreError(
                f"memory of a segment must be the store's, {self.called}, and this one is {of(segment).called}"
            )
        return self._pack(segment, segment_id)

    @abstractmethod
    def _pack(self, segment: Any, segment_id: str) -> Tensors:
        """See `pack`."""

    def rounded(self, segment: Any) -> Any:
        """A segment as it will be read from its file; gradients pass as if nothing were rounded.

        Of a kind that nothing trains, the segment itself.
        """
        return segment

    def strings(self, segment: Any) -> dict[str, str]:
        """What the file's header says of the segment, beside its id and its source tokens."""
        return {}

    @abstractmethod
    def shapes(self, header: Mapping[str, Any]) -> dict[str, tuple[str, list[int]]]:
        """The tensors that a file with this header must have: type as safetensors calls it, and shape."""

    def fault(self, tensors: Tensors) -> str | None:
        """What is wrong with tensors of the right shapes."""
        return None

    @abstractmethod
    def unpack(self, tensors: Tensors, source_tokens: int, strings: Mapping[str, str]) -> AnySegment:
        """The segment that a file says; `ValueError` where ``strings`` cannot be understood."""


class MemoryKind(ABC):
    """One kind of memory.

    name    : as `Compressor.memory` and manifests have it
    called  : as messages do
    segment : the class of its segments, each with ``slots`` and ``source_tokens``
    embeds  : whether its segments are read in the place of input embeddings, before all text, so that they do not
              depend on the template prefix; else slots are read in attention, after it
    dtype   : type that the numbers of segments have on disk in a new store, where nobody chose another
    """

    name: ClassVar[str]
    called: ClassVar[str]
    segment: ClassVar[type[AnySegment]]
    embeds: ClassVar[bool] = False
    dtype: ClassVar[DType] = "float16"

    @abstractmethod
    def format(self, sizes: Sizes, dtype: DType) -> Format:
        """How segments of a decoder of these sizes are packed; ``dtype`` is the type of their numbers on disk."""

    def check(self, config: PrefixConfig, room: Room) -> None:  # noqa: B027
        """Raise `ConfigError` where a decoder cannot read segments as they are to be placed."""

    @abstractmethod
    def place(
        self, segments: Sequence[Any], config: PrefixConfig, room: Room, scores: Sequence[float] | None = None
    ) -> Prefix:
        """Segments as a decoder reads them in one prompt, whatever the window holds.

        Args:
            segments: in the order in which they stand.
            config: how they are placed.
            room: positions.
            scores: what search thinks of each.

        Returns:
            a prefix whose ``segments`` are compact KV; or, for a kind that ``embeds``, one with ``embeddings``.

        Raises:
            ConfigError: as `check`.
        """

    def is_ordered(self, config: PrefixConfig) -> bool:
        """Whether it matters in which order segments stand: then those of a document follow their order in it."""
        return False

    def free(self, room: Room) -> int | None:
        """Positions that the window leaves for slots, where each takes one; None where slots share positions."""
        return None

    def advice(self, config: PrefixConfig, segments: int) -> str:
        """What helps where so many segments, the question and its answer do not fit the window."""
        return "shorten the question or lower max_new_tokens"


_kinds: dict[str, MemoryKind] = {}
_Class = TypeVar("_Class", bound=type[MemoryKind])


def register_memory(kind: _Class) -> _Class:
    """Make a kind of memory known by its ``name``, in this process. Also a decorator. Returns the class.

    Raises:
        ConfigError: the class is no `MemoryKind`, or the name is another's.
    """
    if not isinstance(kind, type) or not issubclass(kind, MemoryKind):
        raise ConfigError(f"a kind of memory must be a class derived from MemoryKind, not {kind!r}")
    known = type(_kinds.get(kind.name))
    if kind.name in _kinds and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ConfigError(f"the kind of memory {kind.name!r} is there already: give {kind.__name__} another name")
    _kinds[kind.name] = kind()
    return kind


def get(name: str) -> MemoryKind:
    """The kind of a name; one of a user's own is looked for in plugins and installed packages.

    Raises:
        ConfigError: there is none.
    """
    if name not in _kinds:
        run_plugins()
        for point in entry_points(group=GROUP, name=name):
            register_memory(point.load())
    if name not in _kinds:
        raise ConfigError(
            f"memory must be one of {', '.join(_kinds)}, not {name!r}; a kind of your own is registered by "
            "lloco_engine.register_memory, or with `lloco --plugin FILE`"
        )
    return _kinds[name]


def of(segment: AnySegment) -> MemoryKind:
    """The kind of a segment.

    Raises:
        ConfigError: it is of none.
    """
    if isinstance(segment, SegmentReference):
        return get(segment.memory)
    found = next((kind for kind in _kinds.values() if isinstance(segment, kind.segment)), None)
    if found is None:
        raise ConfigError(f"a segment must be of one of the kinds {', '.join(_kinds)}, not {type(segment).__name__}")
    return found
