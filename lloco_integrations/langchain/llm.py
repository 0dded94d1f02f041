"""The text completion model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.caches import BaseCache
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.globals import get_llm_cache
from langchain_core.language_models import BaseLLM
from langchain_core.language_models.base import LangSmithParams
from langchain_core.outputs import Generation, GenerationChunk, LLMResult

from lloco_engine import Answer, Engine
from lloco_integrations.langchain.model import PER_CALL, LLoCOModel, Read
from lloco_integrations.prompt_parser import Message
from lloco_integrations.session import usage_dict

__all__ = ["LLoCOLLM"]

_READ = "lloco_read"  # carries prompts that are read from the cache's check to the answers
_COUNTED = ("prompt_tokens", "completion_tokens", "total_tokens")


class LLoCOLLM(LLoCOModel, BaseLLM):
    """A LangChain language model that reads documents as slots; text in, text out.

    ::

        llm = LLoCOLLM(engine=engine)
        chain = {"context": retriever | format_docs, "question": RunnablePassthrough()} | prompt | llm

    A prompt's handles are taken out of it, and their segments are placed before it. What an answer cost and where it
    comes from is in its ``generation_info``, and the sum over a call in ``llm_output["token_usage"]``.
    """

    if TYPE_CHECKING:

        def __init__(self, *, engine: Engine, **settings: Any) -> None: ...

    @property
    def _llm_type(self) -> str:
        return "lloco"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self._ls_params("llm", stop, kwargs)

    # -- caches: prompts are read before they are asked, so that they key on segments and versions, not on handles --

    def generate(self, prompts: list[str], *args: Any, **kwargs: Any) -> LLMResult:
        """As in LangChain. With a cache, prompts are looked up, and shown to callbacks, with their handles resolved."""
        if not self._is_cached():
            return super().generate(prompts, *args, **kwargs)
        keys, reads = self._keys(prompts, kwargs)
        return super().generate(keys, *args, **{**kwargs, _READ: reads})

    async def agenerate(self, prompts: list[str], *args: Any, **kwargs: Any) -> LLMResult:
        """`generate` for asyncio."""
        if not self._is_cached():
            return await super().agenerate(prompts, *args, **kwargs)
        keys, reads = await asyncio.to_thread(self._keys, prompts, kwargs)
        return await super().agenerate(keys, *args, **{**kwargs, _READ: reads})

    def _is_cached(self) -> bool:
        return self.cache is not False and (isinstance(self.cache, BaseCache) or get_llm_cache() is not None)

    def _keys(self, prompts: Sequence[str], options: dict[str, Any]) -> tuple[list[str], dict[str, Read]]:
        """What a cache knows each prompt by, and each prompt read. LangChain leaves a call's options out of its key."""
        own = str(sorted((name, value) for name, value in options.items() if name in PER_CALL))
        reads: dict[str, Read] = {}
        keys = []
        for prompt in prompts:
            read = self._read_prompt(prompt)
            keys.append(f"{read.ask.question}\n({read.key(own)})")
            reads[keys[-1]] = read
        return keys, reads

    # -- answers ----------------------------------------------------------------------------------------------------

    def _read_prompt(self, prompt: str) -> Read:
        return self._read([Message("user", prompt)])

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        reads = kwargs.pop(_READ, {})
        made = []
        for prompt in prompts:
            reply = self._reply(reads.get(prompt) or self._read_prompt(prompt), stop, kwargs)
            text = "".join(self._pieces(reply, kwargs))
            made.append((text, reply.answer))
        return self._results(made)

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        reads = kwargs.pop(_READ, {})
        made = []
        for prompt in prompts:
            read = reads.get(prompt) or await asyncio.to_thread(self._read_prompt, prompt)
            reply = self._areply(read, stop, kwargs)
            text = "".join([piece async for piece in self._apieces(reply, kwargs)])
            made.append((text, reply.answer))
        return self._results(made)

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        """Handles are resolved, and segments placed, before this returns."""
        reply = self._reply(self._read_prompt(prompt), stop, kwargs)

        def chunks() -> Iterator[GenerationChunk]:
            for piece in self._pieces(reply, kwargs):
                chunk = GenerationChunk(text=piece)
                if run_manager:
                    run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
            yield GenerationChunk(text="", generation_info=self._info(reply.answer))

        return chunks()

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        reply = self._areply(await asyncio.to_thread(self._read_prompt, prompt), stop, kwargs)
        async for piece in self._apieces(reply, kwargs):
            chunk = GenerationChunk(text=piece)
            if run_manager:
                await run_manager.on_llm_new_token(piece, chunk=chunk)
            yield chunk
        yield GenerationChunk(text="", generation_info=self._info(reply.answer))

    def _info(self, answer: Answer) -> dict[str, Any]:
        thoughts = {"reasoning_content": answer.reasoning} if answer.reasoning else {}
        return {**self._about(answer), "token_usage": _usage(answer), **thoughts}

    def _results(self, made: Sequence[tuple[str, Answer]]) -> LLMResult:
        generations = [[Generation(text=text, generation_info=self._info(answer))] for text, answer in made]
        usage = {name: sum(_usage(answer)[name] for _, answer in made) for name in _COUNTED}
        return LLMResult(generations=generations, llm_output={"token_usage": usage, "model_name": self.model_name})


def _usage(answer: Answer) -> dict[str, int]:
    counted = usage_dict(answer)
    return {name: counted[name] for name in _COUNTED}
