"""How much of a question's words a search window has.

An embedding says what a passage is about, and blurs a name, a number or a code that stands in it once. So the score of
a window is a convex combination of its cosine similarity and of the share of the question's words that it has (Bruch
et al. 2023, An Analysis of Fusion Functions for Hybrid Retrieval), a word weighing the more, the fewer windows have it
(the inverse document frequency of BM25, Robertson and Zaragoza 2009).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows = npt.NDArray[np.int64]
    Shares = npt.NDArray[np.float64]

__all__ = ["MOST", "coverage", "words"]

_WORD = re.compile(r"[^\W_]+")
MOST = 64  # words of a question that count: a pasted page is searched by its beginning


def words(text: str) -> list[str]:
    """The distinct words of a text, in order: runs of letters and digits, in lower case."""
    return list(dict.fromkeys(word.lower() for word in _WORD.findall(text)))


def coverage(found: Sequence[Rows], searched: int, held: int) -> Shares | None:
    """The share of a question's words that windows have.

    Args:
        found: for each word of the question, the rows of the windows that have it, each once.
        searched: how many windows are searched.
        held: how many rows there are.

    Returns:
        (held,) the share of each row, from 0 to 1; None when no word tells windows apart: one that more than a
        quarter of those searched have does not count.
    """
    import numpy as np

    telling = [rows for rows in found if len(rows) <= searched / 4]
    if not telling:
        return None
    shares, total = np.zeros(held), 0.0
    for rows in telling:
        weight = math.log1p((searched - len(rows) + 0.5) / (len(rows) + 0.5))
        shares[rows] += weight
        total += weight
    shares /= total
    return shares
