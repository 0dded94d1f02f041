-- The catalogue of a store of format 1, as released. Never edit it: it stands for stores out there.
PRAGMA application_id = 1280077635;
PRAGMA user_version = 1;
BEGIN TRANSACTION;
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
INSERT INTO "chunks" VALUES(4,2,0,0,20,20,'93fd7d29f7890d9e707f0ec5c94a9485','...beta000...beta001');
INSERT INTO "chunks" VALUES(5,2,1,20,40,20,'38fb656215f15c3ae57e2021e5382e91','...beta002...beta003');
INSERT INTO "chunks" VALUES(6,3,0,0,20,20,'fa7a11463dbe3a1a51bf09931fe1a43b','.second000.second001');
INSERT INTO "chunks" VALUES(7,3,1,20,40,20,'1262df3b355bb34ba78cec455ec98cdd','.second002.second003');
INSERT INTO "chunks" VALUES(8,3,2,40,50,10,'2b6efe4d291cc64a3009fee4ee3b593d','.second004');
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
INSERT INTO "documents" VALUES(2,'red','beta','Title of beta','beta.txt','{}',1,'1fedbff25765b748d53f3cfb432da02b53fb9ea80f9c4f875ff793b77c554e30','d185ee2eef98131ae211461ee6883fa98ee76c99deacff537d6859d005c48175',40,40,0.5,'2026-11-22T14:06:48+00:00');
INSERT INTO "documents" VALUES(3,'','alpha','Title of alpha','alpha.txt','{"year": 2021, "draft": false, "share": 1.0, "author": "Ann"}',2,'bc1270f961454e540091290efe1021922287df10af8b04aef01092f68b152c18','f960821a1306025cc168f868d7f7748109443e09477645ca4f82d5ddd5a512c8',50,50,0.5,'2026-11-22T14:06:49+00:00');
CREATE TABLE generation (            -- one row: counts the commits that changed a document
        number INTEGER NOT NULL
    );
INSERT INTO "generation" VALUES(3);
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
INSERT INTO "metadata" VALUES(3,'author','s:Ann');
INSERT INTO "metadata" VALUES(3,'draft','b:false');
INSERT INTO "metadata" VALUES(3,'share','n:1');
INSERT INTO "metadata" VALUES(3,'year','n:2021');
CREATE TABLE segments (
        segment_id    TEXT PRIMARY KEY,
        slots         INTEGER NOT NULL,
        source_tokens INTEGER NOT NULL,
        bytes         INTEGER NOT NULL,
        checksum      TEXT NOT NULL
    ) WITHOUT ROWID;
INSERT INTO "segments" VALUES('1262df3b355bb34ba78cec455ec98cdd',3,20,772,'3de06befbe9e791a6e986bf12c9c7bbaa99c5e0db93e1729f6c935f4c03e1b73');
INSERT INTO "segments" VALUES('2b6efe4d291cc64a3009fee4ee3b593d',3,10,832,'13e9d3ce78172f8cf8644d0ad5ebf40630aa3d8de6bb4626b7f393756e8d4140');
INSERT INTO "segments" VALUES('38fb656215f15c3ae57e2021e5382e91',3,20,792,'c9332b65e28c21aed975c5dc81856eb8bde466d96dcfd6d03072505a13af5dec');
INSERT INTO "segments" VALUES('93fd7d29f7890d9e707f0ec5c94a9485',3,20,732,'2b5385bec83c3188e0300b97a9f6c31689c0ee31b2207e921ec69ade2926152a');
INSERT INTO "segments" VALUES('fa7a11463dbe3a1a51bf09931fe1a43b',3,20,752,'9fbbfd1a6b9bfbaf0893cd5a0d73e7c28f95813b1421cc9f0d163dca03185268');
CREATE TABLE windows (               -- an id is never used again, so an index may lag behind
        window_id INTEGER PRIMARY KEY AUTOINCREMENT,
        chunk_key INTEGER NOT NULL REFERENCES chunks ON DELETE CASCADE,
        start     INTEGER NOT NULL,
        end       INTEGER NOT NULL,
        vector    BLOB NOT NULL          -- float32, little endian, L2-normalised
    );
INSERT INTO "windows" VALUES(6,4,0,10,X'7DB91C3FA6E2683C976F99BED63AD93ED710E8BD5419D83D0B020C3FA079373E');
INSERT INTO "windows" VALUES(7,4,10,20,X'96691C3F6C47013F6FD2593E33CF67BD04EA973E054F7ABE4EE9C03D62F5D0BE');
INSERT INTO "windows" VALUES(8,5,20,30,X'A9D32ABD7F4D713E36CFD83E1D0EE33D2967463F11D6A53EBDEC15BD485C57BE');
INSERT INTO "windows" VALUES(9,5,30,40,X'06BC893E3AB4C63EA585913E439EDCBE2654BEBD28C25FBD574113BF70E6D1BE');
INSERT INTO "windows" VALUES(10,6,0,10,X'7EC0DE3EC88155BEE400F93C865214BE3E531ABF9DB1A3BEE28BE6BEC8098E3E');
INSERT INTO "windows" VALUES(11,6,10,20,X'A5CAE63E23905EBDBB9DD0BCE3DB113D8DB434BFABEBB0BEFFE918BDF7E1D43E');
INSERT INTO "windows" VALUES(12,7,20,30,X'4C7EFE3C5FFF06BEC8C851BE963289BE8FD0E63C960DF1BE8832DF3E5FC12C3F');
INSERT INTO "windows" VALUES(13,7,30,40,X'2A89713EB472DE3BC6B1453F34AD993E0577A5BE0C3896BE973528BE6DB84DBE');
INSERT INTO "windows" VALUES(14,8,40,50,X'1F3585BE5F7FE23EEC34D33EFE0112BEFD31E33D00E612BC877D043FB100043F');
CREATE INDEX metadata_by_value ON metadata (key, value);
CREATE INDEX chunks_by_segment ON chunks (segment_id);
CREATE INDEX windows_by_chunk ON windows (chunk_key);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('documents',3);
INSERT INTO "sqlite_sequence" VALUES('chunks',8);
INSERT INTO "sqlite_sequence" VALUES('windows',14);
COMMIT;
