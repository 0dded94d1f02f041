"""Needles in a haystack (Kamradt 2023): a fact is put into a long text at some depth, and then asked for.

The haystack is cut into chunks once. A needle changes only the chunk that it falls into, so all depths and lengths
share the compressed segments of the others.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lloco_engine.chunking import Chunker
from lloco_engine.config import ChunkConfig
from lloco_engine.errors import ConfigError, DocumentError
from lloco_engine.eval.data import Group, Question
from lloco_engine.eval.tasks.base import Task
from lloco_engine.tokenizing import encode
from lloco_engine.types import Document

if TYPE_CHECKING:
    from lloco_engine.decoder.local import LocalDecoder

__all__ = ["Needle"]

_ROOM = 96  # tokens of a segment that are left free for the needles
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_PARAGRAPH = re.compile(r"\n\s*\n")
_SYLLABLES = (
    ("Bel", "Cor", "Dun", "Fen", "Gar", "Hol", "Kel", "Lor", "Mar", "Nor", "Pel", "Quin", "Ros", "Sel", "Tor", "Wen"),
    ("a", "e", "i", "o"),
    ("bury", "dale", "ford", "gate", "ham", "mere", "mouth", "stead", "ton", "wick", "worth"),
)
_KINDS = (
    (
        "The keeper of the lighthouse at {place} is called {answer}.",
        "What is the keeper of the lighthouse at {place} called?",
        ("Agnes Holt", "Bruno Vance", "Clara Finch", "Edwin Marsh", "Greta Lund", "Oscar Pryce", "Petra Stone"),
    ),
    (
        "The bakery in {place} is famous for its {answer} bread.",
        "What kind of bread is the bakery in {place} famous for?",
        ("walnut", "pumpkin", "rosemary", "saffron", "chestnut", "ginger", "olive"),
    ),
    (
        "The old bridge at {place} was painted {answer} last spring.",
        "What colour was the old bridge at {place} painted last spring?",
        ("orange", "purple", "silver", "turquoise", "yellow", "black", "pink"),
    ),
    (
        "The museum of {place} is devoted to the history of {answer}.",
        "What is the museum of {place} devoted to?",
        ("clocks", "umbrellas", "bicycles", "pottery", "whaling", "kites", "violins"),
    ),
)


class Needle(Task):
    """A grid of haystack lengths and depths.

    Args:
        lengths: source tokens of the haystacks.
        depths: how many places from the beginning (0%) to the end (100%), evenly spread.
        needles: facts put in at each place, each of them asked for.
        segment_tokens: most tokens of a chunk.
        seed: chooses the facts.
    """

    name = "needle"
    about = "facts hidden in a long text at ten depths, 1k to 128k tokens; a folder of .txt, else the demo's documents"
    scores = ("success", "f1")
    max_new_tokens = 48
    where = "essays"

    def __init__(
        self,
        *,
        lengths: Sequence[int] = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072),
        depths: int = 10,
        needles: int = 3,
        segment_tokens: int = ChunkConfig.segment_tokens,
        seed: int = 0,
    ) -> None:
        if not lengths or min(lengths) < 256:
            raise ConfigError(f"needle lengths must be at least 256 tokens, not {min(lengths, default='none')}")
        if depths < 1 or not 1 <= needles <= len(_KINDS):
            raise ConfigError(
                f"needle depths must be at least 1 and needles 1 to {len(_KINDS)}, not {depths} and {needles}"
            )
        if segment_tokens < 2 * _ROOM:
            raise ConfigError(f"segment_tokens must be at least {2 * _ROOM} with needles, not {segment_tokens}")
        self._lengths, self._depths, self._needles = tuple(sorted(set(lengths))), depths, needles
        self._segment_tokens, self._seed = segment_tokens, seed

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return {
            "lengths": list(self._lengths),
            "depths": self._depths,
            "needles": self._needles,
            "segment_tokens": self._segment_tokens,
            "seed": self._seed,
        }

    def source(self, folder: Path | None) -> Path | None:
        """The folder of essays, where there is one."""
        return folder / self.where if folder is not None and (folder / self.where).is_dir() else None

    def groups(
        self, source: Path | None, decoder: LocalDecoder, *, limit: int | None, passages_per_chunk: int, segments: int
    ) -> list[Group]:
        """One group a cell of the grid, shortest haystacks first; ``limit`` counts cells."""
        if passages_per_chunk != 1 or segments != 1:
            raise ConfigError("passages_per_chunk and segments must be 1 with needles: a haystack has its own chunks")
        haystack = self._haystack(_texts(source), decoder)
        cells = [
            self._cell(_first(haystack, length, decoder), length, depth)
            for length in self._lengths
            for depth in range(self._depths)
        ]
        return cells[:limit]

    def _haystack(self, texts: Sequence[str], decoder: LocalDecoder) -> list[str]:
        """Chunks of the longest haystack; texts that are too short come again, their paragraphs in another order."""
        wanted = self._lengths[-1]
        text, turn = "\n\n".join(texts), 0
        paragraphs = [part for part in _PARAGRAPH.split(text) if part.strip()]
        while len(encode(decoder.tokenizer, text)) < wanted:
            turn += 1
            text += "\n\n" + "\n\n".join(random.Random(turn).sample(paragraphs, len(paragraphs)))
        size = self._segment_tokens - _ROOM
        window = min(ChunkConfig.window_tokens, size)
        sizes = ChunkConfig(size, window, min(ChunkConfig.window_overlap, window - 1))
        chunker = Chunker(decoder.tokenizer, sizes, decoder.template.text_ids)
        return [chunk.text for chunk in chunker.split(Document("haystack", text))]

    def _cell(self, chunks: list[str], length: int, depth: int) -> Group:
        share = depth / (self._depths - 1) if self._depths > 1 else 0.5
        chance = random.Random(f"{self._seed} {length} {depth}")
        facts = list(_facts(chance, self._needles))
        place = share * sum(map(len, chunks))
        number = 0
        while number < len(chunks) - 1 and place > len(chunks[number]):
            place -= len(chunks[number])
            number += 1
        changed = _put(chunks[number], place / len(chunks[number]), [needle for needle, _ in facts])
        return Group(
            (*chunks[:number], changed, *chunks[number + 1 :]),
            tuple(question for _, question in facts),
            1,
            {"length": length, "depth": round(100 * share)},
        )


def _texts(source: Path | None) -> list[str]:
    """The haystack's texts: every .txt of a folder, by name; without one, the documents of the demo."""
    if source is None:
        from lloco_engine.eval.corpus import source_texts

        return source_texts()
    files = sorted(source.glob("*.txt"))
    if not files:
        raise DocumentError(f"a haystack must be a folder with .txt files; {source} has none")
    try:
        return [file.read_text(encoding="utf-8") for file in files]
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(f"a file of the haystack {source} cannot be read: {error}") from error


def _first(chunks: Sequence[str], length: int, decoder: LocalDecoder) -> list[str]:
    """The first ``length`` tokens of the haystack: whole chunks and, last, as many sentences of the next as fit."""
    kept: list[str] = []
    left = length
    for chunk in chunks:
        size = len(encode(decoder.tokenizer, chunk))
        if size > left:
            part = ""
            for sentence in _sentences(chunk):
                if len(encode(decoder.tokenizer, part + sentence)) > left:
                    break
                part += sentence
            # a tail of a few tokens would be a segment of its own: too short to say anything
            return [*kept, part] if len(encode(decoder.tokenizer, part)) >= 64 else kept
        kept.append(chunk)
        left -= size
    return kept


def _sentences(text: str) -> Iterator[str]:
    """Sentences with the space after them; together they are the text."""
    start = 0
    for match in _SENTENCE.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    if start < len(text):
        yield text[start:]


def _facts(chance: random.Random, count: int) -> Iterator[tuple[str, Question]]:
    """Needles of different kinds with their questions."""
    for needle, question, answers in chance.sample(_KINDS, count):
        place, answer = "".join(map(chance.choice, _SYLLABLES)), chance.choice(answers)
        yield (
            needle.format(place=place, answer=answer),
            Question(question.format(place=place), (answer,), place.lower()),
        )


def _put(chunk: str, share: float, needles: Sequence[str]) -> str:
    """A chunk with needles between its sentences, one after another from the place nearest to a share of it on."""
    sentences = list(_sentences(chunk))
    ends = [0]
    for sentence in sentences:
        ends.append(ends[-1] + len(sentence))
    nearest = min(range(len(ends)), key=lambda number: abs(ends[number] - share * len(chunk)))
    first = max(0, min(nearest, len(sentences) + 1 - len(needles)))
    between: dict[int, list[str]] = {}
    for number, needle in enumerate(needles):
        between.setdefault(min(first + number, len(sentences)), []).append(needle + " ")
    parts: list[str] = []
    for number in range(len(sentences) + 1):
        if number in between and parts and not parts[-1][-1].isspace():
            parts.append(" ")
        parts += between.get(number, [])
        parts += sentences[number : number + 1]
    return "".join(parts)
