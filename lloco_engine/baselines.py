"""What LLoCO is compared with: the same decoder reading raw text instead of segments.

Whoever compares gives a baseline what LLoCO had: its adapter and its settings, hints among them, which raw text takes
from itself. Without an adapter it answers with the base weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lloco_engine.config import GenerateConfig
from lloco_engine.streaming import AnswerStream
from lloco_engine.types import Answer, Hit, Prefix
from lloco_engine.usage import usage_of

if TYPE_CHECKING:
    from lloco_engine.decoder.answering import AnsweringDecoder
    from lloco_engine.decoder.local import LocalDecoder

__all__ = [
    "Text",
    "in_context",
    "of_hits",
    "read_once",
    "room_for_text",
    "stream_in_context",
    "stream_text_retrieval",
    "text_retrieval",
    "whole",
]

_JOINT = "\n\n"  # between texts that are read as one


@dataclass(frozen=True)
class Text:
    """Raw text as far as it fits: the token ids of what is kept, how many were left out, and of which part."""

    ids: list[int]
    left_out: int
    part: Literal["middle", "end"]

    def warnings(self, decoder: AnsweringDecoder) -> tuple[str, ...]:
        """What is to be said about what does not fit."""
        if not self.left_out:
            return ()
        return (
            f"the text has {len(self.ids) + self.left_out} tokens and the decoder's window of {decoder.shape.window} "
            f"leaves room for {len(self.ids)}: {self.left_out} tokens of the {self.part} were left out",
        )


def whole(decoder: AnsweringDecoder, texts: Sequence[str], room: int) -> Text:
    """Whole texts, joined by blank lines, in at most ``room`` tokens: both ends are kept, as SCROLLS and LongBench do.

    The tokens are those of untrusted text: control tokens written in it are plain text.
    """
    ids = decoder.template.text_ids(_JOINT.join(texts))
    if len(ids) <= room:
        return Text(ids, 0, "middle")
    tail = room // 2
    return Text(ids[: room - tail] + ids[len(ids) - tail :], len(ids) - room, "middle")


def of_hits(decoder: AnsweringDecoder, hits: Sequence[Hit], room: int) -> Text:
    """The text of hits, best first, in at most ``room`` tokens: what is left out is the end, where the worst are."""
    ids = decoder.template.text_ids(_JOINT.join(hit.text.strip() for hit in hits))
    return Text(ids[:room], max(0, len(ids) - room), "end")


def room_for_text(decoder: AnsweringDecoder, question: str, config: GenerateConfig) -> int:
    """Tokens of raw text that fit the window beside the template, a question and the longest answer."""
    asked = len(decoder.template.question_ids(question))
    return max(0, decoder.shape.window - decoder.template_tokens - asked - config.max_new_tokens)


def read_once(decoder: LocalDecoder, ids: Sequence[int], adapter: str | None = None) -> Prefix:
    """Text as a prefix that any number of questions can follow: its whole KV cache, as the answering weights make it.

    Args:
        decoder: reads it.
        ids: its tokens.
        adapter: that answers.
    """
    import torch

    from lloco_engine.compress.eviction import keep_slots

    everything = torch.ones(decoder.shape.layers, decoder.shape.kv_heads, len(ids), dtype=torch.bool)
    segment = keep_slots(decoder.prefill(ids, adapter=adapter), decoder.template_tokens, everything)
    return Prefix((segment,), (0,), decoder.template_tokens + len(ids))


def in_context(
    decoder: AnsweringDecoder,
    texts: Sequence[str],
    question: str,
    config: GenerateConfig | None = None,
    *,
    adapter: str | None = None,
) -> Answer:
    """Answer with whole documents in the prompt.

    Text beyond the decoder's window is cut out of the middle; a warning says how much.

    Args:
        decoder: reads and answers.
        texts: the documents' texts.
        question: the question.
        config: how tokens are chosen.
        adapter: a loaded one to read and answer with; None and "none" are the base weights.

    Raises:
        PromptTooLong: the question and the answer alone do not fit the window.
    """
    return stream_in_context(decoder, texts, question, config, adapter=adapter).whole()


def stream_in_context(
    decoder: AnsweringDecoder,
    texts: Sequence[str],
    question: str,
    config: GenerateConfig | None = None,
    *,
    adapter: str | None = None,
) -> AnswerStream:
    """`in_context`, piece by piece."""
    config = config or GenerateConfig()
    text = whole(decoder, texts, room_for_text(decoder, question, config))
    return _stream(decoder, text, question, config, adapter)


def text_retrieval(
    decoder: AnsweringDecoder,
    hits: Sequence[Hit],
    question: str,
    config: GenerateConfig | None = None,
    *,
    adapter: str | None = None,
) -> Answer:
    """Answer with the text of the retrieved chunks in the prompt, best first: text retrieval.

    Text beyond the decoder's window is cut at the end; a warning says how much.

    Args:
        decoder, question, config, adapter: as `in_context` takes them.
        hits: whose text is read.

    Raises:
        PromptTooLong: the question and the answer alone do not fit the window.
    """
    return stream_text_retrieval(decoder, hits, question, config, adapter=adapter).whole()


def stream_text_retrieval(
    decoder: AnsweringDecoder,
    hits: Sequence[Hit],
    question: str,
    config: GenerateConfig | None = None,
    *,
    adapter: str | None = None,
) -> AnswerStream:
    """`text_retrieval`, piece by piece."""
    config = config or GenerateConfig()
    text = of_hits(decoder, hits, room_for_text(decoder, question, config))
    return _stream(decoder, text, question, config, adapter, tuple(hits))


def _stream(
    decoder: AnsweringDecoder,
    text: Text,
    question: str,
    config: GenerateConfig,
    adapter: str | None,
    hits: tuple[Hit, ...] = (),
) -> AnswerStream:
    from lloco_engine.decoder.prompt import Prompt

    # The sources stand in the prompt: guesses and hints from there give raw text the same help with decoding.
    draft = decoder.tokenizer.decode(text.ids)
    generation, pieces = decoder.stream(Prompt(question, context=text.ids or None, draft=draft), config, adapter)

    def finish() -> Answer:
        return Answer(
            generation.text,
            hits=hits,
            usage=usage_of(decoder, generation),
            finish=generation.finish or "stop",
            warnings=(*generation.warnings, *text.warnings(decoder)),
            reasoning=generation.reasoning,
            token_ids=tuple(generation.token_ids),
            hints=generation.hints,
            adapter=adapter or "none",
        )

    return AnswerStream(pieces, hits, finish)
