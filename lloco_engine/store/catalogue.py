"""The catalogue: one SQLite file that is the truth about documents, chunks, search windows and their vectors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from lloco_engine.documents import Place
from lloco_engine.errors import NotInStore
from lloco_engine.filters import Filter
from lloco_engine.store.database import Database
from lloco_engine.store.records import DocumentInfo
from lloco_engine.store.seals import unsound
from lloco_engine.store.terms import term
from lloco_engine.store.where import Where, where
from lloco_engine.types import Document, Hit, Page, Span

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Catalogue", "missing_document"]

_HIT = """
    SELECT c.segment_id, d.doc_id, c.ordinal, c.start, c.end, c.text, c.source_tokens, d.title, d.source, d.metadata,
           d.tenant, d.version, s.slots,
           (SELECT json_group_array(json_array(number, label, start, end)) FROM (
                SELECT number, label, start, end FROM pages p
                WHERE p.doc_key = d.doc_key AND p.start < c.end AND c.start < p.end ORDER BY number))
    FROM chunks c JOIN documents d USING (doc_key) JOIN segments s USING (segment_id)
"""
_INFO = """
    SELECT d.doc_id, d.tenant, d.title, d.source, d.metadata, d.version, d.content_hash, d.chars, d.source_tokens,
           count(*), sum((SELECT count(*) FROM windows w WHERE w.chunk_key = c.chunk_key)), sum(s.slots),
           sum(s.bytes), d.compress_s, d.ingested_at, d.origin, d.encoding,
           (SELECT count(*) FROM pages p WHERE p.doc_key = d.doc_key)
    FROM documents d JOIN chunks c USING (doc_key) JOIN segments s USING (segment_id)
"""


class Catalogue(Database):
    """Every question that the store asks of ``catalogue.sqlite``, each inside a transaction."""

    def generation(self) -> int:
        """How many commits have changed a document."""
        return int(self.connection.execute("SELECT number FROM generation").fetchone()[0])

    def document_state(self, doc_id: str, tenant: str) -> tuple[int, str, int] | None:
        """Key, content hash and version of a document; None when there is none."""
        row = self.connection.execute(
            "SELECT doc_key, content_hash, version FROM documents WHERE tenant = ? AND doc_id = ?", (tenant, doc_id)
        ).fetchone()
        return None if row is None else (int(row[0]), str(row[1]), int(row[2]))

    def is_sound(self, doc_key: int) -> bool:
        """Whether all that is said of a document and its segments is what was written there."""
        if unsound(self.connection, "documents", doc_key):
            return False
        used = self.connection.execute("SELECT DISTINCT segment_id FROM chunks WHERE doc_key = ?", (doc_key,))
        return not any(unsound(self.connection, "segments", segment_id) for (segment_id,) in used.fetchall())

    def doc_key(self, doc_id: str, tenant: str) -> int:
        """Key of a document; `NotInStore` when there is none."""
        state = self.document_state(doc_id, tenant)
        if state is None:
            raise NotInStore(missing_document(doc_id, tenant))
        return state[0]

    def infos(self, tenant: str | None = None, doc_id: str | None = None) -> list[DocumentInfo]:
        """Documents by tenant and id; of all tenants when ``tenant`` is None."""
        wanted = {"tenant": tenant, "doc_id": doc_id}
        terms = [f"d.{name} = :{name}" for name, value in wanted.items() if value is not None]
        where = f" WHERE {' AND '.join(terms)}" if terms else ""
        rows = self.connection.execute(f"{_INFO}{where} GROUP BY d.doc_key ORDER BY d.tenant, d.doc_id", wanted)
        return [_info(row) for row in rows]

    def places(
        self,
        tenant: str,
        *,
        doc_id: str | None = None,
        origin: str | None = None,
        content_hash: str | None = None,
        below: str | None = None,
    ) -> list[Place]:
        """Where a tenant's documents came from, oldest first: all, or those with this id, origin or text, or those
        whose origin begins with ``below``."""
        wanted = {"tenant": tenant, "doc_id": doc_id, "origin": origin, "content_hash": content_hash}
        terms = [f"{name} = :{name}" for name, value in wanted.items() if value is not None]
        if below is not None:  # by the index, which LIKE would not use
            terms.append("origin >= :below AND origin < :beyond")
            wanted |= {"below": below, "beyond": below[:-1] + chr(ord(below[-1]) + 1)}
        rows = self.connection.execute(
            f"SELECT doc_id, origin, source, content_hash FROM documents WHERE {' AND '.join(terms)} ORDER BY doc_key",
            wanted,
        )
        return [Place(*row) for row in rows]

    def text(self, doc_key: int) -> str:
        """The whole text of a document."""
        rows = self.connection.execute("SELECT text FROM chunks WHERE doc_key = ? ORDER BY ordinal", (doc_key,))
        return "".join(text for (text,) in rows)

    def hits(self, doc_key: int, first: int = 0, last: int | None = None, *, score: float = 1.0) -> list[Hit]:
        """Chunks of a document with ``first <= ordinal <= last``, in order."""
        rows = self.connection.execute(
            f"{_HIT} WHERE c.doc_key = ? AND c.ordinal BETWEEN ? AND ? ORDER BY c.ordinal",
            (doc_key, first, 2**62 if last is None else last),
        )
        return [_hit(row, score, ()) for row in rows]

    def chunk_hit(self, chunk_key: int, score: float, windows: tuple[Span, ...]) -> Hit:
        """One chunk as a search result."""
        row = self.connection.execute(f"{_HIT} WHERE c.chunk_key = ?", (chunk_key,)).fetchone()
        return _hit(row, score, windows)

    def find_hits(self, condition: str, values: Sequence[Any]) -> list[Hit]:
        """Chunks ``c`` of documents ``d`` that meet a condition in SQL, score 1.0."""
        return [_hit(row, 1.0, ()) for row in self.connection.execute(f"{_HIT} WHERE {condition}", values)]

    def hits_of_segment(self, segment_id: str, tenant: str) -> list[Hit]:
        """Every chunk of a tenant that a segment stands for, oldest first."""
        return self.find_hits("c.segment_id = ? AND d.tenant = ? ORDER BY c.chunk_key", (segment_id, tenant))

    def earlier(self, segment_id: str, doc_id: str, tenant: str) -> list[Hit]:
        """The chunks that a segment builds on, first to last, score 0.0; those of the document where it has them."""
        rows = self.connection.execute(
            "WITH RECURSIVE chain (segment_id, back) AS ("
            " SELECT previous, 1 FROM segments WHERE segment_id = ? AND previous IS NOT NULL"
            " UNION ALL SELECT s.previous, back + 1 FROM chain JOIN segments s USING (segment_id)"
            " WHERE s.previous IS NOT NULL)"
            " SELECT segment_id FROM chain ORDER BY back DESC",
            (segment_id,),
        ).fetchall()
        found = []
        for (needed,) in rows:
            row = self.connection.execute(
                f"{_HIT} WHERE c.segment_id = ? AND d.tenant = ? ORDER BY d.doc_id = ? DESC, c.chunk_key LIMIT 1",
                (needed, tenant, doc_id),
            ).fetchone()
            found.append(_hit(row, 0.0, ()))
        return found

    def window_homes(self, window_ids: Sequence[int]) -> dict[int, tuple[int, str, Span]]:
        """Chunk key, segment id and span of each window."""
        rows = self._by_ids(
            "SELECT w.window_id, c.chunk_key, c.segment_id, w.start, w.end"
            " FROM windows w JOIN chunks c USING (chunk_key) WHERE w.window_id",
            window_ids,
        )
        return {row[0]: (row[1], row[2], Span(row[3], row[4])) for row in rows}

    def window_ids(self) -> list[int]:
        """Ids of all windows, ascending."""
        return [row[0] for row in self.connection.execute("SELECT window_id FROM windows ORDER BY window_id")]

    def allowed_window_ids(self, wanted: Where) -> list[int]:
        """Ids of the windows of the documents that meet a filter, ascending."""
        rows = self.connection.execute(
            "SELECT w.window_id FROM documents d JOIN chunks c USING (doc_key) JOIN windows w USING (chunk_key)"
            f" WHERE {wanted.sql} ORDER BY w.window_id",
            wanted.values,
        )
        return [row[0] for row in rows]

    def doc_ids(self, tenant: str, wanted: Filter) -> list[str]:
        """Ids of a tenant's documents that a filter lets through, in order."""
        term = where(tenant, wanted)
        rows = self.connection.execute(f"SELECT doc_id FROM documents d WHERE {term.sql} ORDER BY doc_id", term.values)
        return [row[0] for row in rows]

    def documents(self, doc_ids: Sequence[str], tenant: str) -> dict[str, Document]:
        """Whole documents of a tenant by their ids, in no order; those that are not there are left out."""
        rows = self._by_ids(
            "SELECT doc_key, doc_id, title, source, metadata, private, origin, encoding FROM documents"
            " WHERE tenant = ? AND doc_id",
            doc_ids,
            tenant,
        )
        kept = {row[0]: row[1:] for row in rows}
        texts: dict[int, list[str]] = {}
        chunks = self._by_ids("SELECT doc_key, ordinal, text FROM chunks WHERE doc_key", list(kept))
        for doc_key, _, text in sorted(chunks):
            texts.setdefault(doc_key, []).append(text)
        pages: dict[int, list[Page]] = {}
        numbered = self._by_ids("SELECT doc_key, number, label, start, end FROM pages WHERE doc_key", list(kept))
        for doc_key, number, label, start, end in sorted(numbered):
            pages.setdefault(doc_key, []).append(Page(number, label, Span(start, end)))
        return {
            doc_id: Document(
                doc_id=doc_id,
                text="".join(texts[doc_key]),
                title=title,
                source=source,
                metadata=json.loads(metadata),
                tenant=tenant,
                private=json.loads(private),
                pages=tuple(pages.get(doc_key, ())),
                encoding=encoding,
                origin=origin,
            )
            for doc_key, (doc_id, title, source, metadata, private, origin, encoding) in kept.items()
        }

    def window_ids_with(self, word: str, tenant: str, most: int) -> npt.NDArray[np.int64] | None:
        """Ids of a tenant's windows that have a word, as `keyword_score.words` gives it; None when over ``most``."""
        import numpy as np

        count, ids = self.connection.execute(  # one row, for hundreds of rows take longer than the look-up
            "SELECT count(*), group_concat(rowid) FROM (SELECT rowid FROM words WHERE words MATCH ? LIMIT ?)",
            (f'"{term(tenant, word)}"', most + 1),
        ).fetchone()
        return np.fromstring(ids or "", np.int64, sep=",") if count <= most else None

    def vectors(self, window_ids: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Id and float32 vector of each window."""
        return self._by_ids("SELECT window_id, vector FROM windows WHERE window_id", window_ids)

    def segment_rows(self, segment_ids: Sequence[str] | None = None) -> dict[str, tuple[int, str]]:
        """Size of the file and checksum of these segments, or of every one that a document refers to."""
        query = "SELECT segment_id, bytes, checksum FROM segments"
        rows = (
            self.connection.execute(query)
            if segment_ids is None
            else self._by_ids(f"{query} WHERE segment_id", segment_ids)
        )
        return {row[0]: (row[1], row[2]) for row in rows}

    def counts(self) -> dict[str, Any]:
        """Totals over all tenants, as `Store.stats` names them, and ``segment_bytes``."""
        documents, seconds = self.connection.execute(
            "SELECT count(*), coalesce(sum(compress_s), 0.0) FROM documents"
        ).fetchone()
        segments, slots, source_tokens, size = self.connection.execute(
            "SELECT count(*), coalesce(sum(slots), 0), coalesce(sum(source_tokens), 0), coalesce(sum(bytes), 0)"
            " FROM segments"
        ).fetchone()
        windows = self.connection.execute("SELECT count(*) FROM windows").fetchone()[0]
        return {
            "documents": documents,
            "segments": segments,
            "windows": windows,
            "slots": slots,
            "source_tokens": source_tokens,
            "compress_s": seconds,
            "segment_bytes": size,
        }

    def users_of(self, segment_id: str) -> tuple[str, ...]:
        """Ids of the documents that refer to a segment."""
        rows = self.connection.execute(
            "SELECT DISTINCT d.doc_id FROM chunks c JOIN documents d USING (doc_key) WHERE c.segment_id = ? ORDER BY 1",
            (segment_id,),
        )
        return tuple(row[0] for row in rows)

    def index_file(self) -> tuple[int, int, int, str] | None:
        """Generation, windows, bytes and checksum of the search index on disk; None when there is none."""
        return self.connection.execute(  # type: ignore[no-any-return]
            "SELECT generation, windows, bytes, checksum FROM index_file ORDER BY generation DESC LIMIT 1"
        ).fetchone()

    def _by_ids(self, query: str, ids: Sequence[int] | Sequence[str], *before: str) -> Iterator[Any]:
        """Rows of a query that ends with the column of the ids; ``before`` are its parameters so far."""
        for at in range(0, len(ids), 500):  # SQLite limits the parameters of one statement
            part = ids[at : at + 500]
            yield from self.connection.execute(f"{query} IN ({','.join('?' * len(part))})", (*before, *part))


def missing_document(doc_id: str, tenant: str) -> str:
    """What to say where a tenant has no such document."""
    of = f" of tenant {tenant!r}" if tenant else ""
    return f"the store holds no document {doc_id!r}{of}"


def _info(row: Sequence[Any]) -> DocumentInfo:
    names = (f.name for f in fields(DocumentInfo))  # in the order of _INFO
    info = dict(zip(names, row, strict=True))
    return DocumentInfo(**info | {"metadata": json.loads(info["metadata"])})


def _hit(row: Sequence[Any], score: float, windows: tuple[Span, ...]) -> Hit:
    return Hit(
        segment_id=row[0],
        doc_id=row[1],
        ordinal=row[2],
        span=Span(row[3], row[4]),
        text=row[5],
        source_tokens=row[6],
        score=score,
        windows=windows,
        title=row[7],
        source=row[8],
        metadata=json.loads(row[9]),
        tenant=row[10],
        version=row[11],
        slots=row[12],
        pages=tuple(Page(number, label, Span(start, end)) for number, label, start, end in json.loads(row[13])),
    )
