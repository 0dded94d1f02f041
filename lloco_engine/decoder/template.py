"""The prompt's fixed text: what stands before the memory, and what stands around the question.

``template prefix`` is the system turn and the opening of the user turn. It is the same for every question, so its
keys and values are computed once and shared by all segments (DESIGN: "kept whole, computed once").
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lloco_engine.errors import ConfigError, UnsupportedModel
from lloco_engine.types import Turn

__all__ = ["NAMES", "Template", "encode"]

_LOCK = threading.Lock()  # split_special_tokens is a state of the tokenizer, which threads share
_MARK = "\u2402Memory\u2403"  # stands for the user turn's content while the chat template is rendered
_JOINT = "\n\nAnswer the question from the text above.\nQuestion: "
_SHORT = "Answer the question as concisely as you can, using a single phrase"
_LETTER = "Choose the best answer by writing its corresponding letter (either A, B, C, or D)."
# What LLoCO's release (Tan et al. 2024) writes between the summaries and the question, and after it, for each data set
# that it has an adapter for; the first one, written for HotpotQA, says nothing of the kind of text. Nothing stands
# before the summaries, and no token is special. A question of lloco-quality ends with its choices, a line each.
_LLOCO = {
    "lloco": (
        f"You were just given an article from above. I will now give you a question. {_SHORT} or sentence if possible."
        "\nQuestion: ",
        "\nAnswer:",
    ),
    "lloco-qasper": (
        f"You are just given an scientific article from above. I will now give you a question. {_SHORT} or sentence if "
        "possible. If the question cannot be answered based on the information in the article, write 'unanswerable'. "
        "If the question is a yes/no question, answer 'yes', 'no', or 'unanswerable'.\nQuestion: ",
        "\nAnswer:",
    ),
    "lloco-qmsum": (
        "You are given a meeting transcript from above. I will now give you a query containing a question or "
        "instruction. Answer the query in one or more sentences. \nQuery: ",
        "\nAnswer:",
    ),
    "lloco-nqa": (
        "You are given a story from above, which can be either a novel or a movie script, and a question. "
        f"{_SHORT} if possible.\nQuestion:",
        "\nAnswer:",
    ),
    "lloco-quality": (
        "You are provided a story from above. We will now give you a multiple-choice question with 4 possible answers "
        f"(marked by A, B, C, D). {_LETTER}\nExample question:\nWhere is the capital of France?\n\nChoices:\n"
        f"A. Berlin\nB. Paris\nC. London\nD. Tokyo\n{_LETTER}\n\nAnswer:\nB. Paris\n\nQuestion:\n",
        f"\n{_LETTER}\n\nAnswer:\n",
    ),
}
NAMES = ("chat", *_LLOCO)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of untrusted text: special tokens written in it stay plain text, so it cannot close its turn."""
    return _encode(tokenizer, text, plain=True)


def _encode(tokenizer: Any, text: str, *, plain: bool) -> list[int]:
    if not text:
        return []
    with _LOCK:
        return list(tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"])


def _alternating(turns: Sequence[Turn]) -> list[str]:
    """Texts of turns, the user's first and then in alternation, as chat templates demand; neighbours are joined."""
    texts: list[str] = [""]
    for turn in turns:
        if (len(texts) % 2 == 1) == (turn.role == "user"):
            texts[-1] = "\n\n".join(text for text in (texts[-1], turn.text) if text)
        else:
            texts.append(turn.text)
    return texts


@dataclass(frozen=True)
class Template:
    """The tokens around a memory and a question, taken from the decoder's own chat template.

    Args:
        tokenizer: the decoder's tokenizer.
        before: text of the template prefix.
        joint: text between the memory (or the raw context) and the question.
        after: text after the question, up to where the answer begins.
        whole: the fixed text has no special tokens and is tokenised in one piece with the question.
    """

    tokenizer: Any
    before: str
    joint: str
    after: str
    whole: bool = False

    @classmethod
    def suited(cls, tokenizer: Any, config: Any, name: str | None = None) -> Template:
        """A template by name; by default that of LLoCO's release for a published AutoCompressor, else ``"chat"``.

        Args:
            tokenizer: the decoder's.
            config: the decoder's configuration.
            name: of `NAMES`, or None.

        Raises:
            ConfigError: there is no such template.
            UnsupportedModel: as `of`.
        """
        name = name or ("lloco" if getattr(config, "summary_length", None) else "chat")
        if name not in NAMES:
            raise ConfigError(f"template must be one of {', '.join(NAMES)}, not {name!r}")
        return cls.of(tokenizer) if name == "chat" else cls(tokenizer, "", *_LLOCO[name], whole=True)

    @classmethod
    def of(cls, tokenizer: Any) -> Template:
        """The template of a tokenizer; a decoder without a chat template gets a plain question-and-answer form.

        Raises:
            UnsupportedModel: the chat template does not keep the user's text in one piece.
        """
        if not getattr(tokenizer, "chat_template", None):
            return cls(tokenizer, tokenizer.bos_token or "", _JOINT, "\nAnswer:")
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        before, found, after = rendered.partition(_MARK)
        if not found or _MARK in after:
            raise UnsupportedModel("the chat template must render the user's text once, unchanged; this one does not")
        return cls(tokenizer, before, _JOINT, after)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with any of the template's text or the ids it gives."""
        parts = "\x00".join((self.before, self.joint, self.after, str(self.prefix_ids)))
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    @property
    def prefix_ids(self) -> list[int]:
        """Token ids of the template prefix."""
        return self._fixed(self.before)

    def question_ids(
        self,
        question: str,
        context: str | Sequence[int] | None = None,
        *,
        history: Sequence[Turn] = (),
        joint: str | None = None,
    ) -> list[int]:
        """Token ids of all that follows the template prefix and the memory.

        Args:
            question: the user's question, untrusted.
            context: raw text, or its token ids, to stand before the question (the in-context baseline), or None.
            history: earlier turns, oldest first, untrusted; the memory and the context stand before the first.
            joint: trusted text between the context and the first user text, instead of the template's own.

        Raises:
            UnsupportedModel: the chat template cannot render a conversation in pieces.
        """
        if self.whole and context is None and not history and joint is None:
            return encode(self.tokenizer, self.joint + question + self.after)
        ids = [] if context is None else encode(self.tokenizer, context) if isinstance(context, str) else list(context)
        ids += self._fixed(self.joint if joint is None else joint)
        texts = _alternating([*history, Turn("user", question)])
        for text, fixed in zip(texts, self._between(len(texts)), strict=True):
            ids += encode(self.tokenizer, text) + self._fixed(fixed)
        return ids

    def _between(self, turns: int) -> list[str]:
        """What the chat template writes after each of ``turns`` turns, of which the first is the user's."""
        if turns == 1:
            return [self.after]
        if not getattr(self.tokenizer, "chat_template", None):
            return ["\nAnswer: " if turn % 2 == 0 else "\nQuestion: " for turn in range(turns - 1)] + [self.after]
        marks = [f"{_MARK}{turn}{_MARK}" for turn in range(turns)]
        messages = [{"role": "assistant" if turn % 2 else "user", "content": mark} for turn, mark in enumerate(marks)]
        rest = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        pieces = []
        for mark in marks:
            piece, found, rest = rest.partition(mark)
            if not found:
                break
            pieces.append(piece)
        if len(pieces) != turns or pieces[0] != self.before:
            raise UnsupportedModel("the chat template must render every turn once and in order; this one does not")
        return [*pieces[1:], rest]

    def repeat_ids(self) -> list[int]:
        """Token ids of the request to repeat the text above, which gives the reference queries of a compressor."""
        return self._fixed("\n\nRepeat the text above." + self.after)

    def _fixed(self, text: str) -> list[int]:
        return _encode(self.tokenizer, text, plain=False)
