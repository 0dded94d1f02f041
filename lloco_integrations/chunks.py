"""Chunks of text, from any vector store, to the segments that stand for them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lloco_engine import ConfigError, Document, Engine, Hit, IngestReport, SegmentUnavailable
from lloco_integrations.handle_syntax import neutralise
from lloco_integrations.handles import Handles

__all__ = ["OnMissing", "View", "check_on_missing", "repair", "views"]

OnMissing = Literal["raw", "compress", "error"]


@dataclass(frozen=True)
class View:
    """What a model is shown of one chunk: handles, or its neutralised text where it has no segment (``hits`` empty)."""

    text: str
    hits: tuple[Hit, ...] = ()


def check_on_missing(value: str) -> OnMissing:
    """The value, if it is one; `ConfigError` otherwise."""
    for known in get_args(OnMissing):
        if value == known:
            return known  # type: ignore[no-any-return]
    raise ConfigError(f"on_missing must be one of {', '.join(get_args(OnMissing))}, not {value!r}")


def views(
    engine: Engine,
    texts: Sequence[str],
    *,
    tenant: str = "",
    on_missing: OnMissing = "raw",
    handles: Handles | None = None,
    about: Sequence[Mapping[str, Any]] = (),
    question: str = "",
) -> list[View]:
    """What a model is shown of each chunk.

    A text that the tenant's store knows, as a chunk or as a whole document, is shown as handles to its segments.

    Args:
        engine: whose store is looked in.
        texts: verbatim texts of chunks; white space around them does not count.
        tenant: whose they are.
        on_missing: what becomes of a text that is not known: ``"raw"`` shows the text itself, ``"compress"`` compresses
            it into the store now (all such texts together, in this call), ``"error"`` refuses.
        handles: mints them; by default what all classes on the engine share.
        about: the metadata of each chunk, which says whose a text is that several documents have.
        question: that the chunks were retrieved for.

    Raises:
        SegmentUnavailable: a text is not known, and ``on_missing`` is ``"error"``.
        StoreError: a text could not be compressed into the store.
    """
    handles = Handles.of(engine) if handles is None else handles
    about = about or [{} for _ in texts]
    found = [
        engine.find_text(text, tenant, known) if text.strip() else [] for text, known in zip(texts, about, strict=True)
    ]
    missing = [number for number, hits in enumerate(found) if not hits and texts[number].strip()]
    if missing and on_missing == "error":
        raise SegmentUnavailable(
            f"every chunk must have a segment, and {len(missing)} of {len(texts)} have none, the first being "
            f"{texts[missing[0]][:60]!r}; ingest them, or set on_missing to 'compress' or 'raw'"
        )
    if missing and on_missing == "compress":
        compress(engine, [texts[number] for number in missing], tenant, handles)
        for number in missing:
            found[number] = engine.find_text(texts[number], tenant, about[number])
    return [
        View(handles.mint(hits, question), tuple(hits)) if hits else View(neutralise(text))
        for text, hits in zip(texts, found, strict=True)
    ]


def compress(engine: Engine, texts: Sequence[str], tenant: str, handles: Handles) -> IngestReport:
    """Compress texts into the store, each as a document named by its hash; one caller at a time.

    Raises:
        SegmentUnavailable: the engine refused one of them.
    """
    names = ["text:" + hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:32] for text in texts]
    documents = {name: Document(name, text, tenant=tenant) for name, text in zip(names, texts, strict=True)}
    with handles.compressing:
        report = engine.ingest(documents.values(), tenant=tenant)
    if report.failed:
        raise SegmentUnavailable(f"a chunk cannot be compressed: {report.failed[0].reason}")
    return report


def repair(engine: Engine, hits: Sequence[Hit], tenant: str, handles: Handles) -> None:
    """Make the damaged segments of some hits again. No document is added to the store."""
    for doc_id in compress(engine, [hit.text for hit in hits], tenant, handles).added:
        engine.delete(doc_id, tenant)  # the segment stays, for it is the hit's document's too
