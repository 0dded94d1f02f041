"""What the catalogue's table of words holds: the terms of each search window.

A row's text is ``window_terms(tenant of the document, text of the window)`` and nothing else, so it can be made again
from documents, chunks and windows, and compared with them. FTS5 cuts it at the spaces between terms and changes nothing
(tokenizer ``ascii``): what a word is, `lloco_engine.keyword_score.words` says, for windows and questions alike.

A term names its tenant, so that looking a word up reads and counts one tenant's windows, however many others have it.
"""

from __future__ import annotations

import hashlib
import sqlite3

from lloco_engine.keyword_score import words

__all__ = ["add_words", "term", "window_terms"]

_JOINT = "·"  # FTS5's ascii tokenizer takes whatever is not ASCII for a letter, and no word has it


def term(tenant: str, word: str) -> str:
    """A word of a tenant. Bare for the tenant of stores that have one; else behind 12 hex digits of the tenant's."""
    return _mark(tenant) + word


def window_terms(tenant: str, text: str) -> str:
    """The terms of a window's text, each once, between spaces. Also a function of SQL on a catalogue's connections."""
    mark = _mark(tenant)
    return " ".join(mark + word for word in words(text))


def add_words(connection: sqlite3.Connection, doc_key: int | None = None) -> None:
    """Fill the table of words for the windows of one document, or of all, none of which has its words yet."""
    connection.execute(
        "INSERT INTO words (rowid, text)"
        " SELECT w.window_id, window_terms(d.tenant, substr(c.text, w.start - c.start + 1, w.end - w.start))"
        " FROM windows w JOIN chunks c USING (chunk_key) JOIN documents d USING (doc_key)"
        " WHERE ?1 IS NULL OR d.doc_key = ?1",
        (doc_key,),
    )


def _mark(tenant: str) -> str:
    return hashlib.sha256(tenant.encode("utf-8", "surrogatepass")).hexdigest()[:12] + _JOINT if tenant else ""
