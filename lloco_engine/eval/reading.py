"""What the decoder is given to read before a question, by each method that is compared.

==============================  =======================================================================================
none                            nothing
full                            the text of all chunks, as far as it fits the window: both ends are kept
text_slots                      the passages of a search window's size that search finds, as many tokens of text as
                                ``kv`` has slots
kv                              the segments of all chunks, of whichever kind the compressor makes
kv_guided                       the same, as an engine reads whole documents: what search thinks of each weighs in where
                                queries choose among them
kvzip, snapkv                   the same, the KV cache evicted by another's rule at the same ratio, nothing fitted
kv_retrieved, kvzip_retrieved,  the segments of the ``top_k`` chunks that search finds, as an engine reads them
snapkv_retrieved
text_retrieved                  the text of the same chunks, best first
text_slots_retrieved            the passages that search finds, as many tokens of text as ``kv_retrieved`` has slots
==============================  =======================================================================================

Every prompt with segments is `Engine.prepare`'s, so it is the one that `Engine.ask` answers; text is that of
`lloco_engine.baselines`, of what the same engine finds. Hints, where they are on, come from the windows that search
found, with text as with segments: methods that do not search have none. Text is read once, with the adapter that will
answer, and its whole KV cache is then placed like a segment: it costs one prefill, however many questions follow it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lloco_engine import baselines
from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.retrieve import best_windows
from lloco_engine.types import Hit

if TYPE_CHECKING:
    from lloco_engine.config import GenerateConfig
    from lloco_engine.eval.engines import GroupEngines

__all__ = ["METHODS", "Method", "Reader", "Reading"]


@dataclass(frozen=True)
class Method:
    """How a prompt is made.

    Args:
        name: as in the table above.
        memory: ``"none"``, ``"text"``, ``"slots"`` (as much text as a memory has slots) or a kind of compressor.
        retrieved: read the best chunks only.
        guided: read every chunk as an engine reads whole documents, where search weighs in.
    """

    name: str
    memory: str
    retrieved: bool = False
    guided: bool = False

    @property
    def by_ratio(self) -> bool:
        """Whether there is a row for each ratio."""
        return self.memory not in ("none", "text")

    @property
    def searches(self) -> bool:
        """Whether search has a say, whose windows then give hints."""
        return self.retrieved or self.guided or self.memory == "slots"

    @property
    def compresses(self) -> bool:
        """Whether segments are read."""
        return self.memory not in ("none", "text", "slots")


METHODS = {
    method.name: method
    for method in (
        Method("none", "none"),
        Method("full", "text"),
        Method("text_retrieved", "text", retrieved=True),
        Method("text_slots", "slots"),
        Method("text_slots_retrieved", "slots", retrieved=True),
        Method("kv_guided", "kv", guided=True),
        *(
            Method(kind + ("_retrieved" if retrieved else ""), kind, retrieved)
            for kind in ("kv", "kvzip", "snapkv")
            for retrieved in (False, True)
        ),
    )
}


@dataclass(frozen=True)
class Reading:
    """Questions of a group that read the same before they are asked.

    Args:
        numbers: of the questions, in the group.
        prompts: one each; they share one prefix object, or have none.
        text_tokens: how many of the prefix's slots are text that was prefilled.
        left_out: tokens of text that did not fit the window.
    """

    numbers: tuple[int, ...]
    prompts: tuple[Prompt, ...]
    text_tokens: int = 0
    left_out: int = 0


class Reader:
    """Makes the prompts of every method.

    Args:
        decoder: reads and answers.
        generate: how answers are generated.
    """

    def __init__(self, decoder: LocalDecoder, generate: GenerateConfig) -> None:
        self.decoder, self._generate = decoder, generate

    def readings(
        self,
        about: GroupEngines,
        method: Method,
        ratio: float | None,
        adapter: str | None,
        questions: Sequence[str],
        tails: Sequence[int],
    ) -> Iterator[Reading]:
        """What each question is read with.

        Args:
            about: the group.
            method, ratio, adapter: of the row.
            questions: as they are asked.
            tails: of each, the tokens that follow the prefix: it and the longest answer there may be.
        """
        if method.memory == "none":
            yield Reading(tuple(range(len(questions))), tuple(Prompt(question) for question in questions))
        elif method.compresses:
            yield from self._remembered(about, method, _given(ratio), adapter, questions)
        else:
            yield from self._texts(about, method, ratio, adapter, questions, tails)

    def _remembered(
        self, about: GroupEngines, method: Method, ratio: float, adapter: str | None, questions: Sequence[str]
    ) -> Iterator[Reading]:
        """As the engine would be asked, question by question; those in a row that read the same come together."""
        engine = about.memory(method.memory, ratio)
        options: dict[str, Any] = {"adapter": adapter or "none", "generate": self._generate}
        if method.guided:
            options["whole_document"] = about.doc_ids
        elif not method.retrieved:
            options["hits"] = about.chunks(engine)
        same: tuple[object, ...] = ()
        numbers: list[int] = []
        prompts: list[Prompt] = []
        for number, question in enumerate(questions):
            asked = engine.prepare(question, **options)
            prefix = asked.memory.prefix
            assert prefix is not None
            read = (prefix.offsets, prefix.start, prefix.prior, *(hit.segment_id for hit in asked.memory.hits))
            if numbers and read != same:
                yield Reading(tuple(numbers), tuple(prompts))
                numbers, prompts = [], []
            same = read
            numbers.append(number)
            prompts.append(replace(asked.prompt, prefix=prompts[0].prefix) if prompts else asked.prompt)
        yield Reading(tuple(numbers), tuple(prompts))

    def _texts(
        self,
        about: GroupEngines,
        method: Method,
        ratio: float | None,
        adapter: str | None,
        questions: Sequence[str],
        tails: Sequence[int],
    ) -> Iterator[Reading]:
        """Raw text; questions that read the same come together, and it is dropped in between."""
        decoder = self.decoder
        rooms = [max(2, decoder.shape.window - decoder.template_tokens - tail) for tail in tails]
        found: list[list[Hit]] = [[] for _ in questions]
        if method.memory == "slots":
            for number, question in enumerate(questions):
                scope = about.search.retrieve(question) if method.retrieved else about.chunks(about.search)
                budget = sum(math.ceil(hit.source_tokens / _given(ratio)) for hit in scope)
                rooms[number] = min(rooms[number], budget)
                found[number] = list(_enough(about.passages.retrieve(question, top_k=budget), budget))
        elif method.retrieved:
            found = [about.search.retrieve(question) for question in questions]
        alike: dict[tuple[str, ...], list[int]] = {}
        for number, hits in enumerate(found):
            alike.setdefault(tuple(hit.segment_id for hit in hits), []).append(number)
        for numbers in alike.values():
            room, hits = min(rooms[number] for number in numbers), found[numbers[0]]
            if method.searches:
                text = baselines.of_hits(decoder, hits, room)
            else:
                text = baselines.whole(decoder, about.group.chunks, room)
            prefix = baselines.read_once(decoder, text.ids, adapter)
            prompts = [Prompt(questions[n], prefix, draft=best_windows(found[n])) for n in numbers]
            left_out = 0 if method.memory == "slots" else text.left_out
            yield Reading(tuple(numbers), tuple(prompts), len(text.ids), left_out)


def _enough(hits: Sequence[Hit], tokens: int) -> Iterator[Hit]:
    """The first of some hits, whose texts have so many tokens together and some to spare."""
    left = 2 * tokens
    for hit in hits:
        if left > 0:
            yield hit
        left -= hit.source_tokens


def _given(ratio: float | None) -> float:
    assert ratio is not None, "a row of this method has a ratio"
    return ratio
