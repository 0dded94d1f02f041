"""A request to an answer: found, placed, and given to the decoder."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from lloco_engine.comparing import beside
from lloco_engine.context import Context, ContextBuilder, Found, Prepared
from lloco_engine.decoder.prompt import Generation, Prompt
from lloco_engine.engine.resources import Resources
from lloco_engine.relevance import NOTHING
from lloco_engine.request import AskRequest
from lloco_engine.retrieve import best_windows
from lloco_engine.streaming import AnswerStream
from lloco_engine.types import Answer, Usage
from lloco_engine.usage import usage_of

__all__ = ["Answering"]


class Answering:
    """Answers requests by what an engine works with.

    Args:
        resources: the store, its decoder and its adapters.
    """

    def __init__(self, resources: Resources) -> None:
        self.context = ContextBuilder(resources.store, resources.setup)
        self._resources = resources

    def stream(self, request: AskRequest) -> AnswerStream:
        """The answer while it is being made. All that can be refused is refused before this returns."""
        found = self._find(request)
        refuses = request.retrieve.when_nothing == "refuse" and not (request.context or request.verbatim)
        if refuses and (found.nothing or not found.hits):
            return _refusal(found)
        prepared = self._prepared(request, found)
        memory, adapter = prepared.memory, prepared.adapter
        decoder = self._resources.decoder
        began = time.perf_counter()
        generation, pieces = decoder.stream(prepared.prompt, prepared.generate, adapter)
        before = prepared.seconds + time.perf_counter() - began

        def finish() -> Answer:
            usage = usage_of(
                decoder,
                generation,
                prefix=memory.prefix,
                texts=(hit.text for hit in memory.hits),
                retrieve_s=prepared.retrieve_s,
                load_s=memory.load_s,
                before_s=before,
            )
            return _answer(generation, memory, usage=usage, adapter=adapter or "none")

        return AnswerStream(pieces, memory.hits, finish)

    def prepare(self, request: AskRequest) -> Prepared:
        """What `stream` would give to the decoder."""
        return self._prepared(request, self._find(request))

    def compare(self, request: AskRequest) -> dict[str, Answer]:
        """The answer beside those of the same decoder reading raw text."""
        ours = self.stream(request).whole()
        others = beside(self._resources, request, ours)
        return {"lloco": ours} | {name: start().whole() for name, start in others.items()}

    def _find(self, request: AskRequest) -> Found:
        if request.hits is None:
            _ = self._resources.setup.embedder.dim  # loads it: no cost of one question
        return self.context.find(request)

    def _prepared(self, request: AskRequest, found: Found) -> Prepared:
        decoder, adapters = self._resources.decoder, self._resources.adapters
        adapters.check(request.adapter, request.tenant)
        began = time.perf_counter()
        text = Prompt(
            request.question,
            context=request.context or None,
            history=tuple(request.history),
            verbatim=request.verbatim,
            tenant=request.tenant,
        )
        room = len(decoder.prompt_ids(text)) + request.generate.max_new_tokens
        memory = self.context.place(found, decoder, request.prefix, room)
        prompt = replace(text, prefix=memory.prefix, draft=best_windows(memory.hits))
        adapter = adapters.choose(request.adapter, memory.hits, request.tenant)
        spent = found.seconds + time.perf_counter() - began
        return Prepared(prompt, request.generate, adapter, memory, found.seconds, spent)


def _refusal(found: Found) -> AnswerStream:
    """An answer that says that there is none, without a decoder."""
    usage = Usage(retrieve_s=found.seconds, ttft_s=found.seconds)
    warnings = (*found.warnings, found.nothing) if found.nothing else found.warnings
    return AnswerStream(iter([NOTHING]), (), lambda: Answer(NOTHING, usage=usage, warnings=warnings))


def _answer(generation: Generation, memory: Context, **more: Any) -> Answer:
    return Answer(
        text=generation.text,
        hits=memory.hits,
        finish=generation.finish or "stop",
        warnings=(*memory.warnings, *generation.warnings),
        reasoning=generation.reasoning,
        token_ids=tuple(generation.token_ids),
        hints=generation.hints,
        **more,
    )
