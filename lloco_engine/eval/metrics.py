"""Scores of answers, and the share of a context's worth that a memory keeps."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

__all__ = ["f1", "recovered", "rouge_l"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def f1(answer: str, gold: Sequence[str]) -> float:
    """SQuAD's token F1 (Rajpurkar et al. 2016) of the gold answer that fits best, from 0 to 1."""
    return max(_f1(_words(answer), _words(one)) for one in gold)


def rouge_l(answer: str, gold: Sequence[str]) -> float:
    """ROUGE-L's F-measure (Lin 2004, by the rouge-score package, no stemming) of the gold answer that fits best."""
    return max(float(_rouge().score(one, answer)["rougeL"].fmeasure) for one in gold)


def recovered(loss: float, none: float | None, full: float | None) -> float | None:
    """How much of what the full text gives is kept: 0 at the loss without context, 1 at the loss with the full text.

    None where one of the two was not measured, or the full text changes nothing.
    """
    if none is None or full is None or none == full:
        return None
    return (none - loss) / (none - full)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _f1(answer: list[str], gold: list[str]) -> float:
    if not answer or not gold:
        return float(answer == gold)
    common = sum((Counter(answer) & Counter(gold)).values())
    return 2 * common / (len(answer) + len(gold))


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])
