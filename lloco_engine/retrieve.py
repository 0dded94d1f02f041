"""Question -> ranked hits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lloco_engine.config import RetrieveConfig
from lloco_engine.errors import ConfigError
from lloco_engine.filters import Filters
from lloco_engine.store import Store
from lloco_engine.types import Hit, Turn

if TYPE_CHECKING:
    from lloco_engine.embedder import Encodes

__all__ = ["Retriever", "best_windows", "searched_for", "with_history"]

_TURNS = 3  # of the user, that a question is searched for after
_LONG_BEFORE = 0.9  # of the score of what is found so
_WINDOWS = 4  # search windows whose text an answer may repeat


class Retriever:
    """Finds the segments of a store that a question needs, with the embedder that the store was made with."""

    def __init__(self, store: Store, embedder: Encodes) -> None:
        self._store = store
        self._embedder = embedder

    def retrieve(
        self,
        question: str,
        config: RetrieveConfig | None = None,
        filters: Filters | None = None,
        tenant: str = "",
    ) -> list[Hit]:
        """The ``top_k`` best segments, best first; then their neighbours, those of the best hit first.

        Args:
            question: text, not empty.
            config: how many, how similar, and how many neighbours before and after each (score 0.0).
            filters: as in `Store.search`.
            tenant: whose documents are searched.

        Raises:
            ConfigError: the question is empty.
            StoreMismatch: the embedder's vectors are not of the store's length.
        """
        config = RetrieveConfig() if config is None else config
        if not question.strip():
            raise ConfigError(f"a question must not be empty, not {question!r}")
        encode = getattr(self._embedder, "encode_query", self._embedder.encode)  # where questions are told apart
        vector = encode([question])[0]
        hits = self._store.search(
            vector,
            top_k=config.top_k,
            tenant=tenant,
            filters=filters,
            min_score=config.min_score,
            question=question,
            lexical=config.lexical,
        )
        if not config.neighbours:
            return hits
        # A segment is wanted once, also where two hits share a neighbour or one is the other's.
        found = {hit.segment_id: hit for hit in hits}
        for hit in hits:
            for other in self._store.neighbours(hit, config.neighbours):
                found.setdefault(other.segment_id, other)
        return list(found.values())


def searched_for(question: str, history: Sequence[Turn]) -> list[str]:
    """The texts that a question is searched for as.

    A follow-up ("How large is it?") does not say what it is about: the user's turn before it does. So the question is
    searched for after that turn and alone, for it may also be about something new (docs/scores.md has what this does);
    and after the last few turns, where the one before it may be a follow-up, too.
    """
    said = [turn.text.strip() for turn in history if turn.role == "user" and turn.text.strip()]
    if not said:
        return [question]
    texts = [f"{said[-1]}\n{question}", question]
    return texts if len(said) == 1 else [*texts, "\n".join([*said[-_TURNS:], question])]


def with_history(
    search: Callable[[str], list[Hit]], question: str, history: Sequence[Turn], top_k: int, neighbours: int
) -> list[Hit]:
    """What a question in a conversation finds: each segment by the better of its scores, the ``top_k`` best first.

    Args:
        search: what one text finds, as `Retriever.retrieve` has it.
        question, history: what is said, and what was before, oldest first.
        top_k, neighbours: as in `RetrieveConfig`.
    """
    found = [search(text) for text in searched_for(question, history)]
    if len(found) == 1:
        return found[0]
    # what was said long before counts less than what was said just now: it may be about something else
    found[2:] = [[replace(hit, score=hit.score * _LONG_BEFORE) for hit in hits] for hits in found[2:]]
    better: dict[str, Hit] = {}
    for hit in (hit for hits in found for hit in hits):
        known = better.get(hit.segment_id)
        better[hit.segment_id] = hit if known is None or hit.score > known.score else known
    ranked = sorted(better.values(), key=lambda hit: -hit.score)
    best = [hit for hit in ranked if hit.windows][:top_k]
    beside = (hit for hit in ranked if not hit.windows and any(_is_near(hit, one, neighbours) for one in best))
    return [*best, *beside]


def best_windows(hits: Sequence[Hit]) -> str:
    """Text that an answer may repeat, for guesses and hints: the best search window of the best hits."""
    ranked = sorted(hits, key=lambda hit: -hit.score)
    return "\n".join(hit.quote(hit.windows[0]) for hit in ranked[:_WINDOWS] if hit.windows)


def _is_near(hit: Hit, other: Hit, distance: int) -> bool:
    return (hit.tenant, hit.doc_id) == (other.tenant, other.doc_id) and abs(hit.ordinal - other.ordinal) <= distance
