"""LangChain's own prompts for retrieved context, as frames that are taken apart, and a user's template as one."""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.prompts.chat import SystemMessagePromptTemplate

from lloco_integrations.prompt_parser import Frame

__all__ = ["SYSTEM", "USER", "frames_of"]

_CONTEXT = ("context", "summaries")
_QUESTION = ("question", "input", "query")

_STUFF = (
    "Use the following pieces of context to answer the question at the end. If you don't know the answer, just say "
    "that you don't know, don't try to make up an answer.\n\n{context}\n\nQuestion: {question}\nHelpful Answer:"
)
_STUFF_SYSTEM = (
    "Use the following pieces of context to answer the user's question.\nIf you don't know the answer, just say that "
    "you don't know, don't try to make up an answer.\n----------------\n{context}"
)
_TUTORIAL = (
    "You are an assistant for question-answering tasks. Use the following pieces of retrieved context to answer the "
    "question. If you don't know the answer, {dont_know} that you don't know. Use three sentences maximum and keep the "
    "answer concise."
)
_RAG_PROMPT = _TUTORIAL + "\nQuestion: {question} \nContext: {context} \nAnswer:"  # rlm/rag-prompt on the hub


def _user(template: str) -> Frame:
    return Frame(template, "context", "question")


def _system(template: str) -> Frame:
    return Frame(template, "context", "")


USER = (_user(_STUFF), _user(_RAG_PROMPT), _user("{context}\n\nQuestion: {question}\nAnswer:"))
SYSTEM = (
    _system(_STUFF_SYSTEM),
    _system(_TUTORIAL + "\n\n{context}"),
    _system(_TUTORIAL + " Context: {context}"),
)


def frames_of(prompt: PromptTemplate | ChatPromptTemplate | None) -> tuple[tuple[Frame, ...], tuple[Frame, ...]]:
    """Frames of a chain's own prompt: those of the user's messages, and those of the system's.

    Args:
        prompt: its texts are f-strings with a slot for the context (``context`` or ``summaries``) and one for the
            question (``question``, ``input`` or ``query``). None has no frames.

    Raises:
        ValueError: it has no text that wraps either, or is no f-string.
    """
    if prompt is None:
        return (), ()
    if isinstance(prompt, PromptTemplate):
        parts: Sequence[tuple[bool, str]] = [(False, _fstring(prompt))]
    else:
        parts = [
            (isinstance(message, SystemMessagePromptTemplate), _fstring(inner))
            for message in prompt.messages
            if isinstance(inner := getattr(message, "prompt", None), PromptTemplate)
        ]
    user, system = [], []
    for is_system, template in parts:
        context, question = (_slot(template, names) for names in (_CONTEXT, _QUESTION))
        if is_system and context:
            system.append(Frame(template, context, ""))
        elif not is_system and question and template.strip() != f"{{{question}}}":
            user.append(Frame(template, context, question))
    if not user and not system:
        raise ValueError(
            f"prompt must have a slot for the context ({', '.join(_CONTEXT)}) or wrap that of the question "
            f"({', '.join(_QUESTION)}), and it has {', '.join(prompt.input_variables) or 'none'}"
        )
    return tuple(user), tuple(system)


def _fstring(prompt: PromptTemplate) -> str:
    if prompt.template_format != "f-string":
        raise ValueError(f"prompt must be written as an f-string, not in {prompt.template_format}")
    return prompt.template


def _slot(template: str, names: Sequence[str]) -> str:
    return next((name for name in names if f"{{{name}}}" in template), "")
