"""Lists in pages, as the API has them: what comes after an id, so many, in an order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import Depends, Query

from lloco_engine.serve.errors import not_found

__all__ = ["Page", "page_of"]


@dataclass(frozen=True)
class _Page:
    limit: int
    order: str
    after: str | None
    before: str | None


async def _asked(
    limit: Annotated[int, Query(ge=1, le=10_000, description="How many.")] = 100,
    order: Annotated[Literal["asc", "desc"], Query(description="By time; desc: newest first.")] = "desc",
    after: Annotated[str | None, Query(description="Id of the last one of the page before.")] = None,
    before: Annotated[str | None, Query(description="Id of the first one of the page after.")] = None,
) -> _Page:
    return _Page(limit, order, after, before)


Page = Annotated[_Page, Depends(_asked)]


def page_of(newest_first: Sequence[dict[str, Any]], page: _Page) -> dict[str, Any]:
    """One page of a list.

    Raises:
        APIError: the list has no such id to begin after.
    """
    rows = list(newest_first) if page.order == "desc" else list(reversed(newest_first))
    if page.after is not None:
        rows = rows[_place(rows, page.after, "after") + 1 :]
    if page.before is not None:
        rows = rows[: _place(rows, page.before, "before")]
    shown = rows[: page.limit]
    ends = {"first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
    return {"object": "list", "data": shown, "has_more": len(rows) > len(shown), **ends}


def _place(rows: Sequence[dict[str, Any]], wanted: str, param: str) -> int:
    place = next((number for number, row in enumerate(rows) if row["id"] == wanted), None)
    if place is None:
        raise not_found("entry", wanted, "leave it out to begin at the first", param)
    return place
