"""The prompts of each method: what the decoder is given to read before a question.

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
from lloco_engine.eval.methods import Method
from lloco_engine.retrieve import best_windows
from lloco_engine.types import Hit

if TYPE_CHECKING:
    from lloco_engine.config import GenerateConfig
    from lloco_engine.eval.engines import GroupEngines

__all__ = ["Reader", "Reading"]


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
