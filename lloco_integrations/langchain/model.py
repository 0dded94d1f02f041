"""What `ChatLLoCO` and `LLoCOLLM` have in common: settings, reading a prompt, and what an answer says of itself."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from langchain_core.language_models.base import LangSmithParams
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from pydantic import BaseModel, ConfigDict, Field, InstanceOf, PrivateAttr, SecretStr, create_model, model_validator

from lloco_engine import Answer, Engine, PrefixConfig
from lloco_integrations.handle_syntax import SENTINEL
from lloco_integrations.handles import Handles
from lloco_integrations.langchain.frames import SYSTEM, USER, frames_of
from lloco_integrations.prompt_parser import Frame, Message, ParsedPrompt
from lloco_integrations.session import AsyncReply, Reply, Session
from lloco_integrations.settings import ANSWER, ask_options, pydantic_fields

__all__ = ["PER_CALL", "LLoCOModel", "Read"]

PER_CALL = tuple(sorted({"adapter", "timeout", *ANSWER} - {"stop"}))
_PASSED_OVER = ("model", "stream", "stream_usage")  # read by LangChain, or checked apart


class Read:
    """A prompt whose handles are resolved. Its repr names the segments and their versions, for caches to key on."""

    def __init__(self, ask: ParsedPrompt) -> None:
        self.ask = ask

    def key(self, options: str = "") -> str:
        """32 hex digits that stand for all that shapes the answer to this prompt, so that none can be forged."""
        ask = self.ask
        told = (ask.question, ask.context, [(turn.role, turn.text) for turn in ask.history], ask.verbatim, ask.tenant)
        return hashlib.sha256(
            repr((told, self._segments(), ask.warnings, options)).encode("utf-8", "replace")
        ).hexdigest()[:32]

    def _segments(self) -> list[tuple[str, int]]:
        return [(hit.segment_id, hit.version) for hit in self.ask.hits]

    def __repr__(self) -> str:
        return f"Read({self.key()}, segments={self._segments()})"


if TYPE_CHECKING:

    class _Settings(BaseModel):
        temperature: float
        max_tokens: int

else:
    _Settings = create_model("_Settings", **pydantic_fields(ANSWER))


class LLoCOModel(_Settings):
    """Settings of a language model on an engine.

    Args:
        engine: answers; its weights are loaded by the first question.
        tenant: whose handles are read, and no other's; bind it with `for_scope`.
        handles: resolves handles; by default what all classes on the engine share.
        on_missing: what becomes of a segment that was damaged, replaced or deleted since it was retrieved: ``"raw"``
            reads the retrieved text, ``"compress"`` makes a damaged one again, ``"error"`` refuses.
        prompt: the chain's own prompt template. Its question is then asked in the engine's template, which segments
            and adapters were made with; prompts of LangChain's documentation are known without. Any other prompt is
            kept word for word.
        prefix: placement and budget of the segments; None takes the engine's own.
        adapter: as in `AskRequest`: a LoRA adapter's name, ``"auto"`` or ``"none"``.
        stop: texts that end the answer; they are left out of it.
        timeout: seconds after which an answer is given up; `TimeoutError`.
        max_retries: how often to try again where another process holds the store.
        api_key: taken, and needed by nobody: the model runs here.
        streaming: whether ``invoke`` sends pieces to callbacks too.
        settings: those of `GenerateConfig`, by their names but for ``max_tokens`` and ``min_tokens``; and those of
            `PrefixConfig` and `RetrieveConfig` that an answer has, of which None takes the engine's own. With
            ``when_nothing="refuse"`` a prompt whose documents do not seem to answer it gets "No document answers
            this.", without asking the decoder.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    engine: Engine = Field(exclude=True, repr=False)
    tenant: str = ""
    handles: Handles | None = Field(default=None, exclude=True, repr=False)
    on_missing: Literal["raw", "compress", "error"] = "raw"
    prompt: InstanceOf[PromptTemplate] | InstanceOf[ChatPromptTemplate] | None = Field(
        default=None, exclude=True, repr=False
    )
    prefix: PrefixConfig | None = Field(default=None, exclude=True, repr=False)
    adapter: str = "auto"
    stop: list[str] | None = None
    timeout: float | None = None
    max_retries: int = 2
    api_key: SecretStr | None = Field(default=None, exclude=True, repr=False)
    streaming: bool = False

    _frames: tuple[tuple[Frame, ...], tuple[Frame, ...]] = PrivateAttr(default=((), ()))

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        self._settings(None, {})
        self._frames = frames_of(self.prompt)
        return self

    def for_scope(self, tenant: str) -> Self:
        """The same model for another tenant: it reads that tenant's handles, and no other's."""
        return self.model_copy(update={"tenant": tenant})

    @property
    def model_name(self) -> str:
        """The decoder's name, as its store says; nothing is loaded."""
        return self.engine.manifest.decoder

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """All that shapes an answer besides the prompt: caches key on it."""
        manifest = self.engine.manifest
        return {
            "model": self.model_name,
            "decoder_fingerprint": manifest.decoder_fingerprint,
            "store": str(self.engine.store.path),
            "tenant": self.tenant,
            "prefix": (self.prefix or self.engine.prefix).to_json(),
            "on_missing": self.on_missing,
            "retrieve": self.engine.retrieval.to_json(),
            **{name: getattr(self, name) for name in PER_CALL if name != "timeout"},
            "stops": self.stop,
        }

    # -- a prompt ---------------------------------------------------------------------------------------------------

    def _session(self) -> Session:
        user, system = self._frames
        return Session(
            self.engine,
            handles=self.handles,
            on_missing=self.on_missing,
            frames=(*user, *USER),
            system=(*system, *SYSTEM),
            retries=self.max_retries,
        )

    def _read(self, messages: Sequence[Message]) -> Read:
        return Read(self._session().read(messages, self.tenant))

    def _settings(self, stop: list[str] | None, options: dict[str, Any]) -> dict[str, Any]:
        """What the engine is asked with, a call's own options first.

        Raises:
            ConfigError: a value breaks its rule.
        """

        def wanted(name: str) -> Any:
            return options[name] if name in options else getattr(self, name)

        own = self.stop or () if stop is None else stop
        return {"adapter": wanted("adapter"), "prefix": self.prefix, **ask_options(wanted, own)}

    def _check_options(self, options: dict[str, Any]) -> None:
        if unknown := sorted(set(options) - {*PER_CALL, *_PASSED_OVER}):
            raise ValueError(f"a call takes {', '.join(PER_CALL)} and stop, not {unknown[0]!r}")
        if options.get("model", self.model_name) != self.model_name:
            raise ValueError(
                f"the decoder is the one that the store was made with, {self.model_name!r}, not {options['model']!r}; "
                "choose an adapter with adapter=, or open another store"
            )

    # -- an answer --------------------------------------------------------------------------------------------------

    def _reply(self, read: Read, stop: list[str] | None, options: dict[str, Any]) -> Reply:
        self._check_options(options)
        return self._session().reply(read.ask, **self._settings(stop, options))

    def _areply(self, read: Read, stop: list[str] | None, options: dict[str, Any]) -> AsyncReply:
        self._check_options(options)
        return self._session().areply(read.ask, **self._settings(stop, options))

    def _pieces(self, reply: Reply, options: dict[str, Any]) -> Iterator[str]:
        """The text of a reply until its time is up; the reply is closed either way."""
        limit = options.get("timeout", self.timeout)
        began = time.monotonic()
        with reply:
            for piece in reply:
                if limit is not None and time.monotonic() - began > limit:
                    raise _late(limit)
                yield piece

    async def _apieces(self, reply: AsyncReply, options: dict[str, Any]) -> AsyncIterator[str]:
        limit = options.get("timeout", self.timeout)
        began = time.monotonic()
        async with reply:
            pieces = aiter(reply)
            while True:
                left = None if limit is None else max(0.0, began + limit - time.monotonic())
                try:
                    piece = await asyncio.wait_for(anext(pieces), left)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    raise _late(limit) from None
                yield piece

    def _about(self, answer: Answer) -> dict[str, Any]:
        """What an answer's metadata says: how it ended, what it cost and where it comes from, without any text."""
        usage = answer.usage
        return {
            "model_name": self.model_name,
            "finish_reason": answer.finish,
            "lloco": {
                "prompt_slots": usage.prompt_slots,
                "source_tokens": usage.source_tokens,
                "seconds": {"load": usage.load_s, "first_token": usage.ttft_s, "decode": usage.decode_s},
                "sources": [
                    {
                        "doc_id": hit.doc_id,
                        "span": [hit.span.start, hit.span.end],
                        "windows": [[window.start, window.end] for window in hit.windows],
                        "segment": hit.segment_id,
                        "version": hit.version,
                        "score": hit.score,
                        "title": hit.title,
                        "source": hit.source,
                        "also_in": list(hit.also_in),
                        "page_label": hit.page.name if hit.page is not None else None,
                    }
                    for hit in answer.hits
                ],
                "hints": list(answer.hints),
                "warnings": list(answer.warnings),
            },
        }

    # -- counting and tracing ---------------------------------------------------------------------------------------

    def get_token_ids(self, text: str) -> list[int]:
        """The decoder's token ids of a text; each handle counts as many as its segment has slots (ids of -1).

        So LangChain's limits and trimmers count what a prompt really costs, and nothing is fetched from a hub.
        """
        counter: Callable[[str], list[int]] | None = getattr(self, "custom_get_token_ids", None)
        if counter is not None:
            return counter(text)
        handles = self.handles or Handles.of(self.engine)
        return [*self.engine.token_ids(SENTINEL.sub("", text)), *[-1] * handles.slots(text)]

    def _ls_params(
        self, kind: Literal["chat", "llm"], stop: list[str] | None, options: dict[str, Any]
    ) -> LangSmithParams:
        params = LangSmithParams(
            ls_provider="lloco",
            ls_model_name=str(options.get("model", self.model_name)),
            ls_model_type=kind,
            ls_temperature=options.get("temperature", self.temperature),
            ls_max_tokens=options.get("max_tokens", self.max_tokens),
        )
        if stops := self.stop if stop is None else stop:
            params["ls_stop"] = list(stops)
        return params


def _late(limit: float | None) -> TimeoutError:
    return TimeoutError(f"an answer must be complete in {limit} seconds (timeout), and this one is not")
