"""What a decoder is, its weights aside: what chunking, placing and most questions to a compressor need of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from lloco_engine.decoder.template import Template
    from lloco_engine.shape import DecoderShape

__all__ = ["DecoderSpec"]


class DecoderSpec(Protocol):
    """A decoder that is loaded, or what its folder says of it."""

    @property
    def name(self) -> str:
        """What the user called it."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        ...

    @property
    def template(self) -> Template:
        """The fixed text of its prompts."""
        ...

    @property
    def template_tokens(self) -> int:
        """Tokens of the template prefix."""
        ...

    @property
    def shape(self) -> DecoderShape:
        """Its sizes."""
        ...
