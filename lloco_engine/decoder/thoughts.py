"""What a decoder thinks aloud before it answers: where that begins and ends among its tokens."""

from __future__ import annotations

from typing import Any

from lloco_engine.decoder.template import Template
from lloco_engine.tokenizing import encoder_of

__all__ = ["Thoughts"]


class Thoughts:
    """A decoder's markers of thoughts as tokens.

    Args:
        tokenizer: the decoder's.
        template: says what the markers are, and whether a prompt ends inside thoughts.

    ``begin`` and ``close`` are the tokens that begin and end thoughts, ``head`` those before an answer without any.
    Where an added token is among them they are looked for as tokens (``begin_is_token``, ``end_is_token``), for such
    are no text; else as text, which may be written in other tokens.
    """

    def __init__(self, tokenizer: Any, template: Template) -> None:
        assert template.markers is not None
        encoder, self.markers, self.opened = encoder_of(tokenizer), template.markers, template.thinks
        self.begin = encoder.prompt_ids([(self.markers.begin, True)], "text")
        self.close = encoder.prompt_ids([(self.markers.end, True)], "text")
        self.head = encoder.prompt_ids([(self.markers.head, True)], "text")
        added = set(getattr(tokenizer, "added_tokens_decoder", None) or ())
        self.begin_is_token = not added.isdisjoint(self.begin)
        self.end_is_token = not added.isdisjoint(self.close)

    @classmethod
    def of(cls, tokenizer: Any, template: Template) -> Thoughts | None:
        """Those of a decoder; None where it is not known to think aloud."""
        return None if template.markers is None else cls(tokenizer, template)
