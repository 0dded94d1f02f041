"""LangChain messages as the plain messages that a prompt is read from, and handles as content blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    SystemMessage,
    ToolMessage,
)

from lloco_engine import Turn, without_thoughts
from lloco_integrations.handle_syntax import SENTINEL, neutralise
from lloco_integrations.langchain.documents import HANDLE
from lloco_integrations.prompt_parser import Message

__all__ = ["handle_block", "plain", "text_of", "turns"]


def handle_block(document: Document) -> dict[str, Any]:
    """A content block that stands for a retrieved document, for those who build messages themselves.

    Args:
        document: from an LLoCO retriever or compressor, in either of its modes.

    Raises:
        ValueError: the document carries no handle.
    """
    handle = str(document.metadata.get(HANDLE, document.page_content))
    if not handle or SENTINEL.sub("", handle):
        raise ValueError(
            "a document must carry a handle to become a block, and this one holds text: retrieve it with an LLoCO "
            "retriever, or send its text as a text block"
        )
    return {"type": "non_standard", "value": {HANDLE: handle}}


def plain(messages: Sequence[BaseMessage]) -> list[Message]:
    """The texts of a conversation, in order. Messages without text are left out; human neighbours become one message.

    Raises:
        ValueError: a message holds an image or the like, or the last one is the model's own.
    """
    said: list[Message] = []
    for message in messages:
        role, text = _role(message), text_of(message)
        if role == "assistant":
            text = without_thoughts(text)
        if not text.strip():
            continue
        if role == "user" and said and said[-1].role == "user":
            said[-1] = Message("user", f"{said[-1].text}\n\n{text}")
        else:
            said.append(Message(role, text))
    if not said or said[-1].role == "assistant":
        last = f"it is the model's own {said[-1].text[:40]!r}" if said else "there is none"
        raise ValueError(f"the last message must be a text to answer, and {last}")
    return said


def turns(messages: Sequence[BaseMessage]) -> list[Turn]:
    """What users and models said, in order, as the engine has it; handles in it are of no use any more."""
    told = ((_role(message), text_of(message)) for message in messages)
    kinds: dict[str, Literal["user", "assistant"]] = {"user": "user", "assistant": "assistant"}
    return [Turn(kinds[role], neutralise(text)) for role, text in told if role in kinds and text.strip()]


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return {"ai": "assistant", "human": "user"}.get(message.role.lower(), message.role.lower())
    if isinstance(message, AIMessage):
        return "assistant"
    if isinstance(message, SystemMessage):
        return "system"
    return "tool" if isinstance(message, ToolMessage | FunctionMessage) else "user"


def text_of(message: BaseMessage) -> str:
    """The text of a message, with handles where its blocks name some.

    Raises:
        ValueError: it holds an image or the like.
    """
    if isinstance(message.content, str):
        return message.content
    return "\n".join(text for block in message.content if (text := _block(block, isinstance(message, AIMessage))))


def _block(block: Any, own: bool) -> str:
    if isinstance(block, str):
        return block
    kind, value = block.get("type"), block.get("value")
    if kind in ("text", "text-plain"):
        return str(block.get("text") or "")
    if kind == "non_standard" and isinstance(value, dict) and HANDLE in value:
        return str(value[HANDLE])
    if own:  # tool calls, reasoning: nothing that a decoder of text reads again
        return ""
    raise ValueError(f"a message must hold text or handles, and this one holds a block of type {kind!r}")
