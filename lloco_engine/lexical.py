"""How much of a question's words a search window has.

An embedding says what a passage is about, and blurs a name, a number or a code that stands in it once. So the score of
a window is a convex combination of its cosine similarity and of the share of the question's words that it has (Bruch
et al. 2023, An Analysis of Fusion Functions for Hybrid Retrieval), a word weighing the more, the fewer windows have it
(the inverse document frequency of BM25, Robertson and Zaragoza 2009).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Ids = npt.NDArray[np.int64]
    Shares = npt.NDArray[np.float32]

__all__ = ["MOST", "coverage", "words"]

_WORD = re.compile(r"[^\W_]+")
MOST = 64  # words of a question that count: a pasted page is searched by its beginning


def words(text: str) -> list[str]:
    """The distinct words of a text, in order: runs of letters and digits, in lower case."""
    return list(dict.fromkeys(word.lower() for word in _WORD.findall(text)))


def coverage(found: Sequence[Ids], windows: int) -> tuple[Ids, Shares] | None:
    """The share of a question's words that windows have.

    Args:
        found: for each word of the question, the ids of the windows that have it, each once.
        windows: how many are searched.

    Returns:
        ids, ascending, and the share of each, above 0 and at most 1; None when no word tells windows apart: one that
        more than a quarter of them have does not count.
    """
    import numpy as np

    telling = [ids for ids in found if len(ids) <= windows / 4]
    if not telling:
        return None
    counts = np.array([len(ids) for ids in telling])
    weights = np.log1p((windows - counts + 0.5) / (counts + 0.5))
    ids, place = np.unique(np.concatenate(telling), return_inverse=True)
    shares = np.bincount(place, np.repeat(weights, counts), minlength=len(ids)) / weights.sum()
    return ids, shares.astype(np.float32)
