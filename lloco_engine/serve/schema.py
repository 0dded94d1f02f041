"""What a chat request may hold: the API's fields that mean something here, and one for each setting of a question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field as Setting
from dataclasses import fields
from typing import Any, Literal, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from lloco_engine.request import SETTINGS
from lloco_engine.serve.errors import APIError

__all__ = ["STRICT", "AssistantMessage", "ChatRequest", "CompareRequest", "Message", "QuestionRequest", "Settings"]

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

# The API's fields that cannot be served: the values that ask for nothing, and what to do instead.
_NOT_SERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((), "answers are text"),
    "frequency_penalty": ((0,), "use repetition_penalty or no_repeat_ngram"),
    "function_call": (("none", "auto"), "the decoder calls no functions"),
    "functions": (([],), "the decoder calls no functions"),
    "logit_bias": (({},), "leave it out"),
    "logprobs": ((False,), "leave it out"),
    "metadata": (({},), "nothing is kept of a question; leave it out"),
    "modalities": ((["text"],), "answers are text"),
    "moderation": ((), "leave it out"),
    "n": ((1,), "ask several times, with another seed each"),
    "parallel_tool_calls": ((True, False), "the decoder calls no tools"),
    "prediction": ((), "guesses are made from the sources (lookup)"),
    "presence_penalty": ((0,), "use repetition_penalty or no_repeat_ngram"),
    "reasoning_effort": (("none",), "use reasoning_tokens"),
    "response_format": (({"type": "text"},), "answers are free text"),
    "service_tier": (("auto", "default"), "there is one tier"),
    "store": ((False,), "nothing is kept of a question"),
    "tool_choice": (("none", "auto"), "the decoder calls no tools"),
    "tools": (([],), "the decoder calls no tools; documents are searched for every question"),
    "top_logprobs": ((0,), "leave it out"),
    "verbosity": (("medium",), "use max_tokens"),
    "web_search_options": ((), "only the store is searched"),
}


# What one request may ask of the machine, which its limits in the engine do not say.
_MOST = {"beams": 8, "top_k": 256, "neighbours": 64}


class TextPart(BaseModel):
    """A part of a message. Other kinds than text are refused."""

    model_config = STRICT

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """What the user, the system or the developer said."""

    model_config = STRICT

    role: Literal["system", "developer", "user"]
    content: str | list[TextPart]
    name: str | None = Field(None, description="A label, which is not read.")


class AssistantMessage(BaseModel):
    """An earlier answer, as it came from here: what is beside its text is not read again."""

    model_config = STRICT

    role: Literal["assistant"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: None = None
    annotations: list[dict[str, Any]] | None = None
    reasoning_content: str | None = None
    audio: None = None
    function_call: None = None
    tool_calls: list[Any] | None = Field(None, max_length=0)


class StreamOptions(BaseModel):
    """What a stream tells besides."""

    model_config = STRICT

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="Events are not padded; only false is taken.")

    @model_validator(mode="after")
    def _no_padding(self) -> StreamOptions:
        if self.include_obfuscation:
            raise APIError(400, "events are not padded; leave include_obfuscation out", "unsupported_parameter")
        return self


def _hint(kind: Any) -> Any:
    """The type of a setting as JSON has it."""
    return list[str] | str if get_origin(kind) is tuple else kind


def _field(one: Setting[Any], kind: Any) -> tuple[Any, Any]:
    said = one.metadata
    most = _MOST.get(one.name, said.get("most"))
    bounds: dict[str, Any] = {"ge": said["least"], "le": most} if "least" in said else {}
    return _hint(kind) | None, Field(None, description=said["help"], **bounds)


_derived: dict[str, Any] = {
    one.name: _field(one, get_type_hints(kind)[one.name]) for kind in SETTINGS.values() for one in fields(kind)
}
Settings: Any = create_model("Settings", __config__=STRICT, **_derived)


class QuestionRequest(Settings):  # type: ignore[misc]
    """How a question is answered: every setting of `AskRequest`; what is left out is as the engine was opened."""

    model_config = STRICT

    filters: dict[str, Any] | None = Field(None, description="Which documents a search may find.")
    whole_document: str | list[str] | None = Field(
        None, description="Ids of documents to read whole, without a search."
    )
    adapter: str | None = Field(None, description="A group, 'auto' or 'none'.")


class ChatRequest(QuestionRequest):
    """A chat completion."""

    model: str
    messages: list[Message | AssistantMessage] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, description="Longest answer.")
    max_completion_tokens: int | None = Field(None, ge=1, description="Longest answer.")
    user: str | None = Field(None, description="A label, which is not read.")
    safety_identifier: str | None = Field(None, description="A label, which is not read.")
    prompt_cache_key: str | None = Field(None, description="A label, which is not read.")

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_served(cls, given: Any) -> Any:
        return _served(given) if isinstance(given, Mapping) else given


class CompareRequest(QuestionRequest):
    """One question, answered three ways."""

    question: str = Field(min_length=1)


def _served(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without those that ask for nothing.

    Raises:
        APIError: one asks for what is not served.
    """
    kept = dict(given)
    for name, (nothing, fix) in _NOT_SERVED.items():
        if name not in kept:
            continue
        value = kept.pop(name)
        if value is not None and not any(
            value == one and type(value) is type(one) for one in (*nothing, *_floats(nothing))
        ):
            raise APIError(
                400, f"{name} is not served, and {value!r:.80} was received; {fix}", "unsupported_parameter", param=name
            )
    return kept


def _floats(values: tuple[Any, ...]) -> list[float]:
    return [float(value) for value in values if type(value) is int]
