"""Beside an answer: the same decoder reading raw text instead of segments, with the same adapter and settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from lloco_engine import baselines
from lloco_engine.request import AskRequest
from lloco_engine.streaming import AnswerStream
from lloco_engine.types import Answer

if TYPE_CHECKING:
    from lloco_engine.decoder.answering import AnsweringDecoder
    from lloco_engine.store import Store

__all__ = ["beside"]


class Answers(Protocol):
    """What has answered: an engine."""

    @property
    def store(self) -> Store:
        """Holds the documents."""
        ...

    @property
    def decoder(self) -> AnsweringDecoder:
        """Reads them."""
        ...


def beside(engine: Answers, request: AskRequest, ours: Answer) -> dict[str, Callable[[], AnswerStream]]:
    """The answers that stand beside one, each begun when it is called.

    Args:
        engine: answered.
        request: what was asked.
        ours: the answer.

    Returns:
        ``"in_context"``, from the whole documents that the hits come from, cut to the window; and ``"text_retrieval"``,
        from the text of the same hits.
    """

    def in_context() -> AnswerStream:
        documents = dict.fromkeys((hit.doc_id, hit.tenant) for hit in ours.hits)
        texts = [engine.store.document_text(doc_id, tenant) for doc_id, tenant in documents]
        asked = request.question, request.generate
        return baselines.stream_in_context(engine.decoder, texts, *asked, adapter=ours.adapter)

    def text_retrieval() -> AnswerStream:
        found_s = ours.usage.retrieve_s

        def searched(answer: Answer) -> Answer:
            usage = replace(answer.usage, retrieve_s=found_s, ttft_s=answer.usage.ttft_s + found_s)
            return replace(answer, usage=usage)

        asked = request.question, request.generate
        return baselines.stream_text_retrieval(engine.decoder, ours.hits, *asked, adapter=ours.adapter).then(searched)

    return {"in_context": in_context, "text_retrieval": text_retrieval}
