"""The chat model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from lloco_engine import Answer, Engine
from lloco_integrations.langchain.messages import plain, text_of
from lloco_integrations.langchain.model import LLoCOModel, Read
from lloco_integrations.session import usage_dict

__all__ = ["ChatLLoCO"]

_READ = "lloco_read"  # carries a prompt that is read from the cache's check to the answer


class ChatLLoCO(LLoCOModel, BaseChatModel):
    """A LangChain chat model that reads documents as slots.

    ::

        llm = ChatLLoCO(engine=engine)
        chain = {"context": retriever | format_docs, "question": RunnablePassthrough()} | prompt | llm

    Handles that an LLoCO retriever or compressor put into the prompt are taken out of it, and their segments are placed
    before it. Handles are read in system messages, in the last human message (with those right before it), and in what
    tools returned after it. In earlier turns they are inert.

    What a decoder that thinks aloud thought is in ``additional_kwargs["reasoning_content"]``, and a reasoning block of
    ``content_blocks``; it is no part of the text, is not streamed, and is left out of earlier turns.

    ``usage_metadata`` counts what was read as text tokens and slots together; ``cache_read`` is the part of it that
    had been computed before: slots and template. ``response_metadata["lloco"]`` holds the sources, as character spans.
    """

    if TYPE_CHECKING:

        def __init__(self, *, engine: Engine, **settings: Any) -> None: ...

    @property
    def _llm_type(self) -> str:
        return "lloco-chat"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self._ls_params("chat", stop, kwargs)

    # -- caches: a prompt is read before they are asked, so that they key on segments and versions, not on handles --

    def _generate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        read = self._read(plain(messages))
        return super()._generate_with_cache(
            [HumanMessage(read.ask.question)], stop=stop, run_manager=run_manager, **{**kwargs, _READ: read}
        )

    async def _agenerate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        read = await asyncio.to_thread(self._read, plain(messages))
        return await super()._agenerate_with_cache(
            [HumanMessage(read.ask.question)], stop=stop, run_manager=run_manager, **{**kwargs, _READ: read}
        )

    # -- answers ----------------------------------------------------------------------------------------------------

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        reply = self._reply(kwargs.pop(_READ, None) or self._read(plain(messages)), stop, kwargs)
        text = "".join(self._pieces(reply, kwargs))
        return self._result(text, reply.answer)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        read = kwargs.pop(_READ, None) or await asyncio.to_thread(self._read, plain(messages))
        reply = self._areply(read, stop, kwargs)
        text = "".join([piece async for piece in self._apieces(reply, kwargs)])
        return self._result(text, reply.answer)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        """Handles are resolved, and segments placed, before this returns."""
        read: Read = kwargs.pop(_READ, None) or self._read(plain(messages))
        reply = self._reply(read, stop, kwargs)

        def chunks() -> Iterator[ChatGenerationChunk]:
            for piece in self._pieces(reply, kwargs):
                yield ChatGenerationChunk(message=AIMessageChunk(content=piece))
            yield self._last(reply.answer)

        return chunks()

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        read: Read = kwargs.pop(_READ, None) or await asyncio.to_thread(self._read, plain(messages))
        reply = self._areply(read, stop, kwargs)
        async for piece in self._apieces(reply, kwargs):
            yield ChatGenerationChunk(message=AIMessageChunk(content=piece))
        yield self._last(reply.answer)

    def _result(self, text: str, answer: Answer) -> ChatResult:
        message = AIMessage(
            content=text,
            additional_kwargs=_thoughts(answer),
            usage_metadata=_usage(answer),
            response_metadata=self._about(answer),
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _last(self, answer: Answer) -> ChatGenerationChunk:
        """The chunk after the last piece of text: the only one that says what the answer cost."""
        message = AIMessageChunk(
            content="",
            additional_kwargs=_thoughts(answer),
            usage_metadata=_usage(answer),
            response_metadata=self._about(answer),
            chunk_position="last",
        )
        return ChatGenerationChunk(message=message)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """What a prompt of these messages costs: text tokens, and the slots of the segments that its handles name."""
        return self.get_num_tokens("\n\n".join(map(text_of, messages)))


def _thoughts(answer: Answer) -> dict[str, Any]:
    """Where LangChain looks for what a model thought: `AIMessage.content_blocks` has it as a reasoning block."""
    return {"reasoning_content": answer.reasoning} if answer.reasoning else {}


def _usage(answer: Answer) -> UsageMetadata:
    counted, usage = usage_dict(answer), answer.usage
    return UsageMetadata(
        input_tokens=counted["prompt_tokens"],
        output_tokens=counted["completion_tokens"],
        total_tokens=counted["total_tokens"],
        input_token_details={"cache_read": usage.prompt_slots + usage.template_tokens},
    )
