"""The prompt's fixed text: what stands before the memory, and what stands around the question.

``template prefix`` is the system turn and the opening of the user turn. It is the same for every question, so its
keys and values are computed once and shared by all segments, which are made after it. So nothing in it may change from
day to day: a chat template that writes the date is told that it is not known, or the day on which a store was made.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import Any

from lloco_engine.errors import ConfigError, UnsupportedModel
from lloco_engine.reasoning import Markers, find_markers
from lloco_engine.tokenizing import After, Part, encode, encoder_of
from lloco_engine.types import Turn

__all__ = ["NAMES", "Template", "encode"]

_MARK = "\u2402Memory\u2403"  # stands for the user turn's content while the chat template is rendered
_THOUGHT = "\u2402Thought\u2403"
_REASONING = ("reasoning_content", "thinking", "reasoning")  # what chat templates call an answer's thoughts
_CLOCK = "strftime_now"  # what chat templates call the clock
_FORMAT = re.compile(_CLOCK + r"""\(\s*(?:format\s*=\s*)?(["'])(.*?)\1""")
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
        lead: the spaces at the end of ``before``, which tokenizers write with the word that follows: they come with
            the text after the template prefix, and are no part of it.
        markers: what the decoder writes around its thoughts; None where it is not known to think.
        day: what a chat template that asks for the time is told; None: that it is not known.
    """

    tokenizer: Any
    before: str
    joint: str
    after: str
    lead: str = ""
    markers: Markers | None = None
    day: datetime | None = None

    @classmethod
    def suited(cls, tokenizer: Any, config: Any, name: str | Template | None = None) -> Template:
        """A template by name; by default that of LLoCO's release for a published AutoCompressor, else ``"chat"``.

        Args:
            tokenizer: the decoder's.
            config: the decoder's configuration.
            name: of `NAMES`, or None; or a template of an equal tokenizer, which is taken as it is.

        Raises:
            ConfigError: there is no such template.
            UnsupportedModel: as `of`; or the tokenizer is of a decoder with a larger vocabulary.
        """
        if isinstance(name, Template):
            return replace(name, tokenizer=tokenizer)
        name = name or ("lloco" if getattr(config, "summary_length", None) else "chat")
        if name not in NAMES:
            raise ConfigError(f"template must be one of {', '.join(NAMES)}, not {name!r}")
        made = cls.of(tokenizer) if name == "chat" else cls(tokenizer, "", *_LLOCO[name], markers=_markers(tokenizer))
        made._check_ids(getattr(config, "vocab_size", None))
        return made

    @classmethod
    def of(cls, tokenizer: Any, day: datetime | None = None) -> Template:
        """The template of a tokenizer; a decoder without a chat template gets a plain question-and-answer form.

        Args:
            tokenizer: the decoder's.
            day: as above.

        Raises:
            UnsupportedModel: the chat template cannot be rendered, or does not keep the user's text in one piece.
        """
        markers = _markers(tokenizer)
        if not getattr(tokenizer, "chat_template", None):
            return cls(tokenizer, tokenizer.bos_token or "", _JOINT, "\nAnswer:", markers=markers)
        rendered = _render(tokenizer, [{"role": "user", "content": _MARK}], day=day)
        before, found, after = rendered.partition(_MARK)
        if not found or _MARK in after:
            raise UnsupportedModel("the chat template must render the user's text once, unchanged; this one does not")
        spaces = before[len(before.rstrip(" ")) :]
        if spaces and encoder_of(tokenizer).ends_in_control(before):  # the control token takes them in
            spaces = ""
        return cls(tokenizer, before, _JOINT, after, spaces, markers, day)

    @property
    def in_pieces(self) -> Template:
        """The same template as stores have it whose template prefix was encoded with the spaces at its end."""
        return replace(self, lead="")

    @property
    def has_clock(self) -> bool:
        """Whether the decoder's chat template asks for the time."""
        return self.before != "" and _CLOCK in str(getattr(self.tokenizer, "chat_template", None) or "")

    def on(self, day: datetime) -> Template:
        """The same template as stores have it that were made on this day, when chat templates were told the time."""
        return Template.of(self.tokenizer, day)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with any of the template's text or the ids it gives."""
        parts = "\x00".join((self.before, self.joint, self.after, str(self.prefix_ids)))
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    @property
    def prefix_ids(self) -> list[int]:
        """Token ids of the template prefix."""
        return list(self._prefix[0])

    @property
    def thinks(self) -> bool:
        """Whether answers begin inside the decoder's thoughts: the template opens them."""
        return self.markers is not None and self.markers.are_open(self.after)

    def text_ids(self, text: str) -> list[int]:
        """Token ids of untrusted text that stands where a memory does: right after the template prefix."""
        return encoder_of(self.tokenizer).ids(self.lead + text, self._prefix[1]) if text else []

    def question_ids(
        self,
        question: str,
        context: str | Sequence[int] | None = None,
        *,
        history: Sequence[Turn] = (),
        joint: str | None = None,
        memory: bool = False,
    ) -> list[int]:
        """Token ids of all that follows the template prefix and the memory, as the chat template itself gives them.

        Args:
            question: the user's question, untrusted.
            context: raw text, or its ids by `text_ids`, to stand before the question (the in-context baseline), or
                None.
            history: earlier turns, oldest first, untrusted; the memory and the context stand before the first.
            joint: trusted text between the context and the first user text, instead of the template's own.
            memory: whether a memory stands before all this, and its text goes on here.

        Raises:
            UnsupportedModel: the chat template cannot render a conversation in pieces.
        """
        ids: list[int] = []
        parts: list[Part] = []
        after = "text" if memory and self.before else self._prefix[1]
        if isinstance(context, str):
            parts.append((context, False))
        elif context:
            ids, after = list(context), "text"
        if not memory and not ids:
            parts.insert(0, (self.lead, True))
        parts.append((self.joint if joint is None else joint, True))
        texts = _alternating([*map(self._said, history), Turn("user", question)])
        for text, fixed in zip(texts, self._between(len(texts)), strict=True):
            parts += [(text, False), (fixed, True)]
        return ids + self._encode(parts, after)

    def _said(self, turn: Turn) -> Turn:
        """A turn without thoughts, which no decoder reads again."""
        if turn.role == "user" or self.markers is None:
            return turn
        return replace(turn, text=self.markers.without(turn.text))

    def _between(self, turns: int) -> list[str]:
        """What the chat template writes after each of ``turns`` turns, of which the first is the user's."""
        if turns == 1:
            return [self.after]
        if not getattr(self.tokenizer, "chat_template", None):
            return ["\nAnswer: " if turn % 2 == 0 else "\nQuestion: " for turn in range(turns - 1)] + [self.after]
        marks = [f"{_MARK}{turn}{_MARK}" for turn in range(turns)]
        messages = [{"role": "assistant" if turn % 2 else "user", "content": mark} for turn, mark in enumerate(marks)]
        rest = _render(self.tokenizer, messages, day=self.day)
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
        return self._encode([("\n\nRepeat the text above." + self.after, True)], "text")

    @cached_property
    def _prefix(self) -> tuple[tuple[int, ...], After]:
        """Ids of the template prefix, and what the text after it stands after."""
        text = self.before[: len(self.before) - len(self.lead)]
        after: After = "text"
        if encoder_of(self.tokenizer).ends_in_control(text):
            after = "control"
        return tuple(self._encode([(text, True)], "start")), after if text else "start"

    def _encode(self, parts: Sequence[Part], after: After) -> list[int]:
        return encoder_of(self.tokenizer).prompt_ids(parts, after)

    def _check_ids(self, vocabulary: int | None) -> None:
        """That no id which text or the template can give lies outside the decoder's vocabulary."""
        if vocabulary is None:
            return
        written = [*self.prefix_ids, *self.question_ids("?")]
        added = getattr(self.tokenizer, "added_tokens_decoder", None) or {}
        known: dict[str, int] = getattr(self.tokenizer, "get_vocab", dict)()
        highest = max([*written, *(number for number in known.values() if number not in added)], default=0)
        if highest >= vocabulary:
            raise UnsupportedModel(
                f"a tokenizer's ids must lie within the decoder's vocabulary of {vocabulary}, and this one gives "
                f"{highest}; use the tokenizer that the weights were trained with"
            )


def _render(
    tokenizer: Any, messages: Sequence[dict[str, str]], *, answered: bool = False, day: datetime | None = None
) -> str:
    """Messages as the tokenizer's chat template writes them, whatever today is, up to where an answer begins.

    Raises:
        UnsupportedModel: it cannot be rendered; says why.
    """
    try:
        source = str(tokenizer.get_chat_template())
        if _CLOCK in source:
            source = _clock(source, day) + source
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                chat_template=source,
                tokenize=False,
                add_generation_prompt=not answered,
                enable_thinking=False,
            )
        )
    except Exception as error:  # a chat template is a program that came with the checkpoint: it may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnsupportedModel(
            f"the decoder's chat template must render a conversation of user and assistant, and this one does not "
            f"({type(error).__name__}: {reason}); mend chat_template.jinja or tokenizer_config.json in the decoder's "
            "folder, name one of its templates 'default', or remove it for a plain question-and-answer form"
        ) from error


def _clock(source: str, day: datetime | None) -> str:
    """A macro in the place of the clock that chat templates ask, with what it says on a day, or that it is unknown."""
    told = "unknown"
    if day is not None:
        times = {form: day.strftime(form) for _, form in _FORMAT.findall(source)}
        told = f"{{{{ {json.dumps(times)}[format] }}}}"
    return f"{{% macro {_CLOCK}(format='') %}}{told}{{% endmacro %}}\n"


def _markers(tokenizer: Any) -> Markers | None:
    """What a decoder writes around its thoughts: as its chat template does, else by the names of its tokens."""
    named = [str(token.content) for token in (getattr(tokenizer, "added_tokens_decoder", None) or {}).values()]
    if not getattr(tokenizer, "chat_template", None):
        return find_markers(named)
    asked = [{"role": "user", "content": "?"}]
    source = str(tokenizer.chat_template)
    for name in _REASONING:
        said = {"role": "assistant", "content": _MARK, name: _THOUGHT}
        try:
            before = _render(tokenizer, asked, answered=True)
            turn = _render(tokenizer, [*asked, said], answered=True).removeprefix(before)
            plain = _render(tokenizer, [*asked, {"role": "assistant", "content": _MARK}], answered=True)
            opening = _render(tokenizer, asked).removeprefix(before)
        except UnsupportedModel:
            continue
        begin, thought, rest = turn.partition(_THOUGHT)
        end, answer, _ = rest.partition(_MARK)
        if not (thought and answer):
            continue
        if own := find_markers([begin, end]):
            return own
        head = plain.removeprefix(before).partition(_MARK)[0]
        begin, head = _after_common(begin, opening).strip(), _after_common(head, opening).strip()
        if begin and end.strip():
            return Markers(begin, end.strip(), "" if begin in head else head)
    return find_markers([*named, source])


def _after_common(text: str, other: str) -> str:
    """A text without what it has in common with the beginning of another."""
    pairs = enumerate(zip(text, other, strict=False))
    return text[next((n for n, (own, its) in pairs if own != its), min(len(text), len(other))) :]
