"""What the folder of a decoder says of it: found out without loading any weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lloco_engine import fingerprints, models
from lloco_engine.pretrained import read_decoder_config
from lloco_engine.weights import weight_files

if TYPE_CHECKING:
    from lloco_engine.decoder.answering import AnsweringDecoder
    from lloco_engine.decoder.template import Template
    from lloco_engine.shape import DecoderShape

__all__ = ["DecoderFacts"]


@dataclass(frozen=True)
class DecoderFacts:
    """A decoder without its weights: the attributes of a decoder that chunking and a manifest need."""

    name: str
    fingerprint: str
    tokenizer: Any
    tokenizer_fingerprint: str
    template: Template
    shape: DecoderShape

    @property
    def template_tokens(self) -> int:
        """Tokens of the template prefix."""
        return len(self.template.prefix_ids)

    @classmethod
    def of(
        cls, decoder: str | AnsweringDecoder, template: str | None = None, fingerprint: str | None = None
    ) -> DecoderFacts:
        """The facts of a decoder by name, read from its folder, or of a loaded one.

        Args:
            decoder: which.
            template: as `LocalDecoder` takes it; a loaded decoder has its own.
            fingerprint: what is believed of a folder without weights, whose fingerprint cannot be taken.

        Raises:
            ModelNotFound: nothing of that name can be read.
            UnsupportedModel: the engine cannot run its family.
        """
        from lloco_engine.decoder.template import Template
        from lloco_engine.shape import DecoderShape

        if not isinstance(decoder, str):
            return cls(
                decoder.name,
                decoder.fingerprint,
                decoder.tokenizer,
                decoder.tokenizer_fingerprint,
                decoder.template,
                decoder.shape,
            )
        folder = Path(models.decoder_folder(decoder))
        if fingerprint is None or weight_files(folder):
            fingerprint = fingerprints.model_fingerprint(folder)  # first: it says best what is wrong with a folder
        config = read_decoder_config(folder)
        tokenizer = models.load_tokenizer(decoder)
        shape = DecoderShape.of(config)
        return cls(
            decoder,
            fingerprint,
            tokenizer,
            fingerprints.tokenizer_fingerprint(tokenizer),
            Template.suited(tokenizer, config, template),
            shape,
        )
