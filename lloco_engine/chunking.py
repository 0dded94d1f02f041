"""Document -> Chunks, one per segment, with their search windows.

The document is tokenised once for a ruler (where in the text each token starts); chunks and windows are measured
with it and cut where people pause: at a blank line, else after a sentence, else after a line, else between words.
Where a script puts no space between words, a cut may be made between any two characters; never within one
(`graphemes`).
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import regex

from lloco_engine.config import ChunkConfig
from lloco_engine.documents import check_text
from lloco_engine.errors import DocumentError
from lloco_engine.graphemes import grapheme_end, grapheme_start
from lloco_engine.tokenizing import encode, encoder_of
from lloco_engine.types import Chunk, Document, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Chunker"]

_PARAGRAPH = re.compile(r"(?:\r?\n[ \t]*){2,}")
_SENTENCE = regex.compile(  # SB=STerm: the sentence ends of all scripts, many of which need no space behind them
    r"""[.!?…]+["'”’)\]]*\s+|[\p{SB=STerm}--[!?]]+[\p{Pe}\p{Pf}"']*\s*|[ฯ๚๛]+\s+""", regex.V1
)
_LINE = re.compile(r"\n+")
_WORD = re.compile(r"\s+|[，、；：]")
_SPACE = re.compile(r"\s+")
_BREAKS: tuple[Any, ...] = (_PARAGRAPH, _SENTENCE, _LINE, _WORD)  # best first; a cut is made after the match
_BLOCK = 256 * 1024  # characters that are measured at once
_SPREAD = 0.25  # a chunk may be this share shorter or longer than an even division, to end at a better place


class Chunker:
    """Cuts documents for one decoder.

    Args:
        tokenizer: the decoder's; a fast one gives its own character offsets, another is measured word by word.
        config: sizes in tokens.
        text_ids: token ids of a chunk's text where a segment stands (`Template.text_ids`); by default of the text by
            itself.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: ChunkConfig | None = None,
        text_ids: Callable[[str], list[int]] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config or ChunkConfig()
        self.text_ids = text_ids or partial(encode, tokenizer)

    def split(self, document: Document) -> list[Chunk]:
        """The document's chunks, in order; none for an empty text.

        Their spans tile the text; ``token_ids`` are at most ``segment_tokens`` long and are the tokens of the chunk's
        text, without added tokens (one written in the text is plain text); their windows cover them.

        Raises:
            DocumentError: one character alone has more than ``segment_tokens`` tokens, or it is no text.
        """
        text = document.text
        check_text("text", text)  # tokenizers complain in their own ways
        starts = self._ruler(text)
        numbers: dict[int, int] = {}  # one object for each id, however often it comes
        chunks: list[Chunk] = []
        begin = 0
        while begin < len(text):
            end, token_ids = self._next_chunk(text, starts, begin, document.doc_id)
            span = Span(begin, end)
            windows = tuple(self._windows(text, starts, span))
            chunks.append(
                Chunk(
                    document.doc_id,
                    len(chunks),
                    span,
                    text[begin:end],
                    tuple(numbers.setdefault(n, n) for n in token_ids),
                    windows,
                )
            )
            begin = end
        return chunks

    def _ruler(self, text: str) -> Sequence[int]:
        """The character at which each token of ``text`` starts, never decreasing.

        A long text is measured block by block: a tokenizer's own record of a text takes a hundred times its size.
        """
        encoder = encoder_of(self.tokenizer)
        if len(text) <= _BLOCK:
            return encoder.starts(text)
        ruler = array("I")
        begin = 0
        while begin < len(text):
            end = len(text)
            if end - begin > _BLOCK:
                end = _best_cut(text, begin, begin + _BLOCK - _BLOCK // 8, begin + _BLOCK, begin + _BLOCK)
            ruler.extend(begin + start for start in encoder.starts(text[begin:end]))
            begin = end
        return ruler

    def _next_chunk(self, text: str, starts: Sequence[int], begin: int, doc_id: str) -> tuple[int, list[int]]:
        """The end of the chunk that starts at ``begin``, and its token ids."""
        most = limit = self.config.segment_tokens
        end = _chunk_end(text, starts, begin, most)
        while len(token_ids := self.text_ids(text[begin:end])) > limit:
            # A text by itself can have more tokens than it has inside the document: measure shorter, else halve.
            if end - begin == 1:
                raise DocumentError(
                    f"a chunk holds at most {limit} tokens, and character {begin} of {doc_id!r} alone has "
                    f"{len(token_ids)}; raise segment_tokens"
                )
            most = max(1, min(most - 1, most * limit // len(token_ids)))
            shorter = _chunk_end(text, starts, begin, most)
            end = shorter if shorter < end else _whole(text, begin, begin + (end - begin) // 2, end - 1)
        return end, token_ids

    def _windows(self, text: str, starts: Sequence[int], span: Span) -> list[Span]:
        """Search windows of about ``window_tokens`` that overlap and cover ``span``."""
        size, overlap = self.config.window_tokens, self.config.window_overlap
        first, last = bisect_left(starts, span.start), bisect_left(starts, span.end)
        if last - first <= size:
            return [span]
        count = -(-(last - first - overlap) // (size - overlap))
        step = (last - first - overlap) / count
        slack = max(overlap // 2, 4)  # tokens that a window may grow by at either end, to start and stop at a word
        windows: list[Span] = []
        for number in range(count):
            low, high = first + round(number * step), first + round((number + 1) * step) + overlap
            start = _word_before(text, _place(starts, low), max(span.start, _place(starts, low - slack)))
            end = _word_after(text, _place(starts, high), min(span.end, _place(starts, high + slack, len(text))))
            start = grapheme_start(text, start, span.start)
            end = min(grapheme_end(text, end, span.start), span.end)
            window = Span(span.start if number == 0 else start, span.end if number == count - 1 else end)
            if window.start < window.end and (not windows or window != windows[-1]):
                windows.append(window)
        return windows


def _place(starts: Sequence[int], token: int, end: int | None = None) -> int:
    """The character at which a token starts; beyond the last one, ``end`` (default: where the last one starts)."""
    if token >= len(starts):
        return starts[-1] if end is None else end
    return starts[max(token, 0)]


def _chunk_end(text: str, starts: Sequence[int], begin: int, most: int) -> int:
    """Where a chunk of at most ``most`` tokens that starts at ``begin`` ends, so that the rest divides evenly."""
    first = bisect_left(starts, begin)
    left = len(starts) - first
    if left <= most:
        return len(text)
    target = left / -(-left // most)
    low, middle, high = (_place(starts, first + round(target * share)) for share in (1 - _SPREAD, 1.0, 1 + _SPREAD))
    return _best_cut(text, begin, low, middle, min(high, _place(starts, first + most)))


def _best_cut(text: str, begin: int, low: int, target: int, high: int) -> int:
    """The best place to end a chunk in ``[low, high]``: the nearest to ``target`` of the best kind of break."""
    low, high = max(low, begin + 1), max(high, begin + 1)
    for kind in _BREAKS:
        # One character more than may be used: a break that runs on beyond ``high`` is not cut in two.
        places: list[int] = [match.end() for match in kind.finditer(text, low - 1, min(high + 1, len(text)))]
        places = [place for place in places if low <= place <= high and not _splits_character(text, place, begin)]
        if places:
            return min(places, key=lambda place: abs(place - target))
    return _whole(text, begin, min(max(target, low), high), high)


def _whole(text: str, begin: int, cut: int, high: int) -> int:
    """A cut near ``cut`` that parts no character; one that alone is longer than ``high`` is parted at ``cut``."""
    if (start := grapheme_start(text, cut, begin)) > begin:
        return start
    return end if (end := grapheme_end(text, cut, begin)) <= high else cut


def _splits_character(text: str, cut: int, begin: int = 0) -> bool:
    """Whether a cut before ``text[cut]`` would part what is drawn as one character."""
    return grapheme_start(text, cut, begin) != cut


def _word_before(text: str, place: int, lowest: int) -> int:
    """The start of the word that ``place`` lies in, not before ``lowest``; ``place`` where it has none there."""
    breaks = [match.end() for match in _SPACE.finditer(text, lowest, place)]
    return breaks[-1] if breaks else place


def _word_after(text: str, place: int, highest: int) -> int:
    """The end of the word that ``place`` lies in, not after ``highest``; ``place`` where it has none there."""
    found = _SPACE.search(text, place, highest)
    return found.start() if found else place
