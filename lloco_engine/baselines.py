"""What LLoCO is compared with: the same decoder, its base weights, reading raw text instead of segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lloco_engine.config import GenerateConfig
from lloco_engine.types import Answer, Hit
from lloco_engine.usage import usage_of

if TYPE_CHECKING:
    from lloco_engine.decoder.local import LocalDecoder

__all__ = ["in_context", "keep_ends", "room_for_text", "text_ids", "text_retrieval"]


def in_context(
    decoder: LocalDecoder, texts: Sequence[str], question: str, config: GenerateConfig | None = None
) -> Answer:
    """Answer with whole documents in the prompt.

    Text beyond the decoder's window is cut out of the middle, half kept at each end, as SCROLLS and LongBench do; a
    warning says how much.

    Args:
        decoder: reads and answers.
        texts: the documents' texts, joined by blank lines.
        question: the question.
        config: how tokens are chosen.

    Raises:
        PromptTooLong: the question and the answer alone do not fit the window.
    """
    config = config or GenerateConfig()
    ids = text_ids(decoder, "\n\n".join(texts))
    kept = keep_ends(ids, room_for_text(decoder, question, config))
    return _read(decoder, kept, len(ids), "of the middle ", question, config)


def text_retrieval(
    decoder: LocalDecoder, hits: Sequence[Hit], question: str, config: GenerateConfig | None = None
) -> Answer:
    """Answer with the text of the retrieved chunks in the prompt, best first.

    Text beyond the decoder's window is cut at the end, where the worst hits are; a warning says how much.

    Args:
        decoder: reads and answers.
        hits: whose text is read.
        question: the question.
        config: how tokens are chosen.

    Raises:
        PromptTooLong: the question and the answer alone do not fit the window.
    """
    config = config or GenerateConfig()
    ids = text_ids(decoder, "\n\n".join(hit.text.strip() for hit in hits))
    kept = ids[: room_for_text(decoder, question, config)]
    return replace(_read(decoder, kept, len(ids), "of the end ", question, config), hits=tuple(hits))


def text_ids(decoder: LocalDecoder, text: str) -> list[int]:
    """Token ids of untrusted text right after the template prefix; control tokens written in it are plain text."""
    return decoder.template.text_ids(text)


def room_for_text(decoder: LocalDecoder, question: str, config: GenerateConfig) -> int:
    """Tokens of raw text that fit the window beside the template, a question and the longest answer."""
    asked = len(decoder.template.question_ids(question))
    return max(0, decoder.shape.window - decoder.template_tokens - asked - config.max_new_tokens)


def keep_ends(ids: list[int], most: int) -> list[int]:
    """At most ``most`` ids: all of them, or those of both ends, without the middle."""
    if len(ids) <= most:
        return ids
    tail = most // 2
    return ids[: most - tail] + ids[len(ids) - tail :]


def _read(
    decoder: LocalDecoder, kept: list[int], total: int, where: str, question: str, config: GenerateConfig
) -> Answer:
    from lloco_engine.decoder.local import Prompt

    # The sources stand in the prompt: guesses and hints from there give raw text the same help with decoding.
    draft = decoder.tokenizer.decode(kept)
    generation, pieces = decoder.stream(Prompt(question, context=kept or None, draft=draft), config)
    for _ in pieces:
        pass
    warnings = list(generation.warnings)
    if len(kept) < total:
        warnings.append(
            f"the text has {total} tokens and the decoder's window of {decoder.shape.window} leaves room for "
            f"{len(kept)}: {total - len(kept)} tokens {where}were left out"
        )
    return Answer(
        generation.text,
        usage=usage_of(decoder, generation),
        finish=generation.finish or "stop",
        warnings=tuple(warnings),
        reasoning=generation.reasoning,
        token_ids=tuple(generation.token_ids),
        hints=generation.hints,
    )
