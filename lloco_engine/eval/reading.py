"""What the decoder is given to read before a question, by each method that is compared.

==============================  =======================================================================================
none                            nothing
full                            the text of all chunks, as far as it fits the window: both ends are kept
text_slots                      the best search windows, as many tokens of text as ``kv`` has slots
kv                              the segments of all chunks, of whichever kind the compressor makes
kv_guided                       the same, what search thinks of each weighing in where queries choose among them, as it
                                does for a whole document
kvzip, snapkv                   the same, the KV cache evicted by another's rule at the same ratio, nothing fitted
kv_retrieved, kvzip_retrieved,  the segments of the ``top_k`` chunks whose search windows score best, as in a store
snapkv_retrieved
text_retrieved                  the text of the same chunks, best first
text_slots_retrieved            the best search windows, as many tokens of text as ``kv_retrieved`` has slots
==============================  =======================================================================================

Text is read once, with the adapter that will answer, and its whole KV cache is then placed like a segment: so it costs
one prefill, however many questions, options and answers follow it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from lloco_engine import keyword_score
from lloco_engine.baselines import keep_ends
from lloco_engine.chunking import Chunker
from lloco_engine.compress.eviction import keep_slots
from lloco_engine.config import ChunkConfig, PrefixConfig, RetrieveConfig
from lloco_engine.eval.data import JOINT, Group
from lloco_engine.prefix import assemble, place
from lloco_engine.tokenizing import encoder_of
from lloco_engine.types import AnySegment, Chunk, Document, Prefix

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from lloco_engine.compress.base import Compressor
    from lloco_engine.decoder.local import LocalDecoder
    from lloco_engine.segment_cache import SegmentCache

__all__ = ["METHODS", "Encoder", "Material", "Method", "Reader", "Reading", "Remembered"]


_SPELLED = 4  # windows, as many as an engine takes


@dataclass(frozen=True)
class Method:
    """How a prompt is made.

    Args:
        name: as in the table above.
        memory: ``"none"``, ``"text"``, ``"slots"`` (as much text as a memory has slots) or a kind of compressor.
        retrieved: read the best chunks only.
        guided: read every chunk, and have search weigh in where queries choose among segments, as it does where chunks
            are retrieved.
    """

    name: str
    memory: str
    retrieved: bool = False
    guided: bool = False

    @property
    def by_ratio(self) -> bool:
        """Whether there is a row for each ratio."""
        return self.memory not in ("none", "text")

    @property
    def compresses(self) -> bool:
        """Whether segments are read."""
        return self.memory not in ("none", "text", "slots")


METHODS = {
    method.name: method
    for method in (
        Method("none", "none"),
        Method("full", "text"),
        Method("text_retrieved", "text", retrieved=True),
        Method("text_slots", "slots"),
        Method("text_slots_retrieved", "slots", retrieved=True),
        Method("kv_guided", "kv", guided=True),
        *(
            Method(kind + ("_retrieved" if retrieved else ""), kind, retrieved)
            for kind in ("kv", "kvzip", "snapkv")
            for retrieved in (False, True)
        ),
    )
}


class Encoder(Protocol):
    """What is needed of an embedder."""

    def encode(self, texts: Sequence[str], /) -> npt.NDArray[np.float32]:
        """(texts, dim) float32, rows L2-normalised."""
        ...


class Remembered:
    """An embedder that embeds a text once: the cells of a grid, and the rows of a run, search the same windows.

    Args:
        encoder: what embeds a text the first time.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._vectors: dict[str, npt.NDArray[np.float32]] = {}

    def encode(self, texts: Sequence[str], /) -> npt.NDArray[np.float32]:
        """See `Encoder.encode`."""
        import numpy as np

        if new := [text for text in dict.fromkeys(texts) if text not in self._vectors]:
            self._vectors.update(zip(new, self._encoder.encode(new), strict=True))
        return np.stack([self._vectors[text] for text in texts])


@dataclass(frozen=True)
class Reading:
    """What some questions of a group are read with.

    Args:
        numbers: of the questions, in the group.
        prefix: what stands before them, or None.
        text_tokens: how many of the prefix's slots are text that was prefilled.
        left_out: tokens of text that did not fit the window.
        searched: the chunks that search found or weighed, in whose best windows' spelling answers are given.
    """

    numbers: tuple[int, ...]
    prefix: Prefix | None = None
    text_tokens: int = 0
    left_out: int = 0
    searched: tuple[int, ...] = ()


class Material:
    """A group's chunks as they are compressed and searched.

    Args:
        group: what is asked about.
        decoder: whose tokens count.
        longest: most tokens of a segment; a longer chunk becomes several.
        embedder: for the search; only asked when something is retrieved.
        top_k: chunks that a question retrieves.
    """

    def __init__(self, group: Group, decoder: LocalDecoder, longest: int, embedder: Encoder, top_k: int) -> None:
        self.group, self._embedder, self._top_k = group, embedder, top_k
        window = min(ChunkConfig.window_tokens, longest)
        sizes = ChunkConfig(longest, window, min(ChunkConfig.window_overlap, window - 1))
        chunker = Chunker(decoder.tokenizer, sizes, decoder.template.text_ids)
        made = [chunker.split(Document("", text)) for text in group.chunks]
        self.chunks: list[Chunk] = [chunk for pieces in made for chunk in pieces]
        self.split = sum(len(pieces) > 1 for pieces in made)
        self._pieces = [len(pieces) for pieces in made]

    @cached_property
    def _windows(self) -> list[tuple[int, str]]:
        """Every search window: the number of the chunk and the text."""
        return [
            (number, chunk.text[window.start - chunk.span.start : window.end - chunk.span.start])
            for number, chunk in enumerate(self.chunks)
            for window in chunk.windows
        ]

    @cached_property
    def _scores(self) -> npt.NDArray[np.float32]:
        """(questions, windows) float32, as a store scores them."""
        import numpy as np

        questions = [question.question for question in self.group.questions]
        texts = [text for _, text in self._windows]
        scores = self._embedder.encode(questions) @ self._embedder.encode(texts).T
        having: dict[str, list[int]] = {}
        for number, text in enumerate(texts):
            for word in keyword_score.words(text):
                having.setdefault(word, []).append(number)
        share = RetrieveConfig.lexical
        for number, question in enumerate(questions):
            found = [
                np.array(having.get(word, ()), np.int64) for word in keyword_score.words(question)[: keyword_score.MOST]
            ]
            if (shares := keyword_score.coverage(found, len(texts), len(texts))) is not None:
                scores[number] = (1 - share) * scores[number] + share * shares
        return scores

    @cached_property
    def ranked(self) -> list[list[tuple[int, str]]]:
        """Of each question, the search windows best first: the number of the chunk and the text."""
        import numpy as np

        order = np.argsort(-self._scores, axis=1, kind="stable")
        return [[self._windows[at] for at in of_question] for of_question in order]

    def scores(self, number: int) -> list[float]:
        """What search thinks of every chunk for a question: the score of its best window."""
        best = [0.0] * len(self.chunks)
        for (chunk, _), score in zip(self._windows, self._scores[number].tolist(), strict=True):
            best[chunk] = max(best[chunk], score)
        return best

    def chain_starts(self, compressor: Compressor, decoder: LocalDecoder) -> list[int]:
        """For each chunk, the first of those that its segment builds on: chains end where a text ends."""
        starts: list[int] = []
        for count in self._pieces:
            first = len(starts)
            lengths = [len(chunk.token_ids) for chunk in self.chunks[first : first + count]]
            starts += [first + start for start in compressor.chain_starts(decoder, lengths)]
        return starts

    def spelling(self, number: int, chunks: Sequence[int]) -> str:
        """What answers spell words as: the best search window of the best four of some chunks for a question."""
        best: dict[int, str] = {}
        for chunk, text in self.ranked[number]:
            if chunk in chunks and len(best) < _SPELLED:
                best.setdefault(chunk, text)
        return "\n".join(best.values())

    def hits(self, number: int) -> tuple[int, ...]:
        """The chunks that a question retrieves, best first: a chunk scores as its best window."""
        return tuple(dict.fromkeys(chunk for chunk, _ in self.ranked[number]))[: self._top_k]


class Reader:
    """Makes the prompts of every method.

    Args:
        decoder: reads and answers.
        segments: by kind of memory (``"kv"``, ``"kvzip"``, ...), what makes its segments.
        ratios: all that will be asked for, so that one compression serves them.
        placing: how segments are placed and read.
    """

    def __init__(
        self,
        decoder: LocalDecoder,
        segments: Mapping[str, SegmentCache],
        ratios: Sequence[float],
        placing: PrefixConfig | None = None,
    ) -> None:
        self.decoder, self.segments, self.ratios = decoder, segments, tuple(ratios)
        self._placing = PrefixConfig() if placing is None else placing

    def readings(
        self, material: Material, method: Method, ratio: float | None, adapter: str | None, tails: Sequence[int]
    ) -> Iterator[Reading]:
        """What each question is read with; questions that share a prefix come together, text is dropped in between.

        Args:
            material: the group.
            method, ratio: of the row.
            adapter: that text is read with.
            tails: of each question, the tokens that follow the prefix: it and the longest answer there may be.
        """
        everything = tuple(range(len(material.chunks)))
        scopes: dict[tuple[int, ...], list[int]] = {}
        for number in range(len(tails)):
            chosen = material.hits(number) if method.retrieved else everything
            scopes.setdefault(chosen, []).append(number)
        for chosen, numbers in scopes.items():
            if method.memory == "none":
                yield Reading(tuple(numbers))
            elif method.compresses:
                assert ratio is not None
                prefix = self._compressed(material, method.memory, ratio, chosen, max(tails[n] for n in numbers))
                yield from self._asked_by(material, method, chosen, numbers, prefix)
            elif method.memory == "text":
                yield self._text(material, method, chosen, numbers, adapter, max(tails[n] for n in numbers))
            else:
                assert ratio is not None
                budget = sum(math.ceil(len(material.chunks[n].token_ids) / ratio) for n in chosen)
                for number in numbers:
                    ids = self._best_windows(material, number, min(budget, self._room(tails[number])))
                    yield Reading((number,), self._read(ids, adapter), len(ids))

    def _compressed(self, material: Material, kind: str, ratio: float, chosen: Sequence[int], tail: int) -> Prefix:
        """The chosen chunks' segments, placed in parallel; or summaries, in order, with those they are read after."""
        if self.segments[kind].compressor.memory == "summary":
            return self._summaries(material, self.segments[kind], ratio, chosen, tail)
        made = [self.segments[kind].get(material.chunks[n].token_ids, ratio, self.ratios) for n in chosen]
        return place(made, self._placing, template_tokens=self.decoder.template_tokens)

    def _asked_by(
        self, material: Material, method: Method, chosen: tuple[int, ...], numbers: Sequence[int], prefix: Prefix
    ) -> Iterator[Reading]:
        """The prefix as each question reads it: where search has a part, with what it thinks of the chunks."""
        searched = chosen if method.retrieved or method.guided else ()
        if not searched or not self._placing.relevance or len(prefix.compact) < 2:
            yield Reading(tuple(numbers), prefix, searched=searched)
            return
        template = self.decoder.template_tokens
        for number in numbers:
            of_all = material.scores(number)
            scores = [of_all[chunk] for chunk in chosen]
            placed = place(prefix.segments, self._placing, template_tokens=template, scores=scores)
            yield Reading((number,), placed, searched=searched)

    def _summaries(
        self, material: Material, cache: SegmentCache, ratio: float, chosen: Sequence[int], tail: int
    ) -> Prefix:
        """The chosen chunks' summaries, each after those that it is read after; the last do not stay if it is full."""
        decoder, compressor = self.decoder, cache.compressor
        starts = material.chain_starts(compressor, decoder)
        read: dict[int, AnySegment] = {}
        for number in chosen:
            chain = range(starts[number], number + 1)
            made = dict(zip(chain, cache.chain([material.chunks[n].token_ids for n in chain], ratio), strict=True))
            read |= made if compressor.reads_chain(decoder) else {number: made[number]}
        return assemble(
            [read[n] for n in sorted(read)],
            template_tokens=decoder.template_tokens,
            room=tail,
            window=decoder.shape.window,
            rotary=decoder.shape.rotary,
        ).prefix

    def _text(
        self,
        material: Material,
        method: Method,
        chosen: Sequence[int],
        numbers: Sequence[int],
        adapter: str | None,
        tail: int,
    ) -> Reading:
        room = self._room(tail)
        if method.retrieved:  # what does not fit is the end, where the worst hits are
            ids = self.decoder.template.text_ids(JOINT.join(material.chunks[n].text.strip() for n in chosen))
            kept = ids[:room]
        else:
            ids = self.decoder.template.text_ids(JOINT.join(material.group.chunks))
            kept = keep_ends(ids, max(room, 2))
        return Reading(tuple(numbers), self._read(kept, adapter), len(kept), len(ids) - len(kept))

    def _best_windows(self, material: Material, number: int, budget: int) -> list[int]:
        """Whole search windows, best first, and the beginning of the next, up to a number of tokens."""
        ids: list[int] = []
        going_on = encoder_of(self.decoder.tokenizer)
        for _, text in material.ranked[number]:
            part = text.strip()
            ids += going_on.ids(JOINT + part, "text") if ids else self.decoder.template.text_ids(part)
            if len(ids) >= budget:
                break
        return ids[: max(budget, 1)]

    def _room(self, tail: int) -> int:
        return self.decoder.shape.window - self.decoder.template_tokens - tail

    def _read(self, ids: Sequence[int], adapter: str | None) -> Prefix:
        """Text as a prefix: its whole KV cache, as the answering weights make it."""
        import torch

        decoder = self.decoder
        everything = torch.ones(decoder.shape.layers, decoder.shape.kv_heads, len(ids), dtype=torch.bool)
        cache = decoder.prefill(ids, adapter=adapter)
        segment = keep_slots(cache, decoder.template_tokens, everything)
        return Prefix((segment,), (0,), decoder.template_tokens + len(ids))
