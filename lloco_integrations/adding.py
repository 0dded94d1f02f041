"""Documents of a framework into the store: what cannot be used is named, and never keeps the others out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from lloco_engine import Document, DocumentError, Engine, Failure

__all__ = ["ingest_all"]


def ingest_all(engine: Engine, items: Sequence[Document | Failure], tenant: str) -> list[str]:
    """Ingest a batch, with a warning that names what could not be used.

    Args:
        engine: whose store is written.
        items: documents, and what could not even be made one, by id.
        tenant: whose they are.

    Returns:
        the ids of the documents that are in the store now, in the order given, each once.

    Raises:
        DocumentError: none of them could be used, and not because they were blank; names them.
        StoreError: as `Engine.ingest`.
    """
    documents = [item for item in items if isinstance(item, Document)]
    report = engine.ingest(documents, tenant=tenant)
    stored = {*report.added, *report.replaced, *report.unchanged, *report.repaired}
    failed = [*(item for item in items if isinstance(item, Failure)), *report.failed]
    if failed:
        reasons = "; ".join(f"{one.doc_id or one.source}: {one.reason}" for one in failed)
        message = f"{len(failed)} of {len(items)} documents could not be added: {reasons}"
        blank = sum(not document.text.strip() for document in documents)
        if not stored and len(failed) > blank:
            raise DocumentError(message)
        warnings.warn(message, UserWarning, stacklevel=3)
    return [doc_id for doc_id in dict.fromkeys(document.doc_id for document in documents) if doc_id in stored]
