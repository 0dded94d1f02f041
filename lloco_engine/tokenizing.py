"""Text to token ids: the one place where untrusted text meets a tokenizer.

A document, a question, an earlier turn or what a tool returned may hold what the tokenizer knows as one token: the end
of a turn, the opening of another, a thought. Only the prompt template may write those. So untrusted text is encoded by
the tokenizer's model alone, which knows nothing of added tokens, special or not; and where the model's own vocabulary
has such a piece, the text is cut in the middle of it.

A prompt is encoded as a whole, so that its ids are those of the rendered chat template: its text falls into runs
between the control tokens that the template writes, and a run may hold trusted and untrusted text.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from lloco_engine.unicode import require_unicode

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["After", "Part", "TextEncoder", "encode", "encoder_of"]

After = Literal["start", "control", "text"]  # what a text stands after: nothing, a control token, other text
Part = tuple[str, bool]  # a piece of a prompt, and whether it is trusted: whether it may write control tokens

_MASKS = "\u2426\u2425\u241b\u241a"  # none of them is a letter, so that each leaves a word beside it as it is
_VISIBLE = re.compile(r"\S+")
_WORD = re.compile(r"\S{1,64}\s*|\s+")  # measures a tokenizer that gives no offsets


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of untrusted text by itself: no added token, special or not, is among them."""
    return encoder_of(tokenizer).ids(text)


_KNOWN: WeakKeyDictionary[Any, tuple[int, TextEncoder]] = WeakKeyDictionary()
_LOCK = threading.Lock()


def encoder_of(tokenizer: Any) -> TextEncoder:
    """The encoder of a tokenizer, made once; anew when tokens were added to it since."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    with _LOCK:
        try:
            size, encoder = _KNOWN.get(tokenizer, (-1, None))
            if encoder is None or size != len(added):
                encoder = TextEncoder(tokenizer)
                _KNOWN[tokenizer] = len(added), encoder
        except TypeError:  # neither hashed nor referenced weakly
            return TextEncoder(tokenizer)
        return encoder


class TextEncoder:
    """Encodes text by one tokenizer. Safe for use from several threads: the tokenizer's own state is left alone.

    Args:
        tokenizer: of transformers; one that is not built on `tokenizers` is called as it is, under a lock.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._added: dict[int, Any] = dict(getattr(tokenizer, "added_tokens_decoder", None) or {})
        self._forbidden = frozenset(self._added) | frozenset(getattr(tokenizer, "all_special_ids", None) or ())
        unknown = getattr(tokenizer, "unk_token", None)
        self._unknown = None if unknown is None else (tokenizer.convert_tokens_to_ids(unknown), unknown)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._model: _Fast | _Other = _Other(tokenizer) if backend is None else _Fast(backend, self._added)

    def ids(self, text: str, after: After = "start") -> list[int]:
        """Token ids of untrusted text.

        The unknown token is among them where the vocabulary cannot write a character, and no other added token.

        Raises:
            ConfigError: the text is not Unicode.
        """
        return self._plain(text, after)[0] if text else []

    def starts(self, text: str) -> list[int]:
        """The character at which each token of an untrusted text starts, never decreasing."""
        ruler, highest = [], 0
        for start in self._plain(text, "start", measure=True)[1] if text else []:
            highest = max(highest, start)
            ruler.append(highest)
        return ruler

    def prompt_ids(self, parts: Iterable[Part], after: After = "start") -> list[int]:
        """Token ids of a prompt as the tokenizer gives them for its whole text, but for what is untrusted.

        Args:
            parts: its pieces in order.
            after: what the first of them stands after.
        """
        parts = [part for part in parts if part[0]]
        text, ids, place = "".join(piece for piece, _ in parts), [], 0
        require_unicode(text=text)
        for token, start, end in self._model.controls(parts):
            ids += self.ids(text[place:start], after)
            ids.append(token)
            place, after = end, "control"
        return ids + self.ids(text[place:], after)

    def ends_in_control(self, text: str) -> bool:
        """Whether the last thing that a trusted text writes is a control token."""
        found = self._model.controls([(text, True)])
        return bool(found) and found[-1][2] == len(text)

    def _plain(self, text: str, after: After, *, measure: bool = False) -> tuple[list[int], Sequence[int]]:
        """Ids and, where they are to be measured, starts of a text in which nothing is a control token."""
        require_unicode(text=text)
        ids, spans = self._model.plain(text, after, measure)
        if self._forbidden.isdisjoint(ids):
            return ids, [start for start, _ in spans] if measure else ()
        if not spans:
            spans = self._model.plain(text, after, True)[1]
        if len(spans) != len(ids):  # nothing says where it is: halves, until it is cut
            return self._in_pieces(text, after, [len(text) // 2], measure) if len(text) > 1 else ([], ())
        bad = [n for n, token in enumerate(ids) if self._is_forged(token, text[slice(*spans[n])])]
        cuts = {(start + end) // 2 for start, end in (spans[n] for n in bad) if end - start > 1}
        if cuts:
            return self._in_pieces(text, after, sorted(cuts), measure)
        made: list[tuple[int, int]] = []  # each is one character: no cut makes another token of it
        for number, (token, span) in enumerate(zip(ids, spans, strict=True)):
            other = self._model.spelled(text[slice(*span)]) if number in set(bad) else [token]
            if not self._forbidden.isdisjoint(other) and self._unknown is not None and number in set(bad):
                other = [self._unknown[0]]
            made += [(one, span[0]) for one in other]
        return [token for token, _ in made], [start for _, start in made] if measure else ()

    def _is_forged(self, token: int, text: str) -> bool:
        """Whether a token stands for a control token that is written out, and not for what the vocabulary lacks."""
        if token not in self._forbidden:
            return False
        return self._unknown is None or token != self._unknown[0] or text.strip() == self._unknown[1]

    def _in_pieces(
        self, text: str, after: After, cuts: Sequence[int], measure: bool
    ) -> tuple[list[int], Sequence[int]]:
        ids: list[int] = []
        starts: list[int] = []
        for begin, end in pairwise([0, *cuts, len(text)]):
            piece, own = self._plain(text[begin:end], after if begin == 0 else "text", measure=measure)
            ids += piece
            starts += [begin + start for start in own]
        return ids, starts


class _Fast:
    """A tokenizer of the library `tokenizers`, by copies that share its model: none of its state is touched."""

    def __init__(self, backend: Tokenizer, added: dict[int, Any]) -> None:
        self._plain: dict[After, Tokenizer] = {
            "start": _with_steps(backend, backend),
            "control": _with_steps(backend, _edited(backend, _after_control)),
            "text": _with_steps(backend, _edited(backend, _after_text)),
        }
        self._ids, self._finder = _finder(backend, added)
        used = "".join(token.content for token in added.values())
        self._mask = next((mask for mask in _MASKS if mask not in used), "\ufffd")
        self._backend = backend

    def plain(self, text: str, after: After, measure: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text without added tokens, and the characters that each stands for."""
        encoding = self._plain[after].encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets if measure else []

    def spelled(self, character: str) -> list[int]:
        """A character by tokens of its bytes; as it is where the vocabulary has none."""
        ids = [self._backend.token_to_id(f"<0x{byte:02X}>") for byte in character.encode()]
        written = [token for token in ids if token is not None]
        return written if len(written) == len(ids) else self.plain(character, "text", False)[0]

    def controls(self, parts: Sequence[Part]) -> list[tuple[int, int, int]]:
        """The control tokens that the trusted parts write: id, and the characters from and to.

        The tokenizer's own rules find them, in a text whose untrusted characters are masked. So those can neither
        write a control token, nor a part of one, nor break one that stands beside them.
        """
        masked = "".join(
            piece if trusted else _VISIBLE.sub(lambda found: self._mask * len(found[0]), piece)
            for piece, trusted in parts
        )
        encoding = self._finder.encode(masked, add_special_tokens=False)
        found = [
            (self._ids[token], start, end)
            for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if token in self._ids
        ]
        if any(masked[start:end].isspace() for _, start, end in found):  # a token of white space, which is not masked
            own = [trusted for piece, trusted in parts for _ in piece]
            found = [one for one in found if not masked[slice(*one[1:])].isspace() or all(own[slice(*one[1:])])]
        return found


class _Other:
    """Any other tokenizer, called as it is."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()

    def plain(self, text: str, after: After, measure: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text without special tokens, and about which characters each stands for."""
        if measure and getattr(self._tokenizer, "is_fast", False):
            encoded = self._call(text, return_offsets_mapping=True)
            return list(encoded["input_ids"]), list(encoded["offset_mapping"])
        ids = list(self._call(text)["input_ids"])
        return ids, self._spans(text, len(ids)) if measure else []

    def spelled(self, character: str) -> list[int]:
        """A character's own ids."""
        return self.plain(character, "text", False)[0]

    def controls(self, parts: Sequence[Part]) -> list[tuple[int, int, int]]:
        """As `_Fast.controls`: where trusted parts write an added token, the longest of those that begin there."""
        added = getattr(self._tokenizer, "added_tokens_encoder", None) or {}
        if not added:
            return []
        token = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))))
        found, place = [], 0
        for piece, trusted in parts:
            if trusted:
                found += [(added[one[0]], place + one.start(), place + one.end()) for one in token.finditer(piece)]
            place += len(piece)
        return found

    def _spans(self, text: str, count: int) -> list[tuple[int, int]]:
        """Words have the tokens that they have by themselves, each about as many of its characters."""
        words = list(_WORD.finditer(text))
        counts = [len(ids) for ids in self._call([word[0] for word in words])["input_ids"]]
        spans = [
            (word.start() + len(word[0]) * n // many, word.start() + len(word[0]) * (n + 1) // many)
            for word, many in zip(words, counts, strict=True)
            for n in range(many)
        ]
        return spans

    def _call(self, text: str | list[str], **more: Any) -> Any:
        with self._lock:
            return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False, **more)


def _with_steps(backend: Tokenizer, steps: Tokenizer) -> Tokenizer:
    """A tokenizer of the same model without added tokens, its steps before the model another's."""
    from tokenizers import Tokenizer

    made: Any = Tokenizer(backend.model)
    for name in ("normalizer", "pre_tokenizer"):
        if (step := getattr(steps, name)) is not None:
            setattr(made, name, step)
    if backend.post_processor is not None:  # says which characters a token stands for
        made.post_processor = backend.post_processor
    done: Tokenizer = made
    return done


def _edited(backend: Tokenizer, edit: Any) -> Tokenizer:
    """A tokenizer without a vocabulary, with a backend's steps before the model as ``edit`` leaves them."""
    from tokenizers import Tokenizer, models

    bare: Any = Tokenizer(models.BPE())
    for name in ("normalizer", "pre_tokenizer"):
        if (step := getattr(backend, name)) is not None:
            setattr(bare, name, step)
    form = json.loads(bare.to_str())
    for name in ("normalizer", "pre_tokenizer"):
        form[name] = _walk(form[name], edit)
    made: Tokenizer = Tokenizer.from_str(json.dumps(form))
    return made


def _walk(step: Any, edit: Any) -> Any:
    if not isinstance(step, dict):
        return step
    if step.get("type") == "Sequence":
        name = "normalizers" if "normalizers" in step else "pretokenizers"
        return step | {name: [one for inner in step[name] if (one := _walk(inner, edit)) is not None]}
    return edit(step)


def _after_control(step: dict[str, Any]) -> dict[str, Any] | None:
    """A step as it works on text that does not begin the whole: SentencePiece's space is put before the first alone."""
    return step | {"prepend_scheme": "never"} if step.get("prepend_scheme") == "first" else step


def _after_text(step: dict[str, Any]) -> dict[str, Any] | None:
    """A step as it works on text that goes on: nothing is put before it."""
    if step["type"] == "Prepend":
        return None
    if "prepend_scheme" in step:
        step = step | {"prepend_scheme": "never"}
    return step | {"add_prefix_space": False} if "add_prefix_space" in step else step


def _finder(backend: Tokenizer, added: dict[int, Any]) -> tuple[dict[int, int], Tokenizer]:
    """A tokenizer that finds added tokens as the backend does, and to which of the backend's ids its own belong."""
    from tokenizers import Tokenizer, models

    finder: Any = Tokenizer(models.WordLevel({"\0": 0}, unk_token="\0"))
    if backend.normalizer is not None:
        finder.normalizer = backend.normalizer
    finder.add_tokens([token for _, token in sorted(added.items()) if token.content])
    return {finder.token_to_id(token.content): number for number, token in added.items() if token.content}, finder
