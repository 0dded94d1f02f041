"""What a search found, by segment: a small window finds, and the segment that it points to is the hit."""

from __future__ import annotations

from dataclasses import dataclass, field

from lloco_engine.filters import Filter
from lloco_engine.store import lookup
from lloco_engine.store.catalogue import Catalogue
from lloco_engine.store.index import Query, SearchIndex
from lloco_engine.types import Hit, Span

__all__ = ["search_segments"]


def search_segments(
    catalogue: Catalogue,
    index: SearchIndex,
    query: Query,
    *,
    top_k: int,
    tenant: str,
    wanted: Filter,
    min_score: float,
) -> list[Hit]:
    """Segments of a tenant by their best search window, best first, as `Store.search` says; inside a transaction."""
    width = max(32, 4 * top_k)
    while True:
        found, reachable = index.search(catalogue, query, width, tenant, wanted)
        kept = [(window, score) for window, score in found if score >= min_score]
        groups = _by_segment(catalogue, kept)
        if len(groups) >= top_k or width >= reachable or len(kept) < len(found):
            return [group.hit(catalogue) for group in groups[:top_k]]
        width *= 4


@dataclass
class _Group:
    """The windows of one segment that a search found: those of the best chunk, and the other chunks that have it."""

    chunk_key: int
    score: float
    windows: list[Span] = field(default_factory=list)
    others: dict[int, None] = field(default_factory=dict)

    def hit(self, catalogue: Catalogue) -> Hit:
        found = catalogue.chunk_hit(self.chunk_key, self.score, tuple(self.windows))
        if not self.others:
            return found
        return lookup.share(
            found, [catalogue.chunk_hit(key, 0.0, ()).doc_id for key in list(self.others)[: lookup.ALSO]]
        )


def _by_segment(catalogue: Catalogue, found: list[tuple[int, float]]) -> list[_Group]:
    """The windows that were found, by segment, in the order of ``found``."""
    homes = catalogue.window_homes([window for window, _ in found])
    groups: dict[str, _Group] = {}
    for window, score in found:
        chunk_key, segment_id, span = homes[window]
        group = groups.setdefault(segment_id, _Group(chunk_key, score))
        if group.chunk_key == chunk_key:
            group.windows.append(span)
        else:
            group.others[chunk_key] = None
    return list(groups.values())
