"""Documents that were read before from what was read now, and are no longer there."""

from __future__ import annotations

import os
from collections.abc import Iterable

from lloco_engine.documents import Place, file_of, is_gone, is_record
from lloco_engine.errors import NotInStore
from lloco_engine.readers import Area, Identities
from lloco_engine.store import Store
from lloco_engine.types import Failure

__all__ = ["find_vanished", "prune"]


def find_vanished(
    store: Store, tenant: str, areas: Iterable[Area], met: Identities
) -> tuple[list[Place], list[Place], list[Failure]]:
    """A tenant's documents that have vanished: their file lay in a folder that was read and is gone, or their record
    is no longer in its file. Documents of other places, and those that did not come from a file, never have.

    A file or folder that is there but could not be read, or read whole, tells nothing of what it held.

    Args:
        store: whose documents are looked at.
        tenant: whose they are.
        areas: what was read.
        met: the documents of the run, which are there.

    Returns:
        those that have vanished; those of them that may be removed; and why the others may not: a folder in which no
        file is left may be a disk that is not mounted.
    """
    vanished: dict[str, Place] = {}
    kept: dict[str, Place] = {}
    doubts: list[Failure] = []
    for area in areas:
        if not area.whole or not os.path.exists(file_of(area.origin)):
            continue
        held = store.places(tenant, below=f"{area.origin}#" if area.records else f"{area.origin.rstrip('/')}/")
        gone = {
            place.doc_id: place
            for place in held
            if not met.has(tenant, place.doc_id) and (area.records or is_gone(place.origin))
        }
        vanished |= gone
        if gone and not area.files:
            kept |= gone
            reason = (
                f"a folder is pruned only where a file is left in it, for it may be a disk that is not mounted, and "
                f"this one holds none of {len(gone)}: they were kept; remove them by their ids if they are to go"
            )
            doubts.append(Failure(area.source, reason))
    return list(vanished.values()), [place for key, place in vanished.items() if key not in kept], doubts


def prune(store: Store, tenant: str, places: Iterable[Place]) -> list[str]:
    """Remove documents that have vanished, one by one, but for those that were read from elsewhere meanwhile.

    Returns:
        the ids of those that were removed.

    Raises:
        StoreLocked: another writer holds the store.
    """
    removed = []
    for place in places:
        with store.writer(publish=False) as writer:
            try:
                back = not is_record(place.origin) and not is_gone(place.origin)
                if not back and place in store.places(tenant, doc_id=place.doc_id):
                    writer.delete_document(place.doc_id, tenant)
                    removed.append(place.doc_id)
            except NotInStore:
                continue
    return removed
