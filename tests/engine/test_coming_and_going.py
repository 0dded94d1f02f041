"""Which document a file is, when files come, move and go; and who else may write meanwhile."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest

from lloco_engine.config import ChunkConfig, CompressConfig
from lloco_engine.engine import Engine
from lloco_engine.errors import ConfigError
from lloco_engine.testing import HashingEmbedder, save_tiny_decoder
from lloco_engine.types import Document, IngestReport


@pytest.fixture(scope="module")
def decoder_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    save_tiny_decoder(folder, max_position_embeddings=512)
    return folder


def open_engine(store: Path, decoder: Path) -> Engine:
    return Engine.open(
        store,
        decoder=str(decoder),
        embedder=HashingEmbedder(),
        compress=CompressConfig("uncompressed", ratio=1),
        chunk=ChunkConfig(64, 32, 8),
    )


@pytest.fixture
def engine(tmp_path, decoder_folder):
    with open_engine(tmp_path / "store", decoder_folder) as opened:
        yield opened


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def held(engine: Engine, tenant: str | None = None) -> dict[str, str]:
    """Every document's text by its id."""
    return {info.doc_id: engine.store.document_text(info.doc_id, info.tenant) for info in engine.documents(tenant)}


def said(report: IngestReport) -> dict[str, object]:
    """What a report names."""
    names = ("added", "replaced", "unchanged", "repaired", "moved", "vanished", "pruned", "failed")
    return {name: getattr(report, name) for name in names if getattr(report, name)}


# -- one file, one document ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [True, False], ids=["one run", "two runs"])
def test_files_of_one_name_are_two_documents(engine, tmp_path, together):
    one, two = write(tmp_path / "a" / "x.md", "The pump.").parent, write(tmp_path / "b" / "x.md", "The crane.").parent
    for sources in [[one, two]] if together else [[one], [two]]:
        engine.ingest(sources)
    assert held(engine) == {"x.md": "The pump.", "b/x.md": "The crane."}
    assert said(engine.ingest([two, one])) == {"unchanged": ("b/x.md", "x.md")}


def test_a_file_reached_otherwise_is_the_same_document(engine, tmp_path, monkeypatch):
    file = write(tmp_path / "docs" / "sub" / "x.md", "The lamp is lit at six.")
    (tmp_path / "way").symlink_to(tmp_path / "docs")
    os.link(file, tmp_path / "other.md")
    write(tmp_path / "elsewhere" / "y", "")
    assert said(engine.ingest([tmp_path / "docs"])) == {"added": ("sub/x.md",)}
    monkeypatch.chdir(tmp_path / "elsewhere")
    ways = ["docs/sub", "docs/sub/x.md", "way", "way/sub/../sub/x.md", "other.md", "elsewhere/../docs"]
    for way in ways:
        for path in (tmp_path / way, Path("..") / way):
            assert not engine.ingest([path]).added, way
    assert held(engine) == {"sub/x.md": "The lamp is lit at six."}
    report = engine.ingest([tmp_path / way for way in ways])
    assert len(report.unchanged) + len(report.moved) == 1
    assert report.skipped["other name of a file that was read"] == 5


def test_a_hard_link_with_a_new_text_is_the_same_document(engine, tmp_path):
    file = write(tmp_path / "x.md", "The lamp is lit at six.")
    os.link(file, tmp_path / "other.md")
    engine.ingest([file])
    file.write_text("The lamp is lit at seven.")
    assert said(engine.ingest([tmp_path / "other.md"])) == {"replaced": ("x.md",)}


def test_a_document_that_did_not_come_from_a_file_is_not_taken_for_one(engine, tmp_path):
    engine.ingest(Document("x.md", "Written by hand."))
    file = write(tmp_path / "in" / "x.md", "Written by hand.")
    assert said(engine.ingest([file])) == {"added": ("in/x.md",)}
    assert engine.ingest([file], prune=True).vanished == ()


def test_tenants_have_their_own_documents_of_one_file(engine, tmp_path):
    file = write(tmp_path / "x.md", "The pump.")
    assert engine.ingest([file], tenant="a").added == engine.ingest([file], tenant="b").added == ("x.md",)


def test_documents_of_a_store_that_noted_no_origins_keep_their_ids(engine, tmp_path, monkeypatch):
    folder = tmp_path / "docs"
    write(folder / "kept.md", "The pump.")
    write(folder / "sub" / "changed.md", "The crane.")
    write(folder / "moved.md", "The lamp.")
    monkeypatch.chdir(tmp_path)
    engine.ingest(["docs"])
    with engine.store.writer() as writer, writer._catalogue.transaction(write=True) as connection:
        connection.execute("UPDATE documents SET origin = ''")
    write(folder / "sub" / "changed.md", "The crane turns.")
    (folder / "moved.md").rename(folder / "sub" / "moved.md")
    assert said(engine.ingest([folder])) == {
        "unchanged": ("kept.md",),
        "replaced": ("sub/changed.md",),
        "added": ("sub/moved.md",),
    }
    assert said(engine.ingest([folder / "sub"])) == {"unchanged": ("sub/changed.md", "sub/moved.md")}


# -- moves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["docs/y.md", "docs/sub/x.md", "else/x.md"])
def test_a_file_that_was_moved_stays_its_document_and_its_labels_follow(engine, tmp_path, monkeypatch, to):
    old = write(tmp_path / "docs" / "x.md", "The valve is in hall nine.")
    write(tmp_path / "docs" / "stays.md", "The pump.")
    engine.ingest([tmp_path / "docs"])
    monkeypatch.setattr(engine.compressor, "make", None)  # nothing is compressed again
    new = write(tmp_path / to, "")
    old.rename(new)
    report = engine.ingest([tmp_path / "docs", tmp_path / to])
    assert (report.moved, report.added, report.vanished, report.segments) == (("x.md",), (), (), 0)
    info = engine.store.document("x.md")
    assert (info.source, info.title, info.version) == (new.as_posix(), new.stem, 1)
    assert engine.retrieve("valve", top_k=1)[0].source == new.as_posix()
    assert engine.verify() == []


def test_a_copy_is_another_document(engine, tmp_path):
    write(tmp_path / "a" / "x.md", "The valve is in hall nine.")
    engine.ingest([tmp_path / "a"])
    write(tmp_path / "a" / "y.md", "The valve is in hall nine.")
    report = engine.ingest([tmp_path / "a"])
    assert (report.added, report.segments) == (("y.md",), 0)


def test_lines_that_shift_in_a_file_of_records_are_cited_where_they_are(engine, tmp_path):
    path = write(tmp_path / "c.jsonl", '{"doc_id": "a", "text": "The pump."}\n')
    engine.ingest([path])
    path.write_text('{"doc_id": "b", "text": "The crane."}\n{"doc_id": "a", "text": "The pump."}\n')
    assert said(engine.ingest([path])) == {"added": ("b",), "moved": ("a",)}
    assert engine.store.document("a").source == f"{path}:2"


# -- what has vanished -----------------------------------------------------------------------------------------------


def test_what_vanished_is_named_and_pruned_when_asked(engine, tmp_path):
    for name in ("docs/a.md", "docs/sub/b.md", "docs/c.md", "docsother/d.md"):
        write(tmp_path / name, f"The text of {name}.")
    lines = ['{"doc_id": "r1", "text": "One."}', '{"doc_id": "r2", "text": "Two."}']
    records = write(tmp_path / "docs" / "r.jsonl", "\n".join(lines))
    engine.ingest([tmp_path / "docs", tmp_path / "docsother", Document("hand", "Made by hand.", source="docs/a.md")])
    engine.ingest([tmp_path / "docs"], tenant="other")
    everything = set(held(engine, ""))
    (tmp_path / "docs" / "a.md").unlink()
    (tmp_path / "docs" / "sub" / "b.md").unlink()
    (tmp_path / "docsother" / "d.md").unlink()
    records.write_text(lines[1])
    assert engine.ingest([tmp_path / "docs" / "sub" / ".." / "c.md"]).vanished == ()
    report = engine.ingest([tmp_path / "docs"])
    assert (set(report.vanished), report.pruned, report.failed) == ({"a.md", "sub/b.md", "r1"}, (), ())
    assert set(held(engine, "")) == everything
    report = engine.ingest([tmp_path / "docs"], prune=True)
    assert set(report.pruned) == set(report.vanished) == {"a.md", "sub/b.md", "r1"}
    assert set(held(engine, "")) == everything - set(report.pruned)
    assert len(held(engine, "other")) == 5
    assert engine.ingest([tmp_path / "docs"], prune=True).vanished == ()
    assert engine.verify() == []


def test_what_cannot_be_read_has_not_vanished(engine, tmp_path):
    write(tmp_path / "docs" / "a.md", "The pump.")
    records = write(tmp_path / "docs" / "r.jsonl", '{"doc_id": "r", "text": "One."}\n')
    engine.ingest([tmp_path / "docs"])
    (tmp_path / "docs" / "a.md").write_bytes(b"\0")
    records.write_text("{broken")
    report = engine.ingest([tmp_path / "docs"], prune=True)
    assert (report.vanished, len(report.failed)) == ((), 2)


def test_a_folder_that_is_missing_or_empty_is_not_pruned(engine, tmp_path):
    file = write(tmp_path / "docs" / "a.md", "The pump.")
    engine.ingest([file.parent])
    file.unlink()
    report = engine.ingest([file.parent], prune=True)
    assert (report.vanished, report.pruned) == (("a.md",), ())
    assert "only where a file is left in it" in report.failed[0].reason
    file.parent.rmdir()
    report = engine.ingest([file.parent], prune=True)
    assert (report.vanished, report.failed[0].reason) == ((), "no such file or folder")
    assert held(engine) == {"a.md": "The pump."}


# -- sources that are none -------------------------------------------------------------------------------------------


def test_one_bad_source_never_stops_a_run(engine, tmp_path):
    bad = write(tmp_path / "docs" / "good.md", "The pump.").parent
    (bad / os.fsdecode(b"caf\xe9.md")).write_text("latin")
    (bad / "line\nbreak.md").write_text("text")
    (bad / "loop").symlink_to(bad / "loop")
    os.mkfifo(bad / "pipe.md")
    sources = [
        7, None, b"bytes", "nul\0.md", "x" * 300 + ".md", "\ud800.md", "~nobody-of-this-name/x.md", bad / "pipe.md",
        Document("m", "t", metadata={"k\ud800": 1}), Document("n", None), Document(5, "t"), Document("", "t"),
        Document("t", "t", metadata=[1]), Document("s", "t", source=Path("x")), Document("l", "t", title="\0"),
        Document("x" * 10_001, "t"), Document("a\tb", "t"), bad, Document("last", "The crane."),
    ]  # fmt: skip
    report = engine.ingest(sources)
    assert report.added == ("good.md", "last")
    assert len(report.failed) == len(sources) - 2 + 3
    for failure in report.failed:
        (failure.source + failure.reason).encode("utf-8")
        assert failure.reason


@pytest.mark.parametrize("sources", [None, 7, b"docs"])
def test_sources_that_are_none_are_refused_before_anything_starts(engine, sources):
    with pytest.raises(ConfigError, match="sources must be a document, a path or several"):
        engine.ingest(sources)


def test_folders_may_lie_deeper_than_calls(engine, tmp_path, request):
    request.addfinalizer(lambda: subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True))  # Python's recurses
    here = os.open(tmp_path, os.O_RDONLY)
    try:
        for _ in range(1200):
            os.mkdir("d", dir_fd=here)
            below = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        with open(os.open("deep.md", os.O_WRONLY | os.O_CREAT, dir_fd=here), "w") as file:
            file.write("The pump.")
    finally:
        os.close(here)
    write(tmp_path / "d" / "z.md", "The crane.")
    report = engine.ingest([tmp_path / "d"])
    assert (len(report.added), report.failed) == (2, ())


# -- other writers ---------------------------------------------------------------------------------------------------


def test_others_write_between_the_segments_of_an_ingest(engine):
    engine.ingest([Document("old", "To be removed.")])
    seen = []

    def interfere(progress):
        if not seen:
            with engine.store.writer(timeout=0) as writer:
                writer.delete_document("old")
            seen.append(progress.document)

    assert engine.ingest([Document("new", "The pump. " * 60)], progress=interfere).added == ("new",)
    assert set(held(engine)) == {"new"}


def test_a_segment_that_another_writer_removes_meanwhile_is_made_again(engine):
    text = "The pump. " * 40
    engine.ingest([Document("old", text)])
    gone = []

    def interfere(progress):
        if progress.done_segments == progress.total_segments_of_document and not gone:
            gone.append(engine.delete("old"))

    report = engine.ingest([Document("new", text)], progress=interfere)
    assert report.added == ("new",) and report.segments == engine.stats()["segments"]
    assert engine.verify() == []


def test_two_ingests_of_the_same_at_once_compress_everything_once(engine):
    documents = [Document(f"d{number}", f"The valve number {number}. " * 20) for number in range(4)]
    reports: list[IngestReport] = []
    threads = [threading.Thread(target=lambda: reports.append(engine.ingest(documents))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(id for report in reports for id in report.added) == ["d0", "d1", "d2", "d3"]
    assert sum(len(report.unchanged) for report in reports) == 8
    assert sum(report.segments for report in reports) == engine.stats()["segments"]
    assert engine.verify() == []


def test_two_files_that_want_one_id_at_once_are_two_documents(engine, tmp_path):
    one, two = write(tmp_path / "a" / "x.md", "The pump."), write(tmp_path / "b" / "x.md", "The crane.")
    done = []

    def interfere(_):
        if not done:
            done.append(True)
            done.append(engine.ingest([two]).added)

    assert engine.ingest([one], progress=interfere).added == ("a/x.md",)
    assert held(engine) == {"x.md": "The crane.", "a/x.md": "The pump."}
