"""What is trained on, in which order: documents grouped into prompts, each with all that is asked about them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from lloco_engine.chunking import Chunker
from lloco_engine.finetune.config import FinetuneConfig
from lloco_engine.keyword_score import coverage, words
from lloco_engine.readers.records import Question, Record
from lloco_engine.types import Document

__all__ = ["Example", "Planner", "split_records", "steps"]

_JOINT = "\n\n"  # between passages that are read as one

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """One prompt's memory and the questions asked of it in one pass.

    ``chunks`` are token ids, each compressed apart at ``ratio`` (``kind`` "memory") or read as text (``"text"``);
    there are none where ``kind`` is ``"none"``.
    """

    kind: Literal["memory", "text", "none"]
    chunks: tuple[Ids, ...]
    ratio: float
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class _Source:
    """One document, cut into chunks."""

    record: Record
    chunks: tuple[Ids, ...]


class Planner:
    """Makes examples of documents; equal settings and seeds make equal examples in equal order.

    Args:
        chunker: cuts documents that are longer than one segment.
        tokenizer: the decoder's.
        config: of the run.
    """

    def __init__(self, chunker: Chunker, tokenizer: Any, config: FinetuneConfig) -> None:
        self._chunker, self._tokenizer, self._config = chunker, tokenizer, config
        self._most = chunker.config.segment_tokens

    def plan(self, records: Iterable[Record], seed: int) -> list[Example]:
        """Examples over every question of ``records`` once, in random order.

        Which passages are joined depends on the run's seed alone, so epochs (other ``seed``) read the same chunks in
        other company: each chunk is compressed once.
        """
        draw = random.Random(seed)
        sources = [self._source(record) for record in records if record.questions]
        made = list(self._prompts([source for source in sources if len(source.chunks) == 1], draw))
        made += [
            self._example(self._asked(source), [source.record], draw) for source in sources if len(source.chunks) > 1
        ]
        parts = [part for example in made for part in self._parts(example)]
        draw.shuffle(parts)
        return parts

    def _source(self, record: Record) -> _Source:
        chunks = self._chunker.split(Document(record.doc_id, record.text))
        return _Source(record, tuple(chunk.token_ids for chunk in chunks))

    def _prompts(self, sources: Sequence[_Source], draw: random.Random) -> Iterator[Example]:
        """Documents of one chunk, joined as the layouts say, in prompts of as many chunks as the layouts say."""
        for passages, joined in self._joined(sources).items():
            layouts = [layout for layout in self._config.layouts if layout[1] == passages]
            weights = [share / segments for segments, _, share in layouts]  # shares are of documents
            draw.shuffle(joined)
            at = 0
            while at < len(joined):
                segments, *_ = draw.choices(layouts, weights)[0]
                together = joined[at : at + segments]
                at += segments
                records = [source.record for chunk in together for source in chunk]
                yield self._example([self._tokens(chunk) for chunk in together], records, draw)

    def _joined(self, sources: Sequence[_Source]) -> dict[int, list[list[_Source]]]:
        """Documents that are read as one chunk, by how many the layouts want in it; equal in all epochs."""
        draw = random.Random(self._config.seed)
        ordered = list(sources)
        draw.shuffle(ordered)
        shares: dict[int, float] = {}
        for _, passages, share in self._config.layouts:
            shares[passages] = shares.get(passages, 0.0) + share
        made: dict[int, list[list[_Source]]] = {passages: [] for passages in shares}
        at = 0
        while at < len(ordered):
            (passages,) = draw.choices(list(shares), [share / passages for passages, share in shares.items()])
            joined = self._join(ordered[at : at + passages])
            at += len(joined)
            made[passages].append(joined)
        return made

    def _join(self, sources: Sequence[_Source]) -> list[_Source]:
        """As many as fit one segment."""
        kept: list[_Source] = []
        total = 0
        for source in sources:
            total += len(source.chunks[0]) + (3 if kept else 0)
            if kept and total > self._most:
                break
            kept.append(source)
        return kept

    def _tokens(self, sources: Sequence[_Source]) -> Ids:
        if len(sources) == 1:
            return sources[0].chunks[0]
        return tuple(self._chunker.text_ids(_JOINT.join(source.record.text for source in sources)))

    def _example(self, chunks: Sequence[Ids], records: Sequence[Record], draw: random.Random) -> Example:
        config = self._config
        kept = list(chunks)
        draw.shuffle(kept)
        questions = [question for record in records for question in record.questions]
        draw.shuffle(questions)
        ratio, kind = draw.choice(config.ratios), draw.random()
        if kind < config.none_share:
            return Example("none", (), ratio, tuple(questions))
        if kind < config.none_share + config.text_share and sum(map(len, kept)) <= self._most:
            return Example("text", tuple(kept), ratio, tuple(questions))
        return Example("memory", tuple(kept), ratio, tuple(questions))

    def _asked(self, source: _Source) -> Sequence[Ids]:
        """Of too many chunks those with most of the questions' words: each question's best first, as if retrieved."""
        chunks, most = source.chunks, self._config.max_segments
        if len(chunks) <= most:
            return chunks
        having = [set(words(self._tokenizer.decode(ids))) for ids in chunks]
        ranked: list[list[int]] = []
        for question in source.record.questions:
            found = [[n for n, own in enumerate(having) if word in own] for word in words(question.question)]
            shares = coverage([np.asarray(rows, dtype=np.int64) for rows in found], len(chunks), len(chunks))
            if shares is not None:
                ranked.append(np.argsort(-shares, kind="stable").tolist())
        turns = [row[turn] for turn in range(len(chunks)) for row in ranked] or range(len(chunks))
        return [chunks[n] for n in list(dict.fromkeys(turns))[:most]]

    def _parts(self, example: Example) -> Iterator[Example]:
        """The example in passes of at most ``rows`` questions, those of like length together: little is padding."""
        ordered = sorted(example.questions, key=lambda q: len(q.question) + len(q.answers[0]))
        for at in range(0, len(ordered), self._config.rows):
            yield replace(example, questions=tuple(ordered[at : at + self._config.rows]))


def split_records(records: Sequence[Record], config: FinetuneConfig) -> tuple[list[Record], list[Record]]:
    """Documents to train on, and those held out; none are held out of fewer than four.

    Hashes choose, so that a run which goes on from another's adapter holds out the documents that it held out.
    """
    asked = [record for record in records if record.questions]
    count = min(round(len(asked) * config.holdout), config.holdout_documents)
    if config.holdout and config.holdout_documents and len(asked) >= 4:
        count = max(count, 1)
    chosen = sorted(asked, key=lambda record: hashlib.sha256(record.text.encode()).hexdigest())[:count]
    held = {id(record) for record in chosen}
    return [record for record in asked if id(record) not in held], chosen


def steps(examples: Sequence[Example], batch_questions: int) -> list[list[Example]]:
    """Examples by update: as many in a row as hold at least ``batch_questions`` questions."""
    made: list[list[Example]] = [[]]
    for example in examples:
        if sum(len(e.questions) for e in made[-1]) >= batch_questions:
            made.append([])
        made[-1].append(example)
    return made
