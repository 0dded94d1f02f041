"""The catalogue's tables, as numbered migrations. ``PRAGMA user_version`` is the number of the last one applied.

A migration, once released, is never edited: stores out there have run it. Append another.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable

from lloco_engine.errors import StoreMismatch
from lloco_engine.store.legacy_metadata import private_part, public_part
from lloco_engine.store.seals import doubts, seal_all
from lloco_engine.store.terms import window_terms
from lloco_engine.store.values import metadata_rows
from lloco_engine.store.where import fold

__all__ = ["APPLICATION_ID", "FUNCTIONS", "MIGRATIONS", "check_version", "is_latest", "migrate", "text_hash"]

APPLICATION_ID = 0x4C4C6F43  # "LLoC", in the header of the file

MIGRATIONS: tuple[str, ...] = (
    # 1: first release
    """
    CREATE TABLE documents (
        doc_key       INTEGER PRIMARY KEY AUTOINCREMENT,
        tenant        TEXT NOT NULL,
        doc_id        TEXT NOT NULL,
        title         TEXT NOT NULL,
        source        TEXT NOT NULL,
        metadata      TEXT NOT NULL,     -- JSON object, as given
        version       INTEGER NOT NULL,
        content_hash  TEXT NOT NULL,     -- SHA-256 of the text, which is the chunks' texts one after another
        windows_hash  TEXT NOT NULL,     -- SHA-256 of the search windows' spans and vectors, in order
        chars         INTEGER NOT NULL,
        source_tokens INTEGER NOT NULL,
        compress_s    REAL NOT NULL,
        ingested_at   TEXT NOT NULL,
        UNIQUE (tenant, doc_id)
    );
    CREATE TABLE metadata (              -- the same metadata, one row a key, for filters
        doc_key INTEGER NOT NULL REFERENCES documents ON DELETE CASCADE,
        key     TEXT NOT NULL,
        value   TEXT NOT NULL,           -- type and value: s:text, n:number, b:true
        PRIMARY KEY (doc_key, key)
    ) WITHOUT ROWID;
    CREATE INDEX metadata_by_value ON metadata (key, value);
    CREATE TABLE segments (
        segment_id    TEXT PRIMARY KEY,
        slots         INTEGER NOT NULL,
        source_tokens INTEGER NOT NULL,
        bytes         INTEGER NOT NULL,
        checksum      TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE chunks (
        chunk_key     INTEGER PRIMARY KEY AUTOINCREMENT,
        doc_key       INTEGER NOT NULL REFERENCES documents ON DELETE CASCADE,
        ordinal       INTEGER NOT NULL,
        start         INTEGER NOT NULL,  -- characters of the document, half open
        end           INTEGER NOT NULL,
        source_tokens INTEGER NOT NULL,
        segment_id    TEXT NOT NULL REFERENCES segments,
        text          TEXT NOT NULL,
        UNIQUE (doc_key, ordinal)
    );
    CREATE INDEX chunks_by_segment ON chunks (segment_id);
    CREATE TABLE windows (               -- an id is never used again, so an index may lag behind
        window_id INTEGER PRIMARY KEY AUTOINCREMENT,
        chunk_key INTEGER NOT NULL REFERENCES chunks ON DELETE CASCADE,
        start     INTEGER NOT NULL,
        end       INTEGER NOT NULL,
        vector    BLOB NOT NULL          -- float32, little endian, L2-normalised
    );
    CREATE INDEX windows_by_chunk ON windows (chunk_key);
    CREATE TABLE generation (            -- one row: counts the commits that changed a document
        number INTEGER NOT NULL
    );
    INSERT INTO generation VALUES (0);
    CREATE TABLE index_file (            -- at most one row: the search index on disk
        generation INTEGER NOT NULL,
        windows    INTEGER NOT NULL,
        bytes      INTEGER NOT NULL,
        checksum   TEXT NOT NULL
    );
    """,
    # 2: chunks and documents are found by their text
    """
    ALTER TABLE chunks ADD COLUMN text_hash TEXT NOT NULL DEFAULT '';  -- as `text_hash` below gives it
    UPDATE chunks SET text_hash = text_hash(text);
    CREATE INDEX chunks_by_text ON chunks (text_hash);
    CREATE INDEX documents_by_content ON documents (tenant, content_hash);
    """,
    # 3: a segment may build on the one before it in its document
    """
    ALTER TABLE segments ADD COLUMN previous TEXT REFERENCES segments DEFERRABLE INITIALLY DEFERRED;
    CREATE INDEX segments_by_previous ON segments (previous);
    """,
    # 4: search windows are found by their words
    """
    CREATE VIRTUAL TABLE words USING fts5 (text, columnsize = 0);  -- rowid: the window's id
    INSERT INTO words (rowid, text)
        SELECT w.window_id, substr(c.text, w.start - c.start + 1, w.end - w.start)
        FROM windows w JOIN chunks c USING (chunk_key);
    CREATE TRIGGER words_of_new_window AFTER INSERT ON windows BEGIN
        INSERT INTO words (rowid, text)
            SELECT new.window_id, substr(c.text, new.start - c.start + 1, new.end - new.start)
            FROM chunks c WHERE c.chunk_key = new.chunk_key;
    END;
    CREATE TRIGGER words_of_gone_window AFTER DELETE ON windows BEGIN
        DELETE FROM words WHERE rowid = old.window_id;
    END;
    """,
    # 5: adapters are rows; those that a store kept in files alone answered for every tenant, and still do
    """
    CREATE TABLE adapters (
        tenant  TEXT NOT NULL,
        name    TEXT NOT NULL,           -- of the group
        version INTEGER NOT NULL,
        folder  TEXT NOT NULL,           -- below adapters/
        files   TEXT NOT NULL,           -- JSON object: name to [bytes, SHA-256]
        run     TEXT NOT NULL,           -- key of the finetuning run that made it, or empty
        PRIMARY KEY (tenant, name, version)
    ) WITHOUT ROWID;
    CREATE TABLE adapter_groups (
        tenant  TEXT NOT NULL,
        name    TEXT NOT NULL,
        current INTEGER NOT NULL,        -- the version that answers, 0 for none
        newest  INTEGER NOT NULL,        -- the highest version that was ever given
        PRIMARY KEY (tenant, name)
    ) WITHOUT ROWID;
    CREATE TEMP TABLE legacy AS
        SELECT DISTINCT coalesce(json_extract(g.value, '$.tenant'), t.tenant) AS tenant,
               json_extract(g.value, '$.name') AS name, g.value AS state
        FROM json_each(legacy_adapters()) g, (SELECT '' AS tenant UNION SELECT tenant FROM documents) t;
    INSERT INTO adapter_groups
        SELECT tenant, name, json_extract(state, '$.current'), json_extract(state, '$.newest') FROM legacy;
    INSERT INTO adapters
        SELECT tenant, name, json_extract(v.value, '$.version'), json_extract(v.value, '$.folder'),
               json_extract(v.value, '$.files'), ''
        FROM legacy, json_each(state, '$.versions') v;
    DROP TABLE legacy;
    """,
    # 6: which file a document was read from
    """
    ALTER TABLE documents ADD COLUMN origin TEXT NOT NULL DEFAULT '';  -- a file URI; a record's id is its fragment
    CREATE INDEX documents_by_origin ON documents (tenant, origin);
    """,
    # 7: pages of documents that have them, and the encoding of the file that a document was read from
    """
    CREATE TABLE pages (
        doc_key INTEGER NOT NULL REFERENCES documents ON DELETE CASCADE,
        number  INTEGER NOT NULL,        -- from 1
        label   TEXT NOT NULL,           -- what the page calls itself; '': its number
        start   INTEGER NOT NULL,        -- characters of the document, half open
        end     INTEGER NOT NULL,
        PRIMARY KEY (doc_key, number)
    ) WITHOUT ROWID;
    ALTER TABLE documents ADD COLUMN encoding TEXT NOT NULL DEFAULT '';
    """,
    # 8: words of every script, by tenant; store/terms.py says what a row holds
    """
    DROP TRIGGER words_of_new_window;
    DROP TRIGGER words_of_gone_window;
    DROP TABLE words;
    CREATE VIRTUAL TABLE words USING fts5 (text, columnsize = 0, detail = none, tokenize = 'ascii');
    INSERT INTO words (rowid, text)
        SELECT w.window_id, window_terms(d.tenant, substr(c.text, w.start - c.start + 1, w.end - w.start))
        FROM windows w JOIN chunks c USING (chunk_key) JOIN documents d USING (doc_key);
    CREATE TRIGGER words_of_new_window AFTER INSERT ON windows BEGIN
        INSERT INTO words (rowid, text)
            SELECT new.window_id, window_terms(d.tenant, substr(c.text, new.start - c.start + 1, new.end - new.start))
            FROM chunks c JOIN documents d USING (doc_key) WHERE c.chunk_key = new.chunk_key;
    END;
    CREATE TRIGGER words_of_gone_window AFTER DELETE ON windows BEGIN
        DELETE FROM words WHERE rowid = old.window_id;
    END;
    """,
    # 9: metadata holds any JSON; what frameworks keep with a document is apart from it, where no record can reach
    """
    ALTER TABLE documents ADD COLUMN private TEXT NOT NULL DEFAULT '{}';  -- JSON object: `Document.private`
    UPDATE documents SET metadata = public_part(metadata, doc_id), private = private_part(metadata, doc_id);
    DROP TABLE metadata;
    CREATE TABLE metadata (              -- of both, what filters find: a row for each value (values.py)
        doc_key INTEGER NOT NULL REFERENCES documents ON DELETE CASCADE,
        key     TEXT NOT NULL,
        value   TEXT NOT NULL,
        listed  INTEGER NOT NULL,        -- whether it is an element of a list
        PRIMARY KEY (doc_key, key, value, listed)
    ) WITHOUT ROWID;
    CREATE INDEX metadata_by_value ON metadata (key, value);
    INSERT INTO metadata
        SELECT d.doc_key, json_extract(t.value, '$[0]'), json_extract(t.value, '$[1]'), json_extract(t.value, '$[2]')
        FROM documents d, json_each(metadata_rows(d.metadata, d.private)) t;
    """,
    # 10: everything that the catalogue says is under a hash, which `migrate` takes
    """
    CREATE TABLE seals (
        root  TEXT NOT NULL,             -- documents or segments
        key   NOT NULL,                  -- of the row there
        label TEXT NOT NULL,             -- what messages call it, should it be lost
        seal  TEXT NOT NULL,             -- table=hash of its rows, one after another
        PRIMARY KEY (root, key)
    ) WITHOUT ROWID;
    CREATE TABLE sealed (                -- one row
        total    TEXT NOT NULL,          -- exclusive or of the hashes of all rows of seals, 64 hex digits
        rest     TEXT NOT NULL,          -- table=hash of every other table
        manifest TEXT                    -- the text of manifest.json; NULL until it is known
    );
    INSERT INTO sealed VALUES ('', '', NULL);
    """,
    # 11: who writes windows writes their words (`terms.add_words`), so that no trigger calls a function of the engine's
    """
    DROP TRIGGER words_of_new_window;
    """,
)


def text_hash(text: str) -> str:
    """SHA-256 of a text without the white space around it, which splitters and frameworks strip as they like.

    Also a function of SQL on every connection of a catalogue.
    """
    return hashlib.sha256(text.strip().encode("utf-8")).hexdigest()


# What SQL on a catalogue may call, on every connection.
FUNCTIONS: tuple[Callable[..., str], ...] = (text_hash, window_terms, fold, metadata_rows, public_part, private_part)


def migrate(connection: sqlite3.Connection, name: str) -> None:
    """Bring a catalogue up to the latest migration, all of it or nothing. The caller holds the write lock.

    Args:
        connection: in autocommit mode.
        name: what messages call the catalogue.

    Raises:
        StoreMismatch: a newer engine made it.
    """
    version = check_version(connection, name)
    if is_latest(connection, name):
        return
    damaged = doubts(connection)
    # executescript would commit a transaction of its caller's, so the script brings its own.
    steps = "".join(MIGRATIONS[version:])
    try:
        connection.executescript(
            f"BEGIN IMMEDIATE;{steps}PRAGMA application_id = {APPLICATION_ID};PRAGMA user_version = {len(MIGRATIONS)};"
        )
        seal_all(connection, damaged)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def check_version(connection: sqlite3.Connection, name: str) -> int:
    """Number of the last migration that a catalogue has had.

    Raises:
        StoreMismatch: a newer engine made it.
    """
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version > len(MIGRATIONS):
        raise StoreMismatch(
            f"user_version of {name} is {version}; this engine reads up to {len(MIGRATIONS)}: upgrade the engine"
        )
    return version


def is_latest(connection: sqlite3.Connection, name: str) -> bool:
    """Whether a catalogue has had every migration; raises like `check_version`."""
    return check_version(connection, name) == len(MIGRATIONS)
