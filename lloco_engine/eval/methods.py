"""What the decoder is given to read before a question, by each method that is compared (`reading` makes the prompts).

==============================  =======================================================================================
none                            nothing
full                            the text of all chunks, as far as it fits the window: both ends are kept
text_slots                      the passages of a search window's size that search finds, as many tokens of text as
                                ``kv`` has slots
kv                              the segments of all chunks, of whichever kind the compressor makes
kv_guided                       the same, as an engine reads whole documents: what search thinks of each weighs in where
                                queries choose among them
kvzip, snapkv                   the same, the KV cache evicted by another's rule at the same ratio, nothing fitted
kv_retrieved, kvzip_retrieved,  the segments of the ``top_k`` chunks that search finds, as an engine reads them
snapkv_retrieved
text_retrieved                  the text of the same chunks, best first
text_slots_retrieved            the passages that search finds, as many tokens of text as ``kv_retrieved`` has slots
==============================  =======================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["METHODS", "Method", "Row"]


@dataclass(frozen=True)
class Method:
    """How a prompt is made.

    Args:
        name: as in the table above.
        memory: ``"none"``, ``"text"``, ``"slots"`` (as much text as a memory has slots) or a kind of compressor.
        retrieved: read the best chunks only.
        guided: read every chunk as an engine reads whole documents, where search weighs in.
    """

    name: str
    memory: str
    retrieved: bool = False
    guided: bool = False

    @property
    def by_ratio(self) -> bool:
        """Whether there is a row for each ratio."""
        return self.memory not in ("none", "text")

    @property
    def searches(self) -> bool:
        """Whether search has a say, whose windows then give hints."""
        return self.retrieved or self.guided or self.memory == "slots"

    @property
    def compresses(self) -> bool:
        """Whether segments are read."""
        return self.memory not in ("none", "text", "slots")


METHODS = {
    method.name: method
    for method in (
        Method("none", "none"),
        Method("full", "text"),
        Method("text_retrieved", "text", retrieved=True),
        Method("text_slots", "slots"),
        Method("text_slots_retrieved", "slots", retrieved=True),
        Method("kv_guided", "kv", guided=True),
        *(
            Method(kind + ("_retrieved" if retrieved else ""), kind, retrieved)
            for kind in ("kv", "kvzip", "snapkv")
            for retrieved in (False, True)
        ),
    )
}


@dataclass(frozen=True)
class Row:
    """What a row of the result is about."""

    method: str
    ratio: float | None
    adapter: str

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; a whole ratio without its point."""
        ratio = None if self.ratio is None else int(self.ratio) if self.ratio == int(self.ratio) else self.ratio
        return {"method": self.method, "ratio": ratio, "adapter": self.adapter}
