"""Averages of rows over documents, with bootstrap confidence intervals, and differences between rows.

Documents are what was drawn, so documents are what is resampled (Efron and Tibshirani 1993, section 6): the questions
of one document stand or fall together. Every row of a run is resampled with the same draws, so that differences between
rows are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["DRAWS", "Sample", "interval"]

DRAWS = 2000
_LEVEL = 0.95


class Sample:
    """Draws of documents with replacement, the same for everything that is measured on them.

    Args:
        documents: how many there are.
        seed: the same one gives the same draws.
    """

    def __init__(self, documents: int, seed: int) -> None:
        import numpy as np

        self.documents = documents
        chances = np.full(documents, 1 / documents)
        drawn = np.random.default_rng(seed).multinomial(documents, chances, size=DRAWS)
        # the first row is the sample itself, so that a statistic and its draws are computed by the same lines
        self._weights = np.vstack([np.ones(documents), drawn]).astype(np.float64)

    def sums(self, values: Sequence[float]) -> npt.NDArray[np.float64]:
        """(1 + DRAWS,): the sum over the documents, then over each draw of them."""
        import numpy as np

        return self._weights @ np.asarray(values, dtype=np.float64)

    def ratio(self, parts: Sequence[Mapping[str, float]], over: str, under: str) -> npt.NDArray[np.float64]:
        """(1 + DRAWS,): the sum of one field over the sum of another; NaN where the second is 0."""
        import numpy as np

        above = self.sums([part.get(over, 0.0) for part in parts])
        below = self.sums([part.get(under, 0.0) for part in parts])
        return np.divide(above, below, out=np.full_like(above, np.nan), where=below != 0)


def interval(values: npt.NDArray[np.float64]) -> list[float] | None:
    """The 95% percentile interval of (1 + DRAWS,) values, the first of which is the figure itself.

    None where draws do not differ (one document says nothing of others) or are not numbers.
    """
    import numpy as np

    drawn = values[1:]
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn) or not np.isfinite(values[0]) or np.ptp(drawn) == 0:
        return None
    low, high = np.quantile(drawn, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return [float(low), float(high)]
