"""The one place where a request of the API becomes one of the engine."""

from __future__ import annotations

from typing import Any

from lloco_engine.engine import Engine
from lloco_engine.request import AskRequest
from lloco_engine.serve.errors import APIError
from lloco_engine.serve.filters import plain_filters
from lloco_engine.serve.schema import AssistantMessage, ChatRequest, CompareRequest, Message, QuestionRequest
from lloco_engine.types import Turn

__all__ = ["EMBEDDINGS", "MODEL", "adapters_of", "chat_request", "compare_request", "model_names"]

MODEL = "lloco"
EMBEDDINGS = "lloco-embeddings"
_OWN = ("filters", "whole_document", "adapter")  # of a request, besides its settings


def adapters_of(engine: Engine, tenant: str) -> list[str]:
    """The adapters that a tenant may name: no weights, then its groups'."""
    return ["none", *engine.adapters.registry.groups(tenant)]


def model_names(engine: Engine, tenant: str) -> list[str]:
    """The models that a tenant may name, in order."""
    return [MODEL, *(f"{MODEL}:{name}" for name in adapters_of(engine, tenant)), EMBEDDINGS]


def chat_request(engine: Engine, body: ChatRequest, tenant: str, question_chars: int) -> AskRequest:
    """What a chat asks: the last message is the question, what the system says is read after the documents, and the
    rest is the conversation.

    Args:
        engine: will answer.
        body: the request.
        tenant: whose documents.
        question_chars: of the longest question.

    Raises:
        APIError: there is no such model, or no question.
        ConfigError: a setting breaks its rule.
    """
    adapter = _adapter(engine, body, tenant)
    *before, last = body.messages
    if isinstance(last, AssistantMessage) or last.role != "user":
        message = f"the last message must be the user's question, and it is of the {last.role}; put the question last"
        raise APIError(400, message, "invalid_value", param="messages")
    question = _text(last)
    _check_length(question, question_chars, "messages")
    said = [(message.role, _text(message)) for message in before]
    system = [text.strip() for role, text in said if role in ("system", "developer") and text.strip()]
    turns = [Turn(role, text) for role, text in said if role in ("user", "assistant") and text.strip()]
    given = _settings(body) | {"tenant": tenant, "history": tuple(turns), "context": "\n\n".join(system)}
    given |= {"adapter": adapter, "max_new_tokens": _longest(body)}
    return AskRequest(question, engine.retrieval, engine.prefix).but(given)


def compare_request(engine: Engine, body: CompareRequest, tenant: str, question_chars: int) -> AskRequest:
    """What a comparison asks; arguments and errors are those of `chat_request`."""
    _check_length(body.question, question_chars, "question")
    return AskRequest(body.question, engine.retrieval, engine.prefix).but(_settings(body) | {"tenant": tenant})


def _settings(body: QuestionRequest) -> dict[str, Any]:
    """The engine's own fields that were given."""
    names = set(QuestionRequest.model_fields)
    given = {name: value for name, value in body if name in names and value is not None}
    if "filters" in given:
        given["filters"] = plain_filters(given["filters"])
    return given


def _adapter(engine: Engine, body: ChatRequest, tenant: str) -> str | None:
    """The adapter that model and setting name together; None leaves it to what is found."""
    name, _, wanted = body.model.partition(":")
    if name != MODEL or (wanted and wanted not in adapters_of(engine, tenant)) or (":" in body.model and not wanted):
        known = ", ".join(one for one in model_names(engine, tenant) if one != EMBEDDINGS)
        message = f"a model must be one of {known}, not {body.model!r:.80}"
        raise APIError(404, message, "model_not_found", param="model")
    if wanted and body.adapter not in (None, wanted):
        message = f"model {body.model!r} has the adapter {wanted!r}, and {body.adapter!r:.80} was given; leave it out"
        raise APIError(400, message, "invalid_value", param="adapter")
    return wanted or body.adapter


def _longest(body: ChatRequest) -> int | None:
    """The longest answer, however it is named."""
    named = {"max_tokens": body.max_tokens, "max_completion_tokens": body.max_completion_tokens}
    named["max_new_tokens"] = getattr(body, "max_new_tokens")  # noqa: B009, derived
    given = {name: value for name, value in named.items() if value is not None}
    if len(set(given.values())) > 1:
        said = " and ".join(f"{name}={value}" for name, value in given.items())
        raise APIError(
            400, f"the longest answer must be given once, not {said}", "invalid_value", param=next(iter(given))
        )
    return next(iter(given.values()), None)


def _text(message: Message | AssistantMessage) -> str:
    content = message.content
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content)


def _check_length(question: str, most: int, param: str) -> None:
    if len(question) > most:
        rule = f"a question must have at most {most:,} characters, and this one has {len(question):,}"
        raise APIError(400, f"{rule}; ingest long texts as documents", "invalid_value", param=param)
