"""Hints: logits processors that read the text of the sources, which is not in the prompt (docs/decisions/0010).

A compressed segment says well which word is meant, and its last syllables less well: a name of several tokens comes out
as another that begins alike. The sources' text is at hand, since the store has it. ``spelling`` makes tokens likelier
that go on to a word of the sources, ``pointing`` those that begin or go on to a word that the question asks for. Both
are off unless `GenerateConfig.hints` names them.
"""

from __future__ import annotations

from collections.abc import Mapping

from lloco_engine.decoder.hints.pointing import Pointing
from lloco_engine.decoder.hints.spelling import Spelling
from lloco_engine.decoder.hints.words import Pieces, SourceWords
from lloco_engine.decoder.processors import Processor

__all__ = ["Pieces", "hints"]


def hints(weights: Mapping[str, float], pieces: Pieces, sources: str, question: str) -> dict[str, Processor]:
    """The hints that are on, by name, in the order in which they process logits.

    Args:
        weights: of those that are asked for, in nats: `GenerateConfig.hint_weights`.
        pieces: of the decoder's tokenizer.
        sources: their text; without any there are no hints.
        question: that is answered.
    """
    if not weights or not sources:
        return {}
    words = SourceWords(sources)
    made: dict[str, Processor] = {}
    if weight := weights.get("spelling"):
        made["spelling"] = Spelling(pieces, words, weight)
    if weight := weights.get("pointing"):
        made["pointing"] = Pointing(pieces, words, question, weight)
    return made
