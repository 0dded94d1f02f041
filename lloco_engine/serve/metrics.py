"""What the server counts, for Prometheus. Nothing here tells tenants apart, or holds a text."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lloco_engine.types import Answer

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The figures of one server, from its start on."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("lloco_requests", "Requests.", ("method", "route", "status"), registry=registry)
        self.request_s = Histogram(
            "lloco_request_seconds", "Whole requests.", ("route",), registry=registry, buckets=_SECONDS
        )
        self.first_token_s = Histogram(
            "lloco_first_token_seconds", "Question in, first token out.", registry=registry, buckets=_SECONDS
        )
        self.answers = Counter("lloco_answers", "Answers that were made to their end.", registry=registry)
        self.abandoned = Counter("lloco_answers_abandoned", "Answers whose client went away.", registry=registry)
        self.tokens = Counter("lloco_answer_tokens", "Tokens of answers.", registry=registry)
        self.prompt_tokens = Counter("lloco_prompt_tokens", "Text tokens of prompts.", registry=registry)
        self.slots = Counter("lloco_prompt_slots", "Slots that were read instead of text.", registry=registry)
        self.source_tokens = Counter("lloco_source_tokens", "Tokens that these slots stand for.", registry=registry)
        self.answering = Gauge("lloco_answering", "Questions that are being answered.", registry=registry)
        self.waiting = Gauge("lloco_queue", "Questions that wait for a place.", registry=registry)
        self.ingest_waiting = Gauge("lloco_ingest_queue", "Files that are to be compressed.", registry=registry)
        self.ingested = Counter("lloco_ingests", "Files by what became of them.", ("status",), registry=registry)
        self.ingest_tokens = Counter("lloco_ingest_tokens", "Tokens that were compressed.", registry=registry)
        self.ingest_s = Counter("lloco_ingest_seconds", "Seconds of compressing.", registry=registry)
        self.cached_bytes = Gauge("lloco_segment_cache_bytes", "Of segments held in memory.", registry=registry)
        self.cached_segments = Gauge("lloco_segment_cache_segments", "How many.", registry=registry)

    def load(self, answered: int, waiting: int) -> None:
        """How many questions are answered and wait now."""
        self.answering.set(answered)
        self.waiting.set(waiting)

    def cached(self, segments: int, size: int) -> None:
        """How many segments are held in memory now, and their bytes."""
        self.cached_segments.set(segments)
        self.cached_bytes.set(size)

    def answered(self, answer: Answer) -> None:
        """An answer was made."""
        usage = answer.usage
        self.answers.inc()
        self.first_token_s.observe(usage.ttft_s)
        self.tokens.inc(usage.completion_tokens)
        self.prompt_tokens.inc(usage.prompt_tokens)
        self.slots.inc(usage.prompt_slots)
        self.source_tokens.inc(usage.source_tokens)

    def text(self) -> bytes:
        """All figures as Prometheus reads them."""
        return generate_latest(self.registry)
