"""Chunks that a caller holds already, looked up again: by the hit that was retrieved, or by their text.

What a caller gives back is not believed. It says which chunk is meant; what the chunk is, the catalogue says.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lloco_engine.store.catalogue import Catalogue
from lloco_engine.store.schema import text_hash
from lloco_engine.types import Hit, Span

__all__ = ["ALSO", "current", "hits_of_text", "neighbours", "share"]

ALSO = 16  # documents with the same text that are named: a boilerplate page may be in thousands


def current(catalogue: Catalogue, hit: Hit) -> Hit | None:
    """A hit as the catalogue has it now, with the score and the windows that it was found by.

    None where its document was deleted since, or replaced by one without this text.
    """
    found = catalogue.find_hits(
        "d.tenant = ? AND d.doc_id = ? AND c.segment_id = ? ORDER BY c.ordinal = ? DESC, c.ordinal LIMIT 1",
        (hit.tenant, hit.doc_id, hit.segment_id, hit.ordinal),
    )
    if not found:  # its segment was replaced by a better one of the same text
        here = (hit.tenant, hit.doc_id, hit.ordinal)
        found = catalogue.find_hits("d.tenant = ? AND d.doc_id = ? AND c.ordinal = ?", here)
    if not found or (found[0].segment_id != hit.segment_id and found[0].text != hit.text):
        return None
    (now,) = found
    moved = now.span.start - hit.span.start
    windows = (Span(window.start + moved, window.end + moved) for window in hit.windows)
    inside = tuple(each for each in windows if now.span.start <= each.start < each.end <= now.span.end)
    score = min(1.0, max(-1.0, hit.score)) if math.isfinite(hit.score) else 0.0
    others = _ids_with(catalogue, now.segment_id, hit.tenant, hit.also_in) if hit.also_in else ()
    return replace(now, score=score, windows=inside, also_in=others)


def neighbours(catalogue: Catalogue, hit: Hit, n: int) -> list[Hit]:
    """Up to ``n`` chunks before and after a hit in its document, score 0.0; none when that was replaced or deleted."""
    state = catalogue.document_state(hit.doc_id, hit.tenant)
    if state is None or state[2] != hit.version:
        return []
    around = catalogue.hits(state[0], hit.ordinal - n, hit.ordinal + n, score=0.0)
    return [other for other in around if other.ordinal != hit.ordinal]


def _ids_with(catalogue: Catalogue, segment_id: str, tenant: str, doc_ids: Sequence[str]) -> tuple[str, ...]:
    """Those of some documents that have a segment."""
    rows = catalogue.connection.execute(
        "SELECT d.doc_id FROM chunks c JOIN documents d USING (doc_key) WHERE c.segment_id = ? AND d.tenant = ?",
        (segment_id, tenant),
    )
    having = {doc_id for (doc_id,) in rows}
    return tuple(doc_id for doc_id in doc_ids[:ALSO] if doc_id in having)


def share(hit: Hit, doc_ids: Sequence[str]) -> Hit:
    """The hit, naming other documents that have its text."""
    others = tuple(dict.fromkeys(doc_id for doc_id in doc_ids if doc_id != hit.doc_id))
    return replace(hit, also_in=others[:ALSO]) if others else hit


def hits_of_text(catalogue: Catalogue, text: str, tenant: str, about: Mapping[str, Any] | None = None) -> list[Hit]:
    """What a tenant has of exactly this text: the chunk, else all chunks of the document, in order, score 1.0.

    Where several documents have it, it is the one of which ``about`` says most (the oldest of those that it says as
    much of), and the others are named in ``also_in``.

    Args:
        catalogue: in a transaction.
        text: of a chunk, white space around it aside, or of a whole document.
        tenant: whose.
        about: what is known of where the text comes from: metadata, under whatever names. A value that is a document's
            id, source or title speaks for it, as does one that its metadata has under the same name.
    """
    chunks = catalogue.connection.execute(
        "SELECT c.chunk_key, d.doc_id, d.source, d.title, d.metadata FROM chunks c JOIN documents d USING (doc_key)"
        " WHERE c.text_hash = ? AND d.tenant = ? ORDER BY c.chunk_key",
        (text_hash(text), tenant),
    ).fetchall()
    if chunks:
        row = _best(chunks, about)
        return [share(catalogue.chunk_hit(row[0], 1.0, ()), [each[1] for each in chunks])]
    documents = catalogue.connection.execute(
        "SELECT doc_key, doc_id, source, title, metadata FROM documents WHERE tenant = ? AND content_hash = ?"
        " ORDER BY doc_key",
        (tenant, hashlib.sha256(text.encode("utf-8")).hexdigest()),
    ).fetchall()
    if not documents:
        return []
    row = _best(documents, about)
    return [share(hit, [each[1] for each in documents]) for hit in catalogue.hits(row[0])]


def _best(rows: Sequence[Sequence[Any]], about: Mapping[str, Any] | None) -> Sequence[Any]:
    """Of rows of key, id, source, title and metadata, the first that most is said of."""
    if len(rows) == 1 or not about:
        return rows[0]
    said = {value for value in about.values() if isinstance(value, str) and value}

    def agreement(row: Sequence[Any]) -> tuple[int, int]:
        metadata: dict[str, Any] = json.loads(row[4])
        names = sum(name in said for name in row[1:4])
        return names, sum(key in metadata and metadata[key] == value for key, value in about.items())

    return max(rows, key=agreement)  # max gives the first of equals
