"""What the bench measures on: a long source made of the demo documents, in engines whose stores the cache folder keeps.

The source is cut at the lengths that are measured, and each part is a document: so the parts up to a length are the
whole source of that length.
"""

from __future__ import annotations

import random
import re
from itertools import pairwise
from typing import Any

from lloco_engine.demo import documents_folder
from lloco_engine.readers import read_paths
from lloco_engine.tokenizing import encode
from lloco_engine.types import Document

__all__ = ["parts", "source_ids", "source_texts"]

_PARAGRAPHS = re.compile(r"\n\s*\n")


def source_texts() -> list[str]:
    """The texts of the demo documents."""
    return [item.text for item in read_paths([documents_folder()]) if isinstance(item, Document)]


def source_ids(tokenizer: Any, count: int) -> list[int]:
    """``count`` tokens of text: the demo documents, then their paragraphs over and over, in ever another order."""
    texts = source_texts()
    paragraphs = [part for text in texts for part in _PARAGRAPHS.split(text) if part.strip()]
    ids = encode(tokenizer, "\n\n".join(texts))
    turn = 0
    while len(ids) < count:
        turn += 1
        order = random.Random(turn).sample(paragraphs, len(paragraphs))
        ids += encode(tokenizer, "\n\n" + "\n\n".join(order))
    return ids[:count]


def parts(tokenizer: Any, lengths: tuple[int, ...]) -> dict[int, Document]:
    """The source's documents, each by the length that the source has with it.

    Args:
        tokenizer: the decoder's.
        lengths: source lengths in tokens, ascending.
    """
    ids = source_ids(tokenizer, lengths[-1])
    texts = [
        tokenizer.decode(ids[begin:end], clean_up_tokenization_spaces=False) for begin, end in pairwise((0, *lengths))
    ]
    return {length: Document(f"source-{length}", text) for length, text in zip(lengths, texts, strict=True)}
