"""What a question costs: with no context, with retrieved segments, with a whole source, and with its text in context.

The engine is asked, as a user asks it by default: with its adapter, its hints and its guesses ahead. Each is measured
beside another one on the same question, one after the other (A B A B), so that a machine that becomes slower or faster
meanwhile does not count. Decoding is timed over the same number of greedy tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from lloco_engine.baselines import in_context
from lloco_engine.config import GenerateConfig
from lloco_engine.demo import questions as demo_questions
from lloco_engine.eval.timing import forget_files, median_ratio, seconds
from lloco_engine.types import Answer, Document, Hit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lloco_engine.engine import Engine
    from lloco_engine.eval.machine import PeakMemory
    from lloco_engine.eval.progress import Report
    from lloco_engine.eval.settings import BenchConfig

__all__ = ["SLOW", "QuestionCosts"]

SLOW = 3  # repeats at most of what takes seconds and differs by far

_Ask = Callable[[str], Answer]
_Pairs = Sequence[tuple[Answer, Answer]]


class QuestionCosts:
    """The measurements, each of which gives a dict for ``details``.

    Args:
        config: the bench's settings.
        engine: holds the source as it is compressed by default, and answers by itself where nothing is read.
        whole: holds it compressed harder, to be read whole.
        source: its documents, by the length that it has with each.
        memory: keeps the peak of each measurement.
        tell: is told what is done.
    """

    def __init__(
        self,
        config: BenchConfig,
        engine: Engine,
        whole: Engine,
        source: Mapping[int, Document],
        memory: PeakMemory,
        tell: Report,
    ) -> None:
        self.config, self.source, self.memory, self.tell = config, source, memory, tell
        self._engine, self._whole = engine, whole
        self.questions = [question.question for question in demo_questions()]
        # no answer ends before the last token, so that all have the same number of them
        self.generate = GenerateConfig(config.new_tokens, min_new_tokens=config.new_tokens)

    def settings(self) -> dict[str, Any]:
        """How answers are made, as the engine makes them by default, and the adapter that answers."""
        return {
            "adapter": self._engine.prepare(self.questions[0], hits=()).adapter or "none",
            "generate": self.generate.to_json(),
            "prefix": self._engine.prefix.to_json(),
            "retrieve": self._engine.retrieval.to_json(),
        }

    # -- what a question costs ----------------------------------------------------------------------------------

    def _without(self, question: str) -> Answer:
        """With nothing to read."""
        return self._engine.ask(question, hits=(), generate=self.generate)

    def _retrieved(self, question: str) -> Answer:
        return self._engine.ask(question, generate=self.generate)

    def _ask_whole(self, question: str, length: int, generate: GenerateConfig | None = None) -> Answer:
        return self._whole.ask(question, whole_document=self._doc_ids(length), generate=generate or self.generate)

    def _doc_ids(self, length: int) -> list[str]:
        return [document.doc_id for there, document in self.source.items() if there <= length]

    # -- measurements -------------------------------------------------------------------------------------------

    def retrieved(self) -> dict[str, Any]:
        """The top segments of a search, beside no context."""
        with self.memory.phase("retrieved"):
            pairs = self._pairs("retrieved segments", self._without, self._retrieved, self.config.repeats)
            cold = self._cold(self._engine, self._retrieved)
        plainly = replace(self.generate, lookup=False)
        beside = self._pairs(
            "the same without guessing ahead",
            lambda question: self._engine.ask(question, hits=(), generate=plainly),
            lambda question: self._engine.ask(question, generate=plainly),
            min(self.config.repeats, SLOW),
            warm_up=False,
        )
        embed_s = median(seconds(partial(self._embed, text)) for text in self.questions[: self.config.repeats])
        made = self._compared(pairs) | {"seconds": _parts(answer for _, answer in pairs)}
        return made | {
            "headline": "from the search on, segments held in memory; the question's embedding is not counted",
            "ttft_over_no_context_with_embedding": median_ratio(
                [(plain.usage.ttft_s, answer.usage.ttft_s + embed_s) for plain, answer in pairs]
            ),
            "embed_s": embed_s,
            "decode_over_no_context_without_lookup": median_ratio(_speeds(beside)),
            "ttft_over_no_context_cold": median_ratio(_firsts(cold)) if cold else None,
            "bytes_read": _bytes_of(self._engine, pairs[-1][1].hits),
            "store_source_tokens": self._engine.stats()["source_tokens"],
        }

    def _embed(self, text: str) -> None:
        """Anew: an engine of the bench remembers the questions that it has embedded."""
        embedder = self._engine.embedder
        getattr(embedder, "encode_query", embedder.encode)([f"{text} "])

    def whole(self) -> dict[str, Any]:
        """Every segment of a source, by its length, beside no context."""
        rows = {}
        for length in self.config.lengths:

            def ask(question: str, length: int = length) -> Answer:
                return self._ask_whole(question, length)

            with self.memory.phase(f"whole_{length}"):
                pairs = self._pairs(f"whole source of {length:,} tokens", self._without, ask, self.config.repeats)
                row = self._compared(pairs) | {"seconds": _parts(answer for _, answer in pairs)}
                if length == self.config.lengths[-1]:
                    cold = self._cold(self._whole, ask)
                    row["ttft_over_no_context_cold"] = median_ratio(_firsts(cold)) if cold else None
            rows[str(length)] = row | {"bytes_read": _bytes_of(self._whole, pairs[-1][1].hits)}
        return rows

    def in_context(self, adapter: str) -> dict[str, Any]:
        """The same text in the prompt, by its length up to the window, beside the whole source as segments."""
        rows = {}
        first = GenerateConfig(1)
        decoder = self._engine.decoder
        for length in (length for length in self.config.lengths if length <= decoder.shape.window):
            texts = ["".join(document.text for there, document in self.source.items() if there <= length)]

            def read(question: str, texts: list[str] = texts) -> Answer:
                return in_context(decoder, texts, question, first, adapter=adapter)

            def ask(question: str, length: int = length) -> Answer:
                return self._ask_whole(question, length, first)

            repeats = min(self.config.repeats, SLOW - 1)  # it differs by a factor of tens
            with self.memory.phase(f"in_context_{length}"):
                pairs = self._pairs(f"{length:,} tokens in context", ask, read, repeats, warm_up=False)
            rows[str(length)] = {
                "ttft_over_lloco": median_ratio(_firsts(pairs)),
                "ttft_s": median(text.usage.ttft_s for _, text in pairs),
                "lloco_ttft_s": median(ours.usage.ttft_s for ours, _ in pairs),
                "prompt_tokens": round(median(text.usage.prompt_tokens for _, text in pairs)),
                "repeats": repeats,
            }
        return rows

    # -- how they are taken -------------------------------------------------------------------------------------

    def _pairs(self, what: str, one: _Ask, other: _Ask, repeats: int, *, warm_up: bool = True) -> _Pairs:
        """Both on the same question, one after the other, each time on another question.

        All are asked once before, so that the store holds the segments; `_cold` measures without it. Without
        ``warm_up`` the other is not: a text that is read for a minute has nothing to hold.
        """
        asked = [self.questions[number % len(self.questions)] for number in range(repeats)]
        one(asked[0])
        for question in dict.fromkeys(asked if warm_up else ()):
            other(question)
        pairs = []
        for number, question in enumerate(asked):
            self.tell(what, number, repeats)
            pairs.append((one(question), other(question)))
        return pairs

    def _cold(self, engine: Engine, ask: _Ask) -> _Pairs | None:
        """The same with the segment files out of memory, the system's too; None where the system cannot be asked."""
        pairs = []
        for number in range(min(self.config.repeats, SLOW)):
            engine.store.forget_segments()
            if not forget_files(engine.store.path / "segments"):
                return None
            question = self.questions[number % len(self.questions)]
            pairs.append((self._without(question), ask(question)))
        return pairs

    def _compared(self, pairs: _Pairs) -> dict[str, Any]:
        plain, ours = ([answer.usage for answer in side] for side in zip(*pairs, strict=True))
        return {
            "ttft_over_no_context": median_ratio(_firsts(pairs)),
            "decode_over_no_context": median_ratio(_speeds(pairs)),
            "ttft_s": median(usage.ttft_s for usage in ours),
            "no_context_ttft_s": median(usage.ttft_s for usage in plain),
            "tokens_per_s": median(usage.tokens_per_s for usage in ours),
            "no_context_tokens_per_s": median(usage.tokens_per_s for usage in plain),
            "prompt_slots": round(median(usage.prompt_slots for usage in ours)),
            "prompt_tokens": round(median(usage.prompt_tokens for usage in ours)),
            "source_tokens": round(median(usage.source_tokens for usage in ours)),
            "segments": round(median(len(answer.hits) for _, answer in pairs)),
            "repeats": len(pairs),
        }


def _firsts(pairs: _Pairs) -> list[tuple[float, float]]:
    return [(one.usage.ttft_s, other.usage.ttft_s) for one, other in pairs]


def _speeds(pairs: _Pairs) -> list[tuple[float, float]]:
    return [(one.usage.tokens_per_s, other.usage.tokens_per_s) for one, other in pairs]


def _parts(answers: Any) -> dict[str, float]:
    """Where the time to first token goes: medians of each part."""
    usages = [answer.usage for answer in answers]
    retrieve_s, load_s = (median(getattr(usage, name) for usage in usages) for name in ("retrieve_s", "load_s"))
    rest = median(usage.ttft_s - usage.retrieve_s - usage.load_s for usage in usages)
    return {"retrieve_s": retrieve_s, "load_s": load_s, "decoder_s": rest}


def _bytes_of(engine: Engine, hits: Sequence[Hit]) -> int:
    """Bytes of the segments' files."""
    folder = engine.store.path / "segments"
    return sum((folder / hit.segment_id[:2] / f"{hit.segment_id}.safetensors").stat().st_size for hit in hits)
