-- The catalogue of a store of summary embeddings, as released. Never edit it: it stands for stores out there.
PRAGMA application_id = 1280077635;
PRAGMA user_version = 3;
BEGIN TRANSACTION;
CREATE TABLE chunks (
        chunk_key     INTEGER PRIMARY KEY AUTOINCREMENT,
        doc_key       INTEGER NOT NULL REFERENCES documents ON DELETE CASCADE,
        ordinal       INTEGER NOT NULL,
        start         INTEGER NOT NULL,  -- characters of the document, half open
        end           INTEGER NOT NULL,
        source_tokens INTEGER NOT NULL,
        segment_id    TEXT NOT NULL REFERENCES segments,
        text          TEXT NOT NULL, text_hash TEXT NOT NULL DEFAULT '',
        UNIQUE (doc_key, ordinal)
    );
INSERT INTO "chunks" VALUES(1,1,0,0,20,20,'c15343e3458182b1dde633eb012b2b07','..alpha000..alpha001','c7699e694cbb447bd8fe3eb47c4580594d54315798daa204407c93b3f848effe');
INSERT INTO "chunks" VALUES(2,1,1,20,40,20,'41b39f94ea8bac82857483113070e81d','..alpha002..alpha003','572a4dac3593ed08c0b4c7c68a75570947cdeeddd186d711d51bed4ebdb9f45c');
INSERT INTO "chunks" VALUES(3,1,2,40,60,20,'a32723f36f1578fa5a995736bc9a7eb9','..alpha004..alpha005','71c2bb1b62106fc194fe2fc973039911445f5a22c89fb825948d285afa388a4c');
INSERT INTO "chunks" VALUES(4,2,0,0,20,20,'ce458e8aa15802c16c758a479b057bae','..alpha000..alpha001','c7699e694cbb447bd8fe3eb47c4580594d54315798daa204407c93b3f848effe');
INSERT INTO "chunks" VALUES(5,2,1,20,40,20,'bb91b1cd09cfccef876b2fb1e34929d2','..alpha002..alpha003','572a4dac3593ed08c0b4c7c68a75570947cdeeddd186d711d51bed4ebdb9f45c');
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
INSERT INTO "documents" VALUES(1,'','alpha','Title of alpha','alpha.txt','{"year": 2021}',1,'9feb0b633807c8bf77fa21d15f4fc2f1a36cff12e95c03941ea642ce625d7cbb','e97a526504aebe4e779e1bf34e9d9e5cafc5d8b08ba37ccf5ada2787abb85167',60,60,0.5,'2026-11-24T07:43:24+00:00');
INSERT INTO "documents" VALUES(2,'red','beta','Title of beta','beta.txt','{}',1,'66df6eb7c7940ad43c83eee169bcf6ff82f37bf4dbc6c344d4be4ba1be0af120','3654f6a76f54738e768b7870ca7ef66b5f47c08145b22cb683e5bad7304aa6b3',40,40,0.5,'2026-11-24T07:43:24+00:00');
CREATE TABLE generation (            -- one row: counts the commits that changed a document
        number INTEGER NOT NULL
    );
INSERT INTO "generation" VALUES(2);
CREATE TABLE index_file (            -- at most one row: the search index on disk
        generation INTEGER NOT NULL,
        windows    INTEGER NOT NULL,
        bytes      INTEGER NOT NULL,
        checksum   TEXT NOT NULL
    );
CREATE TABLE metadata (              -- the same metadata, one row a key, for filters
        doc_key INTEGER NOT NULL REFERENCES documents ON DELETE CASCADE,
        key     TEXT NOT NULL,
        value   TEXT NOT NULL,           -- type and value: s:text, n:number, b:true
        PRIMARY KEY (doc_key, key)
    ) WITHOUT ROWID;
INSERT INTO "metadata" VALUES(1,'year','n:2021');
CREATE TABLE segments (
        segment_id    TEXT PRIMARY KEY,
        slots         INTEGER NOT NULL,
        source_tokens INTEGER NOT NULL,
        bytes         INTEGER NOT NULL,
        checksum      TEXT NOT NULL
    , previous TEXT REFERENCES segments DEFERRABLE INITIALLY DEFERRED) WITHOUT ROWID;
INSERT INTO "segments" VALUES('41b39f94ea8bac82857483113070e81d',3,20,378,'13735c7aad942978d298bd45f8a0f8f1236948d256ade6e5881a3b24c31cfcb9','c15343e3458182b1dde633eb012b2b07');
INSERT INTO "segments" VALUES('a32723f36f1578fa5a995736bc9a7eb9',3,20,378,'3607768e07e289e6d85fa38533ca3999f7294eac873c4fb355b1fa00b92ab771','41b39f94ea8bac82857483113070e81d');
INSERT INTO "segments" VALUES('bb91b1cd09cfccef876b2fb1e34929d2',3,20,378,'6209d7a2910435249067863092117071d69fc5862850b6a9b6dae806e8e02b37','ce458e8aa15802c16c758a479b057bae');
INSERT INTO "segments" VALUES('c15343e3458182b1dde633eb012b2b07',3,20,378,'0b7057c4ce18667210bd21f12c81e3cd24fb994826210166fe0d8c9296788d3f',NULL);
INSERT INTO "segments" VALUES('ce458e8aa15802c16c758a479b057bae',3,20,378,'0f99791eac09ec1ec14ed3098aa5a4e618e46bf3a4bbf7748e3ae94a40a1c6cb',NULL);
CREATE TABLE windows (               -- an id is never used again, so an index may lag behind
        window_id INTEGER PRIMARY KEY AUTOINCREMENT,
        chunk_key INTEGER NOT NULL REFERENCES chunks ON DELETE CASCADE,
        start     INTEGER NOT NULL,
        end       INTEGER NOT NULL,
        vector    BLOB NOT NULL          -- float32, little endian, L2-normalised
    );
INSERT INTO "windows" VALUES(1,1,0,10,X'7C023FBD692A7EBE048BFE3CDC8942BF2C1973BDF50A8A3DB380DFBD23CA14BF');
INSERT INTO "windows" VALUES(2,1,10,20,X'9AE7B93C16F3CEBE87E6693ED148403F431EA0BEEA94483A09413A3E6CA4983E');
INSERT INTO "windows" VALUES(3,2,20,30,X'59A134BF653B123F5708FE3C5B609B3D90A526BDC32343BDC101D03E179E51BC');
INSERT INTO "windows" VALUES(4,2,30,40,X'015DA9BE0F40243ED8B7AEBEF074DABE7F42BB3EA478983ECC72CC3E94E4DB3E');
INSERT INTO "windows" VALUES(5,3,40,50,X'7C2FAFBEB92018BF4033F63E7ED74ABC208EF93E37C465BDCA9F1BBCC7C6753E');
INSERT INTO "windows" VALUES(6,3,50,60,X'0D3CC13E57DEDC3EFFEA323E577607BE31A6E4BDB4B2113DA34607BFFC2A133F');
INSERT INTO "windows" VALUES(7,4,0,10,X'7C023FBD692A7EBE048BFE3CDC8942BF2C1973BDF50A8A3DB380DFBD23CA14BF');
INSERT INTO "windows" VALUES(8,4,10,20,X'9AE7B93C16F3CEBE87E6693ED148403F431EA0BEEA94483A09413A3E6CA4983E');
INSERT INTO "windows" VALUES(9,5,20,30,X'59A134BF653B123F5708FE3C5B609B3D90A526BDC32343BDC101D03E179E51BC');
INSERT INTO "windows" VALUES(10,5,30,40,X'015DA9BE0F40243ED8B7AEBEF074DABE7F42BB3EA478983ECC72CC3E94E4DB3E');
CREATE INDEX metadata_by_value ON metadata (key, value);
CREATE INDEX chunks_by_segment ON chunks (segment_id);
CREATE INDEX windows_by_chunk ON windows (chunk_key);
CREATE INDEX chunks_by_text ON chunks (text_hash);
CREATE INDEX documents_by_content ON documents (tenant, content_hash);
CREATE INDEX segments_by_previous ON segments (previous);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('documents',2);
INSERT INTO "sqlite_sequence" VALUES('chunks',5);
INSERT INTO "sqlite_sequence" VALUES('windows',10);
COMMIT;
