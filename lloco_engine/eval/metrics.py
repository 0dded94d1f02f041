"""Scores of answers as the field computes them, and the share of a context's worth that a memory keeps."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

__all__ = ["SCORES", "choice", "contains", "exact_match", "f1", "geometric_mean", "recovered", "rouge"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LETTER = re.compile(r"\s*(?:the answer is\s*)?\(?([A-Z])(?:[).:,]|\s*$)", re.IGNORECASE)


def f1(answer: str, gold: Sequence[str]) -> float:
    """SQuAD's token F1 (Rajpurkar et al. 2016) of the gold answer that fits best, from 0 to 1."""
    return max(_f1(_words(answer), _words(one)) for one in gold)


def exact_match(answer: str, gold: Sequence[str]) -> float:
    """SQuAD's exact match: 1 where the words are those of a gold answer, but for case, articles and punctuation."""
    return float(any(_words(answer) == _words(one) for one in gold))


def contains(answer: str, gold: Sequence[str]) -> float:
    """1 where the words of a gold answer stand in the answer, in one piece: how needle tests count."""
    words = f" {' '.join(_words(answer))} "
    return float(any(f" {' '.join(_words(one))} " in words for one in gold))


def rouge(answer: str, gold: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L F-measures (Lin 2004) with Porter's stemmer, as SCROLLS takes them (Shaham et al. 2022).

    Each is that of the gold answer that fits it best. By the rouge-score package.
    """
    scores = [_scorer().score(one, answer) for one in gold]
    names = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
    return {name: max(float(score[theirs].fmeasure) for score in scores) for name, theirs in names.items()}


def geometric_mean(scores: Mapping[str, float | None]) -> float | None:
    """SCROLLS' one figure for summaries: the geometric mean of the three averages; None where one is missing."""
    one, two, longest = (scores.get(name) for name in ("rouge_1", "rouge_2", "rouge_l"))
    return None if one is None or two is None or longest is None else (one * two * longest) ** (1 / 3)


def choice(answer: str, options: Sequence[str]) -> int | None:
    """Which of the options a written answer means; None where it means none.

    The letter it begins with, else the option whose words it shares most (and shares any with).
    """
    if (letter := _LETTER.match(answer)) and (number := ord(letter[1].upper()) - ord("A")) < len(options):
        return number
    shared = [_f1(_words(answer), _words(option)) for option in options]
    best = max(range(len(options)), key=shared.__getitem__)
    return best if shared[best] > 0 else None


def recovered(loss: float, none: float | None, full: float | None) -> float | None:
    """How much of what the full text gives is kept: 0 at the loss without context, 1 at the loss with the full text.

    None where one of the two was not measured, or the full text changes nothing.
    """
    if none is None or full is None or none == full:
        return None
    return (none - loss) / (none - full)


# What a task may ask for of a generated answer: its gold answers in, its scores by name out.
SCORES: dict[str, Callable[[str, Sequence[str]], dict[str, float]]] = {
    "f1": lambda answer, gold: {"f1": f1(answer, gold)},
    "em": lambda answer, gold: {"em": exact_match(answer, gold)},
    "rouge": rouge,
    "success": lambda answer, gold: {"success": contains(answer, gold)},
}


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _f1(answer: list[str], gold: list[str]) -> float:
    if not answer or not gold:
        return float(answer == gold)
    common = sum((Counter(answer) & Counter(gold)).values())
    return 2 * common / (len(answer) + len(gold))


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
