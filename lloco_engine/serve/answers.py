"""Answers as the API writes them: message annotations, usage, and the whole in a field of our own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lloco_engine.types import Answer, Hit, Span, Usage

__all__ = ["api_usage", "citations", "file_of", "lloco_field", "source", "usage"]

_OF_A_FILE = re.compile(r"(file-[0-9a-f]{32})@([\w%-]+)(/.*)?", re.DOTALL)


def file_of(doc_id: str) -> tuple[str | None, str | None]:
    """The uploaded file that a document was made of, and its vector store; None twice for one that came otherwise."""
    found = _OF_A_FILE.fullmatch(doc_id)
    return (found[1], found[2]) if found else (None, None)


def citations(hits: Sequence[Hit]) -> list[dict[str, Any]]:
    """What the answer stands on, best first, as annotations of a message."""
    return [{"type": "file_citation", "file_citation": _citation(hit)} for hit in hits]


def _citation(hit: Hit) -> dict[str, Any]:
    span = _best(hit)
    file, _ = file_of(hit.doc_id)
    return {
        "document": hit.doc_id,
        "file_id": file or hit.doc_id,
        "filename": hit.source or hit.doc_id,
        "title": hit.title,
        "page": _page(hit, span),
        "start": span.start,
        "end": span.end,
        "quote": hit.quote(span),
    }


def source(hit: Hit) -> dict[str, Any]:
    """All there is to say about a hit, its chunk's text included."""
    span = _best(hit)
    file, _ = file_of(hit.doc_id)
    return {
        "document": hit.doc_id,
        "file_id": file,
        "title": hit.title,
        "source": hit.source,
        "page": _page(hit, span),
        "start": span.start,
        "end": span.end,
        "quote": hit.quote(span),
        "score": hit.score,
        "text": hit.text,
        "text_start": hit.span.start,
        "text_end": hit.span.end,
        "windows": [{"start": one.start, "end": one.end, "page": _page(hit, one)} for one in hit.windows],
        "metadata": dict(hit.metadata),
        "segment": hit.ordinal,
        "also_in": list(hit.also_in),
    }


def _best(hit: Hit) -> Span:
    return hit.windows[0] if hit.windows else hit.span


def _page(hit: Hit, span: Span) -> str | None:
    pages = hit.pages_of(span)
    return pages[0].name if pages else None


def usage(cost: Usage) -> dict[str, Any]:
    """The cost ledger of an answer. Seconds, and bytes."""
    return {
        "prompt_tokens": cost.prompt_tokens,
        "slots": cost.prompt_slots,
        "source_tokens": cost.source_tokens,
        "template_tokens": cost.template_tokens,
        "completion_tokens": cost.completion_tokens,
        "retrieve_s": cost.retrieve_s,
        "load_s": cost.load_s,
        "first_token_s": cost.ttft_s,
        "decode_s": cost.decode_s,
        "tokens_per_s": cost.tokens_per_s,
        "memory_bytes": cost.peak_memory,
    }


def api_usage(cost: Usage) -> dict[str, Any]:
    """Usage as the API has it: slots are tokens of the prompt that were computed before."""
    prompt = cost.prompt_tokens + cost.prompt_slots
    return {
        "prompt_tokens": prompt,
        "completion_tokens": cost.completion_tokens,
        "total_tokens": prompt + cost.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cost.prompt_slots},
    }


def lloco_field(answer: Answer) -> dict[str, Any]:
    """Sources, warnings and cost, whole."""
    return {
        "sources": [source(hit) for hit in answer.hits],
        "warnings": list(answer.warnings),
        "adapter": answer.adapter,
        "hints": list(answer.hints),
        "reasoning": answer.reasoning,
        "usage": usage(answer.usage),
    }
