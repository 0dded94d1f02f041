"""Groups of documents as vector stores: a group may have any name, an id stands in addresses and documents' names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from lloco_engine.adapters.loading import DEFAULT
from lloco_engine.adapters.routing import GROUP

__all__ = ["group_of", "id_of", "named_in", "of_store"]


def id_of(group: str) -> str:
    """The vector store's id: the name, with whatever is no letter, digit, ``-`` or ``_`` as percent signs and hex."""
    return re.sub(r"[^\w-]", lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode()), group)


def group_of(store_id: str) -> str:
    """The name of the group whose id this is."""
    return unquote(store_id)


def named_in(metadata: Mapping[str, Any]) -> str:
    """The id of the vector store that a document of this metadata is in."""
    return id_of(str(metadata.get(GROUP) or DEFAULT))


def of_store(store_id: str) -> dict[str, Any]:
    """A filter: whether a document is in a vector store; those that name no group are in ``default``."""
    if store_id != DEFAULT:
        return {GROUP: group_of(store_id)}
    return {"$or": [{GROUP: DEFAULT}, {GROUP: {"$exists": False}}]}
