"""Whether what search found can be the answer: the floor, a best score below which no document seems to answer.

A score (`Store.search`) is a mix of a cosine similarity and of the share of the question's words, so it means the same
for one embedder and one share of words in every store, and nothing for another. The floor of the embedded embedder was
measured with the default share, by questions that a store answers and questions that it cannot answer
(``lloco scores``; docs/scores.md). Other embedders have none, unless `RetrieveConfig.floor` gives one.
"""

from __future__ import annotations

from collections.abc import Sequence

from lloco_engine.config import RetrieveConfig
from lloco_engine.fingerprints import agree
from lloco_engine.types import Hit

__all__ = ["NOTHING", "doubt", "floor_of"]

NOTHING = "No document answers this."
_MEASURED = {"770c70ae18e7b62c": 0.27}  # embedder's fingerprint (all-MiniLM-L6-v2, as embedded) -> results/scores.json


def floor_of(config: RetrieveConfig, embedder_fingerprint: str) -> float:
    """The floor that is set, else the one measured for the embedder, else -1, which no score is below."""
    if config.floor is not None:
        return config.floor
    if config.lexical != RetrieveConfig.lexical:
        return -1.0
    return next((floor for one, floor in _MEASURED.items() if agree(one, embedder_fingerprint)), -1.0)


def doubt(hits: Sequence[Hit], floor: float) -> str | None:
    """Why hits may not be what answers a question; None where there is no doubt.

    Only scores that search gave count: a neighbour's 0.0 says nothing, nor does the 1.0 of what was not searched for.
    """
    best = max((hit.score for hit in hits if hit.score or hit.windows), default=1.0)
    if best >= floor:
        return None
    return f"no document seems to answer this: the best score is {best:.2f}, and below {floor:.2f} few that answer are"
