"""Readers: every format, every rule for bad input; what is refused is named and the rest go on."""

from __future__ import annotations

import io
import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest

from lloco_engine.config import ReadConfig
from lloco_engine.errors import ConfigError
from lloco_engine.readers import read_paths
from lloco_engine.readers.formats import parse
from lloco_engine.types import Document, Failure


def read_as(suffix: str, data: bytes) -> tuple[str, str]:
    """Title and text of a file."""
    parsed = parse(suffix, data, ReadConfig())
    return parsed.title, parsed.text


def pdf(*pages: str, title: str = "", password: str | None = None) -> bytes:
    """A PDF whose pages each show one line of text."""
    from pypdf import PdfWriter
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = PdfWriter()
    for text in pages:
        page = writer.add_blank_page(width=400, height=200)
        names = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
        font = DictionaryObject({NameObject(key): NameObject(value) for key, value in names.items()})
        fonts = DictionaryObject({NameObject("/F1"): font})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode("latin-1"))
        page[NameObject("/Contents")] = writer._add_object(stream)
    if title:
        writer.add_metadata({"/Title": title})
    if password is not None:
        writer.encrypt(password, owner_password="owner", algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def read(*paths: Path, **options) -> tuple[list[Document], list[Failure]]:
    items = list(read_paths(paths, **options))
    documents = [item for item in items if isinstance(item, Document)]
    return documents, [item for item in items if isinstance(item, Failure)]


def refused(path: Path, **options) -> str:
    """The reason for which the only file is refused, after checking that it is named."""
    documents, (failure,) = read(path, **options)
    assert documents == []
    assert failure.source == path.as_posix()
    return failure.reason


# -- formats ---------------------------------------------------------------------------------------------------------


def test_a_text_file_is_read_as_it_stands(tmp_path):
    (tmp_path / "notes.txt").write_bytes("one\r\ntwo é\n".encode())
    ((document,), failures) = read(tmp_path / "notes.txt")
    assert failures == []
    assert document.doc_id == "notes.txt"
    assert document.text == "one\r\ntwo é\n"
    assert document.title == "notes"
    assert document.source == (tmp_path / "notes.txt").as_posix()


def test_a_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read(tmp_path / "a.txt")[0][0].text == "hello"


def test_markdown_is_titled_by_its_first_heading():
    assert read_as(".md", b"intro\n\n## The pump ##\n\ntext\n# Later\n") == (
        "The pump",
        "intro\n\n## The pump ##\n\ntext\n# Later\n",
    )


@pytest.mark.parametrize("title", [f"0x{'f' * 9_000}", "9" * 9_000, "[" * 9_000, "2024-99-99"])
def test_a_title_that_cannot_be_told_does_not_cost_the_text(title):
    found, text = read_as(".md", f"---\ntitle: {title}\n---\n# The pump\n\ntext".encode())
    assert found in ("The pump", title)
    assert text.endswith("# The pump\n\ntext")


def test_comments_among_code_spans():
    line = "a `<!-- kept -->` b<!-- gone --> ``c ` <!-- kept --> `` ` ``` <!-- gone -->`` d <!-- shown"
    assert read_as(".md", line.encode())[1] == "a `<!-- kept -->` b ``c ` <!-- kept --> `` ` ``` `` d <!-- shown"


@pytest.mark.parametrize("angle", [90, 180, 270])
def test_lines_of_a_page_that_is_shown_turned_keep_their_order(angle):
    from pypdf import PdfReader, PdfWriter

    writer = PdfWriter()
    writer.add_page(PdfReader(io.BytesIO(pdf("one) Tj 0 -14 Td (two) Tj 0 -14 Td (three"))).pages[0].rotate(angle))
    turned = io.BytesIO()
    writer.write(turned)
    assert read_as(".pdf", turned.getvalue())[1] == "one\ntwo\nthree"


@pytest.mark.parametrize(
    ("source", "kept"),
    [
        ("> ```\n> <!-- code -->\n> ```\n\n<!-- no -->a\n", "> ```\n> <!-- code -->\n> ```\n\na\n"),
        ("- ```html\n  <!-- x -->\n  ```\n\n<!-- no -->\nb\n", "- ```html\n  <!-- x -->\n  ```\n\n\nb\n"),
        ("1.  a\n\n    <!-- no -->\n    c\n", "1.  a\n\n    \n    c\n"),
        ("a <!-- b\n\nrest\n", "a <!-- b\n\nrest\n"),
        ("<!-- a\n\n```\nx\n-->\nrest\n", "\n\n\n\n\nrest\n"),
        ("````\n```\n<!-- x -->\n````\n<!-- n -->\n", "````\n```\n<!-- x -->\n````\n\n"),
        ("[^1]: note\n\n[//]: # (gone)\r\nb [x]: c<!--> d\n", "[^1]: note\n\nb [x]: c d\n"),
    ],
)
def test_what_is_code_and_what_a_comment(source, kept):
    assert read_as(".md", source.encode())[1] == kept


def test_html_gives_what_a_browser_shows():
    page = b"""<!doctype html><html><head><title> Pumps &amp; cranes</title><style>p{}</style>
    <script>if (a < b) document.write("<p>no</p>")</script></head><body><!-- no --><h1>Head</h1>
    <p>One <b>bold</b> and
       <i> two</i>.<p>caf&eacute;&nbsp;&#x1F44D;<br>line<ul><li>a</li> <li>b</ul>
    <table><tr><th>x</th> <td>y</td></tr><tr><td>1</td><td>2</td></tr></table><pre>def f():
    return 1</pre><noscript>no</noscript><svg><title>no</title><text>3,150 rpm</text></svg>
    <img alt="no"/>end</body></html>"""
    title, text = read_as(".html", page)
    assert title == "Pumps & cranes"
    assert text == (
        "Head\n\nOne bold and two.\n\ncafé 👍\nline\n\na\nb\n\nx\ty\n1\t2\n\ndef f():\n    return 1\n\n3,150 rpm\n\nend"
    )


def test_html_without_title_takes_its_first_heading(tmp_path):
    (tmp_path / "a.html").write_text("<h1>Big <i>news</i></h1><p>text")
    assert read(tmp_path / "a.html")[0][0].title == "Big news"


@pytest.mark.parametrize(
    "page", [b"<p>a<style>never closed", b"<p>a</p></div></script>", b"a<", b"<p>a &notanentity; &#xFFFFFFF;"]
)
def test_broken_html_still_gives_its_text(page):
    assert read_as(".html", page)[1].startswith("a")


def test_a_pdf_gives_its_pages_and_title(tmp_path):
    (tmp_path / "r.pdf").write_bytes(pdf("First page.", "Second page.", title="The report"))
    ((document,), _) = read(tmp_path / "r.pdf")
    assert document.text == "First page.\n\nSecond page."
    assert document.title == "The report"


def test_an_encrypted_pdf_is_refused_unless_its_password_is_empty(tmp_path):
    (tmp_path / "r.pdf").write_bytes(pdf("Secret.", password="hush"))
    assert "must not be encrypted" in refused(tmp_path / "r.pdf")
    assert read_as(".pdf", pdf("Open.", password=""))[1] == "Open."


def test_a_damaged_pdf_is_refused_in_silence(tmp_path, capfd):
    whole = pdf("A page of text.")
    for name, data in {"head": b"%PDF-1.7\n" + b"x" * 100, "cut": whole[: len(whole) // 3], "no": b"not a pdf"}.items():
        (tmp_path / f"{name}.pdf").write_bytes(data)
        assert "the PDF is damaged" in refused(tmp_path / f"{name}.pdf")
    assert capfd.readouterr() == ("", "")


def test_a_pdf_without_text_is_refused(tmp_path):
    (tmp_path / "scan.pdf").write_bytes(pdf(""))
    assert "must have a text layer, and none of its 1 pages does" in refused(tmp_path / "scan.pdf")


# -- JSON Lines ------------------------------------------------------------------------------------------------------


def write_jsonl(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_records_become_documents_with_their_other_fields_as_metadata(tmp_path):
    record = {
        "doc_id": "a",
        "title": "T",
        "text": "body",
        "source": "S",
        "year": 2024,
        "ok": True,
        "x": 1.5,
        "who": "me",
    }
    path = write_jsonl(
        tmp_path / "c.jsonl",
        record | {"questions": [{"id": 1}], "none": None, "o": {}},
        "",
        {"doc_id": "b", "text": "t"},
    )
    documents, failures = read(path)
    assert failures == []
    metadata = {"year": 2024, "ok": True, "x": 1.5, "who": "me", "none": None, "o": {}}  # no questions, nor answers
    assert documents[0] == Document("a", "body", "T", "S", metadata, encoding="utf-8")
    assert (documents[1].doc_id, documents[1].title, documents[1].source) == ("b", "", f"{path}:3")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "one JSON record"),
        ('{"doc_id": "x", "text": "t", "n": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "one JSON record"),
        ("[1]", "a JSON object, not a list"),
        ('{"text": "t"}', '"doc_id" as a string, and it is missing'),
        ('{"doc_id": 7, "text": "t"}', '"doc_id" as a string, and it is a number'),
        ('{"doc_id": "x"}', '"text" as a string, and it is missing'),
        ('{"doc_id": "x", "text": null}', '"text" as a string, and it is null'),
        ('{"doc_id": " ", "text": "t"}', "id must not be empty"),
        ('{"doc_id": "x", "text": "t", "title": []}', '"title" must be a string, not a list'),
        ('{"doc_id": "x", "text": " \\n"}', "this one is blank"),
        ('{"doc_id": "x", "text": "a\\u0000b"}', "character 1 is NUL"),
        ('{"doc_id": "x", "text": "ab\\ud800"}', "character 2 is a lone surrogate"),
        ('{"doc_id": "x", "text": "t", "who": "\\ud800"}', "metadata 'who' must be valid Unicode"),
        ('{"doc_id": "good", "text": "t"}', "must come once in a run"),
    ],
)
def test_a_bad_line_is_named_and_the_rest_go_on(tmp_path, line, reason):
    path = write_jsonl(tmp_path / "c.jsonl", {"doc_id": "good", "text": "1"}, line, {"doc_id": "also", "text": "2"})
    documents, (failure,) = read(path)
    assert [document.doc_id for document in documents] == ["good", "also"]
    assert failure.source == f"{path}:2"
    assert reason in failure.reason


def test_a_line_that_is_not_utf8_or_too_long_is_named_and_the_rest_go_on(tmp_path):
    path = tmp_path / "c.jsonl"
    good = b'{"doc_id": "%d", "text": "t"}\n'
    path.write_bytes(good % 1 + b'{"doc_id": "x", "text": "\xa1"}\n' + b"x" * 500 + b"\n" + good % 4)
    documents, failures = read(path, config=ReadConfig(max_bytes=100))
    assert [document.doc_id for document in documents] == ["1", "4"]
    assert [failure.source for failure in failures] == [f"{path}:2", f"{path}:3"]
    assert "encoding" in failures[0].reason
    assert "at most 100 bytes" in failures[1].reason


def test_a_binary_or_empty_jsonl_is_one_failure(tmp_path):
    (tmp_path / "b.jsonl").write_bytes(bytes(range(256)) * 4)
    assert "must not be binary" in refused(tmp_path / "b.jsonl")
    (tmp_path / "e.jsonl").write_bytes(b"\n\n")
    assert "empty" in refused(tmp_path / "e.jsonl")


# -- bad files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["txt", "md", "html", "pdf"])
@pytest.mark.parametrize(
    ("data", "reason"), [(b"", "this one is empty"), (b" \r\n\t ", "this one is blank")], ids=["empty", "blank"]
)
def test_an_empty_file_is_refused(tmp_path, suffix, data, reason):
    (tmp_path / f"a.{suffix}").write_bytes(data)
    assert reason in refused(tmp_path / f"a.{suffix}")


def test_html_without_text_is_refused(tmp_path):
    (tmp_path / "a.html").write_text("<script>x()</script><p> </p>")
    assert "blank" in refused(tmp_path / "a.html")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"abc\0def", "must not be binary, and byte 3 is NUL"),
        (bytes(range(256)) * 4, "must not be binary, and byte 0 is NUL"),
        (b"\xef\xbb\xbfabc\xff", "byte 6 is not utf-8"),
        (b"\xff\xfea", "byte 2 is not utf-16-le"),
    ],
    ids=["NUL", "binary", "after a mark", "half a character"],
)
@pytest.mark.parametrize("suffix", ["txt", "md", "html"])
def test_what_is_no_text_is_refused_with_the_offset(tmp_path, suffix, data, reason):
    (tmp_path / f"a.{suffix}").write_bytes(data)
    assert reason in refused(tmp_path / f"a.{suffix}")


def test_a_huge_file_is_refused_without_being_read(tmp_path):
    path = tmp_path / "big.txt"
    with path.open("wb") as handle:
        handle.truncate(300_000_000)
    started = time.process_time()
    assert "at most 80,000,000 bytes, not 300,000,000" in refused(path)
    assert time.process_time() - started < 0.05
    (tmp_path / "exact.txt").write_text("x" * 50)
    assert len(read(tmp_path / "exact.txt", config=ReadConfig(max_bytes=50))[0]) == 1
    assert "at most 49 bytes" in refused(tmp_path / "exact.txt", config=ReadConfig(max_bytes=49))


def test_files_of_one_name_are_told_apart_by_the_folders_above_them(tmp_path):
    for folder in ("one", "two", "three/two"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.txt").write_text("same")
    (tmp_path / "one" / "b.txt").write_text("same")
    documents, failures = read(tmp_path / "one", tmp_path / "two", tmp_path / "three" / "two")
    assert [document.doc_id for document in documents] == ["a.txt", "b.txt", "two/a.txt", "three/two/a.txt"]
    assert failures == []


def test_a_record_id_that_came_before_is_refused_by_name(tmp_path):
    one = write_jsonl(tmp_path / "1.jsonl", {"doc_id": "a", "text": "t"})
    two = write_jsonl(tmp_path / "2.jsonl", {"doc_id": "a", "text": "u"})
    documents, (failure,) = read(one, two)
    assert [document.text for document in documents] == ["t"]
    assert failure == Failure(f"{two}:1", f"a doc_id must come once in a run, and 'a' was read from {one}:1")


def test_an_unreadable_file_is_named_and_the_rest_go_on(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt", "c.jsonl", "d.txt"):
        (tmp_path / name).write_text("text")
    real = os.open

    def guarded(path, *args, **kwargs):
        if Path(path).name in ("b.txt", "c.jsonl"):
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", guarded)
    documents, failures = read(tmp_path)
    assert [document.doc_id for document in documents] == ["a.txt", "d.txt"]
    assert [failure.source for failure in failures] == [f"{tmp_path}/b.txt", f"{tmp_path}/c.jsonl"]
    assert all("Permission denied" in failure.reason for failure in failures)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "z.txt").write_text("text")
    real = os.listdir

    def guarded(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "listdir", guarded)
    documents, (failure,) = read(tmp_path)
    assert len(documents) == 1
    assert failure == Failure(f"{tmp_path}/closed", "cannot be read: Permission denied")


def test_missing_special_and_unknown_files_are_named(tmp_path):
    assert refused(tmp_path / "nowhere.txt") == "no such file or folder"
    os.mkfifo(tmp_path / "pipe.txt")
    assert "regular file or a folder" in refused(tmp_path / "pipe.txt")
    (tmp_path / "a.doc").write_text("x")
    assert "suffix must be one of .txt" in refused(tmp_path / "a.doc")
    (tmp_path / "none").write_text("x")
    assert "not 'none'" in refused(tmp_path / "none")


# -- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_order_with_relative_ids_and_leaves_out_what_it_should(tmp_path):
    for name in (
        "b/z.txt",
        "b/a.MD",
        "a.txt",
        ".hidden.txt",
        ".git/x.txt",
        "b/pic.png",
        "b/.x/y.txt",
        "Makefile",
        "c.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")
    os.mkfifo(tmp_path / "pipe.txt")
    skipped: Counter[str] = Counter()
    documents, failures = read(tmp_path, skipped=skipped)
    assert [document.doc_id for document in documents] == ["a.txt", "b/a.MD", "b/z.txt", "c.txt"]
    assert failures == []
    assert skipped == {"hidden": 3, ".png": 1, "no suffix": 1, "special file": 1}


def test_a_hidden_file_given_by_name_is_read(tmp_path):
    (tmp_path / ".notes.txt").write_text("text")
    assert read(tmp_path / ".notes.txt")[0][0].doc_id == ".notes.txt"


def test_links_are_followed_only_to_files_inside_the_folder(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "sub").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    (root / "sub" / "real.txt").write_text("real")
    (root / "alias.txt").symlink_to(root / "sub" / "real.txt")
    (root / "sub" / ".kept").write_text("behind a hidden name")
    (root / "name.txt").symlink_to(root / "sub" / ".kept")
    (root / "leak.txt").symlink_to(outside / "secret.txt")
    (root / "leak").symlink_to(outside)
    (root / "sub" / "loop").symlink_to(root)
    (root / "broken.txt").symlink_to(root / "nothing")
    (root / "circle.txt").symlink_to(root / "circle.txt")
    skipped: Counter[str] = Counter()
    documents, failures = read(root, skipped=skipped)
    assert [document.doc_id for document in documents] == ["sub/real.txt", "name.txt"]
    assert [Path(failure.source).name for failure in failures] == ["broken.txt", "circle.txt"]
    assert all("link is broken" in failure.reason for failure in failures)
    other = "other name of a file that was read"
    assert skipped == {"link that leaves the folder": 2, "link to a folder": 1, "hidden": 1, other: 1}
    assert "link is broken" in refused(root / "broken.txt")
    assert read(root / "leak.txt")[0][0].text == "secret"  # named by the user, so meant


@pytest.mark.parametrize("name", [".", "..", "sub/.."])
def test_a_folder_may_be_named_by_dots(tmp_path, monkeypatch, name):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path / "sub" if name == ".." else tmp_path)
    assert [document.doc_id for document in read(Path(name))[0]] == ["sub/a.txt"]


def test_a_file_name_that_is_not_utf8_is_refused_and_printable(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    documents, (failure,) = read(tmp_path)
    assert documents == []
    assert "doc_id must be valid Unicode" in failure.reason
    failure.source.encode("utf-8")


# -- the rest --------------------------------------------------------------------------------------------------------


def test_tenant_and_metadata_are_set_on_every_document(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    write_jsonl(tmp_path / "b.jsonl", {"doc_id": "b", "text": "t", "year": 1, "team": "x"})
    documents, _ = read(tmp_path, tenant="acme", metadata={"year": 2024})
    assert [document.tenant for document in documents] == ["acme", "acme"]
    assert [document.metadata for document in documents] == [{"year": 2024}, {"year": 2024, "team": "x"}]


@pytest.mark.parametrize("key", ["doc_id", "source", "title", "text", "tenant"])
def test_metadata_must_not_take_a_documents_own_names(key):
    with pytest.raises(ConfigError, match=f"'{key}' is one of them"):
        read_paths([], metadata={key: "x"})


def test_reading_is_lazy(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *args: opened.append(Path(path).name) or real(path, *args))
    items = read_paths([tmp_path])
    assert opened == []
    next(items)
    assert opened == ["a.txt"]


def test_the_evaluation_data_reads_whole(shared_data):
    for path in sorted(shared_data.glob("*/val.jsonl")):
        documents, failures = read(path)
        assert failures == []
        assert documents
