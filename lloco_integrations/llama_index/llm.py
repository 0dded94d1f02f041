"""A language model of LlamaIndex that reads segments in place of the chunks' text."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Self

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
    ThinkingBlock,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr, create_model
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import LLM
from llama_index.core.prompts import BasePromptTemplate

from lloco_engine import Answer, ConfigError, Engine, PrefixConfig, without_thoughts
from lloco_integrations.chunks import check_on_missing
from lloco_integrations.handles import Handles
from lloco_integrations.llama_index.frames import frames_of, question_frames, system_frames
from lloco_integrations.llama_index.prompt_helper import LLoCOPromptHelper, TokenCounter
from lloco_integrations.prompt_parser import Message, ParsedPrompt
from lloco_integrations.session import Session, usage_dict
from lloco_integrations.settings import ANSWER, ask_options, pydantic_fields

__all__ = ["LLoCOLLM"]

if TYPE_CHECKING:

    class _Model(LLM):
        max_tokens: int

        def __init__(self, **settings: Any) -> None: ...

else:
    _Model = create_model("_Model", __base__=LLM, **pydantic_fields(ANSWER))


class LLoCOLLM(_Model):
    """The engine's decoder as a chat model. Handles in a prompt are resolved before a call returns anything.

    LlamaIndex's default prompts are taken apart and only their question is asked, so an answer is the engine's own for
    the same hits; `lloco_integrations.prompt_parser` says what becomes of other prompts. Weights load on first use.
    Every response has its cost in ``raw["usage"]``: ``prompt_tokens`` counts text tokens and slots together.

    Args:
        engine: answers; shared by everything on one store.
        tenant: whose handles are resolved; see `for_scope`.
        adapter: as in `AskRequest`: a group or the name of a loaded LoRA adapter, ``"auto"`` or ``"none"``.
        context_window: tokens and slots that LlamaIndex packs into one prompt; None takes what the decoder's window
            leaves beside the template prefix and one segment.
        on_missing: what becomes of a retrieved segment that is damaged or gone: ``"raw"``, ``"compress"``, ``"error"``.
        handles: resolves them; by default what all classes on the engine share.
        prompts: your own question-answering prompts (with ``{context_str}`` and ``{query_str}``) to take apart as well.
        prefix: placement and budget of the segments; None takes the engine's own.
        settings: those of `GenerateConfig`, by their names but for ``max_tokens`` and ``min_tokens``, and those of
            `PrefixConfig` and `RetrieveConfig` that an answer has, of which None takes the engine's own; a call may set
            them too. With ``when_nothing="refuse"`` a prompt whose chunks do not seem to answer it gets "No document
            answers this.", without asking the decoder. Also fields of `LLM`, ``system_prompt`` for instance.

    What a decoder that thinks aloud thought is a `ThinkingBlock` of a chat's message, and
    ``additional_kwargs["reasoning_content"]`` of a completion.

    Raises:
        ConfigError: a setting is outside its rule.
    """

    tenant: str = Field(default="", description="Whose documents are read.")
    adapter: str = Field(default="auto", description="Which LoRA adapter answers.")
    prefix: PrefixConfig | None = Field(default=None, exclude=True, description="Placement and budget of segments.")
    context_window: int = Field(description="Tokens and slots of one prompt.")

    _engine: Engine = PrivateAttr()
    _session: Session = PrivateAttr()

    def __init__(
        self,
        engine: Engine,
        *,
        tenant: str = "",
        adapter: str = "auto",
        context_window: int | None = None,
        on_missing: str = "raw",
        handles: Handles | None = None,
        prompts: Iterable[BasePromptTemplate | str] = (),
        prefix: PrefixConfig | None = None,
        **settings: Any,
    ) -> None:
        room = engine.text_room
        if context_window is not None and not 0 < context_window <= room:
            raise ConfigError(f"context_window must be between 1 and {room} with this decoder, not {context_window}")
        own = {"tenant": tenant, "adapter": adapter, "prefix": prefix, "context_window": context_window or room}
        super().__init__(**settings, **own)
        self._engine = engine
        self._session = Session(
            engine,
            handles=handles,
            on_missing=check_on_missing(on_missing),
            frames=[*frames_of(prompts), *question_frames()],
            system=system_frames(),
        )
        self._settings({})  # checks them

    @classmethod
    def class_name(cls) -> str:
        return "lloco_llm"

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex asks a model about; loads no weights."""
        return LLMMetadata(
            context_window=self.context_window,
            num_output=self.max_tokens,
            is_chat_model=True,
            model_name=f"lloco/{self._engine.manifest.decoder}",
        )

    def for_scope(self, tenant: str) -> Self:
        """The same model for another tenant: it resolves that tenant's handles and no other's."""
        return self.model_copy(update={"tenant": tenant})

    @property
    def token_counter(self) -> TokenCounter:
        """Counts a prompt's tokens and the slots that its handles stand for; serves as LlamaIndex's ``tokenizer``."""
        return TokenCounter(self._engine, self._session.handles)

    def prompt_helper(self, chunk_overlap_ratio: float = 0.0, chunk_size_limit: int | None = None) -> LLoCOPromptHelper:
        """A prompt helper that packs prompts by the segments' true slots, and never drops or cuts one in silence.

        Set it as ``Settings.prompt_helper``, or give it to a response synthesizer.
        """
        return LLoCOPromptHelper(
            context_window=self.context_window,
            num_output=self.max_tokens,
            chunk_overlap_ratio=chunk_overlap_ratio,
            chunk_size_limit=chunk_size_limit,
            tokenizer=self.token_counter,
        )

    # -- calls ----------------------------------------------------------------------------------------------------

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        ask, settings = self._read(messages), self._settings(kwargs)
        return _chat_response(self._session.reply(ask, **settings).whole())

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        ask, settings = self._read(prompt), self._settings(kwargs)
        return _completion_response(self._session.reply(ask, **settings).whole())

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        reply = self._session.reply(self._read(messages), **self._settings(kwargs))

        def pieces() -> ChatResponseGen:
            text = ""
            with reply:
                for delta in reply:
                    text += delta
                    yield ChatResponse(message=_said(text), delta=delta)
                yield _chat_response(reply.answer, delta="")

        return pieces()

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        reply = self._session.reply(self._read(prompt), **self._settings(kwargs))

        def pieces() -> CompletionResponseGen:
            text = ""
            with reply:
                for delta in reply:
                    text += delta
                    yield CompletionResponse(text=text, delta=delta)
                yield _completion_response(reply.answer, delta="")

        return pieces()

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        settings = self._settings(kwargs)
        ask = await asyncio.to_thread(self._read, messages)
        return _chat_response(await self._session.areply(ask, **settings).whole())

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        settings = self._settings(kwargs)
        ask = await asyncio.to_thread(self._read, prompt)
        return _completion_response(await self._session.areply(ask, **settings).whole())

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        settings = self._settings(kwargs)
        ask = await asyncio.to_thread(self._read, messages)
        reply = self._session.areply(ask, **settings)

        async def pieces() -> ChatResponseAsyncGen:
            text = ""
            async with reply:
                async for delta in reply:
                    text += delta
                    yield ChatResponse(message=_said(text), delta=delta)
                yield _chat_response(reply.answer, delta="")

        return pieces()

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        settings = self._settings(kwargs)
        ask = await asyncio.to_thread(self._read, prompt)
        reply = self._session.areply(ask, **settings)

        async def pieces() -> CompletionResponseAsyncGen:
            text = ""
            async with reply:
                async for delta in reply:
                    text += delta
                    yield CompletionResponse(text=text, delta=delta)
                yield _completion_response(reply.answer, delta="")

        return pieces()

    def _read(self, prompt: str | Sequence[ChatMessage]) -> ParsedPrompt:
        messages = [Message("user", prompt)] if isinstance(prompt, str) else [_message(m) for m in prompt]
        return self._session.read(messages, self.tenant)

    def _settings(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the engine is asked with, a call's own first."""
        if unknown := sorted(set(kwargs) - set(ANSWER)):
            raise ConfigError(f"a call may set {', '.join(ANSWER)}, not {unknown[0]!r}")

        def wanted(name: str) -> Any:
            return kwargs[name] if kwargs.get(name) is not None else getattr(self, name)

        return {"adapter": self.adapter, "prefix": self.prefix, **ask_options(wanted, wanted("stop"))}


_ROLES = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.TOOL: "tool",
    MessageRole.FUNCTION: "tool",
}


def _message(message: ChatMessage) -> Message:
    others = sorted({block.block_type for block in message.blocks} - {"text", "tool_call", "thinking"})
    if others:
        raise ConfigError(f"a message must be text, and this one holds {others[0]!r}")
    role, text = _ROLES.get(message.role, "user"), message.content or ""
    return Message(role, without_thoughts(text) if role == "assistant" else text)


def _said(text: str) -> ChatMessage:
    return ChatMessage(role=MessageRole.ASSISTANT, content=text)


def _raw(answer: Answer) -> dict[str, Any]:
    return {
        "usage": usage_dict(answer),
        "finish_reason": answer.finish,
        "segments": [hit.segment_id for hit in answer.hits],
        "doc_ids": [hit.doc_id for hit in answer.hits],
        "hints": list(answer.hints),
        "warnings": list(answer.warnings),
    }


def _chat_response(answer: Answer, delta: str | None = None) -> ChatResponse:
    more, said = {"warnings": list(answer.warnings)}, _said(answer.text)
    if answer.reasoning:
        said.blocks.insert(0, ThinkingBlock(content=answer.reasoning))
    return ChatResponse(message=said, delta=delta, raw=_raw(answer), additional_kwargs=more)


def _completion_response(answer: Answer, delta: str | None = None) -> CompletionResponse:
    more: dict[str, Any] = {"warnings": list(answer.warnings)}
    if answer.reasoning:
        more["reasoning_content"] = answer.reasoning
    return CompletionResponse(text=answer.text, delta=delta, raw=_raw(answer), additional_kwargs=more)
