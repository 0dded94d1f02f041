"""What a question costs: with no context, with retrieved segments, with a whole source, and with its text in context.

Each is measured beside another one on the same question, one after the other (A B A B), so that a machine that becomes
slower or faster meanwhile does not count. Decoding is timed over the same number of greedy tokens, one pass each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from lloco_engine.config import GenerateConfig, RetrieveConfig
from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.decoder.memory import Memory
from lloco_engine.demo import questions as demo_questions
from lloco_engine.eval.corpus import Corpus, Encoder
from lloco_engine.eval.machine import PeakMemory
from lloco_engine.eval.timing import forget_files, median_ratio, seconds
from lloco_engine.prefix import place
from lloco_engine.store import Store
from lloco_engine.types import Hit, Prefix

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from lloco_engine.eval.bench import BenchConfig
    from lloco_engine.eval.progress import Report

__all__ = ["SLOW", "QuestionCosts"]

SLOW = 3  # repeats at most of what takes seconds and differs by far


@dataclass(frozen=True)
class _Cost:
    """One question's cost. ``parts`` are the seconds before the decoder starts, by what they went into."""

    ttft_s: float
    tokens_per_s: float
    prompt_tokens: int
    prompt_slots: int
    source_tokens: int
    segments: int
    parts: dict[str, float]


class QuestionCosts:
    """The measurements, each of which gives a dict for ``details``.

    Args:
        config: the bench's settings.
        decoder, embedder, corpus: what is measured.
        memory: keeps the peak of each measurement.
        tell: is told what is done.
    """

    def __init__(
        self,
        config: BenchConfig,
        decoder: LocalDecoder,
        embedder: Encoder,
        corpus: Corpus,
        memory: PeakMemory,
        tell: Report,
    ) -> None:
        self.config, self.decoder, self.embedder, self.corpus = config, decoder, embedder, corpus
        self.memory, self.tell = memory, tell
        self.questions = [question.question for question in demo_questions()]
        self._vectors: dict[str, npt.NDArray[np.float32]] = {}

    # -- what a question costs ----------------------------------------------------------------------------------

    def _ask(
        self,
        question: str,
        prefix: Prefix | None = None,
        context: Sequence[int] | None = None,
        parts: dict[str, float] | None = None,
        new_tokens: int | None = None,
    ) -> _Cost:
        """Answer, and add up what was spent before (``parts``) and until the first token."""
        began = time.perf_counter()
        config = GenerateConfig(new_tokens or self.config.new_tokens, lookup=False)
        generation, text = self.decoder.stream(Prompt(question, prefix, context), config)
        started_s = time.perf_counter() - began
        for _ in text:
            pass
        parts = parts or {}
        steps = len(generation.token_ids) - 1
        return _Cost(
            ttft_s=sum(parts.values()) + started_s + generation.ttft_s,
            tokens_per_s=steps / generation.decode_s if steps and generation.decode_s else 0.0,
            prompt_tokens=generation.prompt_tokens,
            prompt_slots=0 if prefix is None else prefix.slots,
            source_tokens=0 if prefix is None else prefix.source_tokens,
            segments=0 if prefix is None else len(prefix.segments),
            parts=parts,
        )

    def _ask_retrieved(self, question: str) -> _Cost:
        began = time.perf_counter()
        vector = self.embedder.encode([question])[0]
        embedded = time.perf_counter()
        hits = self._search(self.corpus.retrieved, vector, question)
        found = time.perf_counter()
        prefix = self._place(self.corpus.retrieved, hits, [hit.score for hit in hits])
        loaded = time.perf_counter()
        parts = {"embed_s": embedded - began, "search_s": found - embedded, "open_s": loaded - found}
        return self._ask(question, prefix, parts=parts)

    def _search(self, store: Store, vector: npt.NDArray[np.float32], question: str) -> list[Hit]:
        return store.search(vector, top_k=self.config.top_k, question=question, lexical=RetrieveConfig.lexical)

    def _ask_whole(self, question: str, length: int, new_tokens: int | None = None) -> _Cost:
        vector = self._vector(question)  # the embedding is not counted, as with retrieved segments
        began = time.perf_counter()
        store, doc_id = self.corpus.whole, self.corpus.whole_id(length)
        hits = store.chunks(doc_id)
        listed = time.perf_counter()
        lexical, filters = RetrieveConfig.lexical, {"doc_id": doc_id}
        best = store.search(vector, top_k=len(hits), question=question, lexical=lexical, filters=filters)
        scores = {hit.segment_id: hit.score for hit in best}
        found = time.perf_counter()
        prefix = self._place(store, hits, [scores.get(hit.segment_id, 0.0) for hit in hits])
        opened = time.perf_counter()
        parts = {"list_s": listed - began, "search_s": found - listed, "open_s": opened - found}
        return self._ask(question, prefix, parts=parts, new_tokens=new_tokens)

    def _vector(self, question: str) -> npt.NDArray[np.float32]:
        if question not in self._vectors:
            self._vectors[question] = self.embedder.encode([question])[0]
        return self._vectors[question]

    def _place(self, store: Store, hits: Sequence[Hit], scores: Sequence[float] | None = None) -> Prefix:
        """Segments in parallel, of files that were read and checked before if the store still holds them."""
        segments = tuple(store.load_segment(hit.segment_id) for hit in hits)
        return place(segments, template_tokens=self.decoder.template_tokens, scores=scores)

    # -- measurements -------------------------------------------------------------------------------------------

    def retrieved(self) -> dict[str, Any]:
        """The top segments of a search, beside no context."""
        with self.memory.phase("retrieved"):
            pairs = self._pairs("retrieved segments", self._ask, self._ask_retrieved, self.config.repeats)
            cold = self._cold(self.corpus.retrieved, self._ask_retrieved)
        without = [replace(cost, ttft_s=cost.ttft_s - cost.parts["embed_s"]) for _, cost in pairs]
        made = self._compared([(plain, cost) for (plain, _), cost in zip(pairs, without, strict=True)])
        self._break_down(made, self.corpus.retrieved, [cost for _, cost in pairs])
        embed_s = made["seconds"].pop("embed_s")
        cold_pairs = [(a.ttft_s, b.ttft_s - b.parts["embed_s"]) for a, b in cold or ()]
        return made | {
            "headline": "from the search on, segments held in memory; the question's embedding is not counted",
            "ttft_over_no_context_with_embedding": median_ratio([(a.ttft_s, b.ttft_s) for a, b in pairs]),
            "embed_s": embed_s,
            "ttft_over_no_context_cold": median_ratio(cold_pairs) if cold_pairs else None,
            "store_source_tokens": self.corpus.retrieved.stats()["source_tokens"],
        }

    def whole(self) -> dict[str, Any]:
        """Every segment of a source, by its length, beside no context."""
        rows = {}
        for length in self.config.lengths:

            def ask(question: str, length: int = length) -> _Cost:
                return self._ask_whole(question, length)

            with self.memory.phase(f"whole_{length}"):
                pairs = self._pairs(f"whole source of {length:,} tokens", self._ask, ask, self.config.repeats)
                rows[str(length)] = self._compared(pairs)
                if length == self.config.lengths[-1]:
                    cold = self._cold(self.corpus.whole, ask)
                    cold_pairs = [(a.ttft_s, b.ttft_s) for a, b in cold or ()]
                    rows[str(length)]["ttft_over_no_context_cold"] = median_ratio(cold_pairs) if cold_pairs else None
            self._break_down(rows[str(length)], self.corpus.whole, [cost for _, cost in pairs], length)
        return rows

    def in_context(self) -> dict[str, Any]:
        """The same text in the prompt, by its length up to the window, beside the whole source as segments."""
        rows = {}
        asked = max(len(self.decoder.template.question_ids(question)) for question in self.questions)
        room = self.decoder.shape.window - self.decoder.template_tokens - asked - 1
        for length in (length for length in self.config.lengths if length <= self.decoder.shape.window):
            text = self.corpus.ids[: min(length, room)]

            def read(question: str, text: list[int] = text) -> _Cost:
                return self._ask(question, context=text, new_tokens=1)

            def ask(question: str, length: int = length) -> _Cost:
                return self._ask_whole(question, length, new_tokens=1)

            repeats = min(self.config.repeats, SLOW - 1)  # it differs by a factor of tens
            with self.memory.phase(f"in_context_{length}"):
                pairs = self._pairs(f"{length:,} tokens in context", ask, read, repeats, warm_up=False)
            rows[str(length)] = {
                "ttft_over_lloco": median_ratio([(a.ttft_s, b.ttft_s) for a, b in pairs]),
                "ttft_s": median(b.ttft_s for _, b in pairs),
                "lloco_ttft_s": median(a.ttft_s for a, _ in pairs),
                "prompt_tokens": round(median(b.prompt_tokens for _, b in pairs)),
                "text_tokens": len(text),
                "repeats": repeats,
            }
        return rows

    # -- how they are taken -------------------------------------------------------------------------------------

    def _pairs(
        self,
        what: str,
        one: Callable[[str], _Cost],
        other: Callable[[str], _Cost],
        repeats: int,
        *,
        warm_up: bool = True,
    ) -> list[tuple[_Cost, _Cost]]:
        """Both on the same question, one after the other, each time on another question.

        All are asked once before, so that the store holds the segments; `_cold` measures without it.
        """
        asked = [self.questions[number % len(self.questions)] for number in range(repeats)]
        if warm_up:
            one(asked[0])
            for question in dict.fromkeys(asked):
                other(question)
        pairs = []
        for number, question in enumerate(asked):
            self.tell(what, number, repeats)
            pairs.append((one(question), other(question)))
        return pairs

    def _cold(self, store: Store, ask: Callable[[str], _Cost]) -> list[tuple[_Cost, _Cost]] | None:
        """The same with the segment files out of memory, the system's too; None where the system cannot be asked."""
        pairs = []
        for number in range(min(self.config.repeats, SLOW)):
            store.forget_segments()
            if not forget_files(store.path / "segments"):
                return None
            question = self.questions[number % len(self.questions)]
            pairs.append((self._ask(question), ask(question)))
        return pairs

    def _compared(self, pairs: Sequence[tuple[_Cost, _Cost]]) -> dict[str, Any]:
        return {
            "ttft_over_no_context": median_ratio([(a.ttft_s, b.ttft_s) for a, b in pairs]),
            "decode_over_no_context": median_ratio([(a.tokens_per_s, b.tokens_per_s) for a, b in pairs]),
            "ttft_s": median(b.ttft_s for _, b in pairs),
            "no_context_ttft_s": median(a.ttft_s for a, _ in pairs),
            "tokens_per_s": median(b.tokens_per_s for _, b in pairs),
            "no_context_tokens_per_s": median(a.tokens_per_s for a, _ in pairs),
            "prompt_slots": round(median(b.prompt_slots for _, b in pairs)),
            "prompt_tokens": round(median(b.prompt_tokens for _, b in pairs)),
            "source_tokens": round(median(b.source_tokens for _, b in pairs)),
            "segments": round(median(b.segments for _, b in pairs)),
            "repeats": len(pairs),
        }

    def _break_down(
        self, made: dict[str, Any], store: Store, costs: Sequence[_Cost], length: int | None = None
    ) -> None:
        """Where the time to first token goes: medians of each part, the files' bytes and their placing timed apart."""
        runner = self.decoder.runner
        parts = {name: median(cost.parts[name] for cost in costs) for name in costs[0].parts}
        if length is None:
            hits = self._search(store, self.embedder.encode(self.questions[:1])[0], self.questions[0])
        else:
            hits = store.chunks(self.corpus.whole_id(length))
        files = [store.path / "segments" / hit.segment_id[:2] / f"{hit.segment_id}.safetensors" for hit in hits]

        @torch.inference_mode()  # as when an answer is made: else it would be laid out for gradients
        def place() -> None:
            memory = Memory.of([self._place(store, hits)], runner.device, runner.dtype, runner.rotate)
            assert memory is not None
            for layer in range(self.decoder.shape.layers):
                memory.layer(layer)

        repeats = min(self.config.repeats, SLOW)
        read_s = median(seconds(lambda: [file.read_bytes() for file in files]) for _ in range(repeats))
        placed_s = median(seconds(place) for _ in range(repeats))
        parts["read_s"] = min(read_s, placed_s)
        parts["place_s"] = max(0.0, placed_s - parts["open_s"] - parts["read_s"])
        spent = sum(parts.values()) - parts.get("embed_s", 0.0)
        parts["prefill_s"] = max(0.0, made["ttft_s"] - spent)
        made["seconds"] = parts
        made["bytes_read"] = sum(file.stat().st_size for file in files)
