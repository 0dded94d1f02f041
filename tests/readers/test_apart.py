"""Files that take a parser are read in a process of their own, which is ended where a file asks too much."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from lloco_engine.config import ReadConfig
from lloco_engine.errors import ConfigError, DocumentError
from lloco_engine.readers import apart, read_paths
from lloco_engine.types import Document, Failure


def parse(suffix: str, data: bytes, **limits):
    return apart.parse_apart(suffix, data, ReadConfig(**limits))


def epub(chapter: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as book:
        book.writestr(
            "META-INF/container.xml",
            '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
            '<rootfile full-path="b/p.opf"/></rootfiles></container>',
        )
        book.writestr(
            "b/p.opf",
            '<package xmlns="http://www.idpf.org/2007/opf" xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata>'
            '<dc:title>The book</dc:title></metadata><manifest><item id="b" href="two.xhtml"/>'
            '<item id="a" href="o%20ne.xhtml"/></manifest><spine><itemref idref="a"/>'
            '<itemref idref="b"/></spine></package>',
        )
        book.writestr("b/o ne.xhtml", "<html><body><p>First.</p></body></html>")
        book.writestr("b/two.xhtml", chapter)
    return out.getvalue()


def test_one_process_reads_many_files():
    assert parse(".html", b"<title>T</title>a").title == "T"
    process = apart._reader._process
    assert parse(".md", b"# H\n\nb").title == "H"
    assert apart._reader._process is process
    with pytest.raises(DocumentError, match="tags open at once"):
        parse(".html", b"<div>" * 50, max_nesting=10)
    assert apart._reader._process is process


def test_a_file_that_takes_too_long_is_refused_and_the_next_is_read():
    slow = b"<p " + b" ".join(b"a%d=1" % n for n in range(60_000)) + b">t"
    with pytest.raises(DocumentError, match=r"within 0\.2 seconds.*max_seconds"):
        parse(".html", slow, max_seconds=0.2)
    assert parse(".html", b"a").text == "a"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a process to its memory")
def test_a_file_that_takes_too_much_memory_is_refused_and_the_next_is_read():
    with pytest.raises(DocumentError, match=r"200,000,000 bytes of memory"):
        parse(".html", b"<b>x</b>" * 800_000, max_memory=200_000_000)
    assert parse(".html", b"a").text == "a"


def test_a_reader_that_dies_is_started_again():
    parse(".html", b"a")
    apart._reader._process.kill()
    assert parse(".html", b"b").text == "b"


def test_a_file_that_ends_its_reader_is_tried_once(monkeypatch):
    started = []
    popen = subprocess.Popen

    def start(command, **more):
        crash = (
            "import os\nfrom lloco_engine.readers import worker\n"
            "worker.parse = lambda suffix, data, config: os.abort()\nworker.main()\n"
        )
        started.append(command)
        return popen([sys.executable, "-P", "-c", crash], **more)

    monkeypatch.setattr(apart.subprocess, "Popen", start)
    for number in range(2):
        reader = apart._Reader()
        with pytest.raises(DocumentError, match=r"ended its reader \(exit code -6\)"):
            reader.parse(".html", b"a", ReadConfig())
        assert len(started) == number + 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process has")
def test_a_reader_that_a_file_left_large_is_replaced():
    parse(".html", b"a")
    process = apart._reader._process
    parse(".html", "<p>é <b>x</b></p>".encode() * 600_000, max_seconds=600)
    assert process.wait(60) == 0
    assert parse(".html", b"a").text == "a"
    assert apart._reader._process is not process


def test_a_style_without_end_is_refused():
    with pytest.raises(DocumentError, match=r"at most 65,536 characters, and one has 200,000"):
        parse(".html", b"<p style='" + b"a;" * 100_000 + b"'>x")


def test_threads_take_turns():
    texts = [None] * 8

    def work(number):
        texts[number] = parse(".html", b"<p>%d" % number).text

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [str(number) for number in range(8)]


def test_a_script_without_a_main_guard_reads_and_ends(tmp_path):
    (tmp_path / "a.html").write_text("<p>text")
    (tmp_path / "lxml.py").write_text("raise SystemExit('the working folder was imported from')")
    (tmp_path / "json.py").write_text("raise SystemExit('the working folder was imported from')")
    script = tmp_path / "sub" / "script.py"
    script.parent.mkdir()
    script.write_text("from lloco_engine.readers import read_paths\nprint([d.text for d in read_paths(['a.html'])])\n")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("['text']\n", 0), done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_a_reader_of_its_own(tmp_path):
    script = (
        "import os\nfrom lloco_engine.config import ReadConfig\nfrom lloco_engine.readers.apart import parse_apart\n"
        "read = lambda: parse_apart('.html', b'a', ReadConfig()).text\nread()\npid = os.fork()\nassert read() == 'a'\n"
        "assert read() == 'a'\nif pid: print(os.waitpid(pid, 0)[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "0\n", done.stderr


def test_a_book_is_read_in_the_order_of_its_spine():
    parsed = parse(".epub", epub(b"<html><body><h1>Two</h1><p hidden>no</p>Second.</body></html>"))
    assert (parsed.title, parsed.text) == ("The book", "First.\n\nTwo\n\nSecond.")


def test_a_chapter_that_the_spine_names_often_is_read_once():
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(epub(b"<p>Two."))) as book, zipfile.ZipFile(out, "w") as made:
        for name in book.namelist():
            made.writestr(name, book.read(name).replace(b"</spine>", b'<itemref idref="a"/>' * 500 + b"</spine>"))
    assert parse(".epub", out.getvalue()).text == "First.\n\nTwo."


def test_an_archive_that_holds_too_much_is_refused_before_it_is_unpacked():
    with pytest.raises(DocumentError, match=r"at most 1,000,000 bytes.*max_unpacked"):
        parse(".epub", epub(b" " * 5_000_000), max_unpacked=1_000_000)


def test_entities_that_grow_are_refused():
    bomb = (
        b'<!DOCTYPE a [<!ENTITY a "'
        + b"x" * 1000
        + b'">'
        + b"".join(b'<!ENTITY %c "%s">' % (98 + n, b"&%c;" % (97 + n) * 100) for n in range(8))
        + b"]><container>&i;</container>"
    )
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as book:
        book.writestr("META-INF/container.xml", bomb)
    with pytest.raises(DocumentError, match="damaged"):
        parse(".epub", out.getvalue(), max_seconds=10)


def test_a_table_is_lines_of_cells():
    assert parse(".csv", b'name;where\n"pump; old";"hall\nthree"\n').text == "name\twhere\npump; old\thall three"
    assert len(parse(".csv", b'a,b\n"' + b"x" * 500_000 + b'",c\n').text) > 500_000


@pytest.mark.parametrize("suffix", [".pdf", ".epub", ".docx", ".pptx", ".xlsx"])
@pytest.mark.parametrize("data", [b"no", b"PK\x03\x04" + b"\0" * 50, b"\xd0\xcf\x11\xe0" + b"\0" * 600])
def test_a_damaged_file_is_refused(suffix, data):
    with pytest.raises(DocumentError):
        parse(suffix, data)


def test_a_long_text_is_refused_with_the_limit(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 101)
    (tmp_path / "b.txt").write_text("x" * 100)
    (tmp_path / "c.jsonl").write_text(json.dumps({"doc_id": "c", "text": "y" * 101}))
    first, second, third = read_paths([tmp_path], config=ReadConfig(max_text=100))
    assert isinstance(first, Failure)
    assert "at most 100 bytes of text" in first.reason
    assert isinstance(second, Document)
    assert "at most 100 bytes of text" in third.reason


@pytest.mark.parametrize("name", ["max_bytes", "max_text", "max_pages", "max_seconds", "max_memory", "max_unpacked"])
def test_limits_are_checked(name):
    with pytest.raises(ConfigError, match=name):
        ReadConfig(**{name: 0})


def test_a_slide_and_a_page_have_numbers(tmp_path):
    pptx = pytest.importorskip("pptx")
    deck = pptx.Presentation()
    for number in (1, 2, 3):
        slide = deck.slides.add_slide(deck.slide_layouts[5])
        slide.shapes.title.text = f"Slide {number}"
        slide.notes_slide.notes_text_frame.text = f"note {number}"
    deck.slides[1].element.set("show", "0")
    deck.save(tmp_path / "d.pptx")
    (document,) = read_paths([tmp_path / "d.pptx"])
    assert document.text == "Slide 1\n\nnote 1\n\nSlide 3\n\nnote 3"
    assert [(page.number, document.text[page.span.start : page.span.end]) for page in document.pages] == [
        (1, "Slide 1\n\nnote 1"),
        (3, "Slide 3\n\nnote 3"),
    ]


def test_a_workbook_is_its_visible_sheets(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.title = "Pumps"
    book.active.append(["name", "rpm"])
    book.active.append(["big", 3150])
    book.create_sheet("Secret").sheet_state = "hidden"
    book["Secret"].append(["no"])
    book.save(tmp_path / "b.xlsx")
    (document,) = read_paths([tmp_path / "b.xlsx"])
    assert document.text == "Pumps\nname\trpm\nbig\t3150"


def test_a_workbook_whose_sheets_are_one_part_over_and_over_is_refused(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    openpyxl.Workbook().save(tmp_path / "one.xlsx")
    with zipfile.ZipFile(tmp_path / "one.xlsx") as one, zipfile.ZipFile(tmp_path / "b.xlsx", "w") as many:
        for name in one.namelist():
            part = one.read(name).decode()
            if name == "xl/workbook.xml":
                before, sheet, after = part.partition(part[part.index("<sheet ") : part.index("</sheets>")])
                part = before + "".join(sheet.replace('"Sheet"', f'"S{k}"') for k in range(40)) + after
            many.writestr(name, part)
    (failure,) = read_paths([tmp_path / "b.xlsx"])
    assert isinstance(failure, Failure) and "names 40 sheets and holds" in str(failure)


def test_a_workbook_is_as_wide_as_what_it_holds(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for at in range(60):
        book.active.cell(1 + 100 * at, 16_384 - at, f"c{at}")
    book.active.cell(1, 1, "first")
    book.save(tmp_path / "b.xlsx")
    (document,) = read_paths([tmp_path / "b.xlsx"])
    lines = document.text.split("\n")
    assert len(document.text) < 5_000 and lines[:2] == ["Sheet", "first" + "\t" * 60 + "c0"] and lines[60] == "\tc59"


OPC = "http://schemas.openxmlformats.org/package/2006"
DOCX = (
    '<w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    ' xmlns:m="http://schemas.openxmlformats.org/officeDocument/2006/math"><w:body>'
    "<w:p><w:r><w:t>One </w:t></w:r><w:r><w:rPr><w:vanish/></w:rPr><w:t>no</w:t></w:r><w:del><w:r><w:delText>gone"
    "</w:delText></w:r></w:del><m:oMath><m:r><m:t>E=m</m:t></m:r><m:sSup><m:e><m:r><m:t>c</m:t></m:r></m:e><m:sup><m:r>"
    "<m:t>2</m:t></m:r></m:sup></m:sSup></m:oMath><w:r><w:t> two</w:t></w:r></w:p>"
    "<w:tbl><w:tr><w:tc><w:p><w:r><w:t>a</w:t></w:r></w:p></w:tc><w:tc><w:p><w:r><w:t>b</w:t></w:r></w:p></w:tc></w:tr>"
    "</w:tbl></w:body></w:document>"
)


def test_a_word_document_is_what_it_shows(tmp_path):
    pytest.importorskip("mammoth")
    with zipfile.ZipFile(tmp_path / "a.docx", "w") as out:
        out.writestr(
            "[Content_Types].xml", '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"/>'
        )
        out.writestr(
            "_rels/.rels",
            f'<Relationships xmlns="{OPC}/relationships"><Relationship Id="r" Type="http://schemas.openxmlformats.org/'
            'officeDocument/2006/relationships/officeDocument" Target="word/document.xml"/></Relationships>',
        )
        out.writestr("word/document.xml", DOCX)
    (document,) = read_paths([tmp_path / "a.docx"])
    assert isinstance(document, Document), document
    assert document.text.split() == ["One", "E=mc^2", "two", "a", "b"]


def test_a_missing_extra_is_named(tmp_path):
    for folder in ("mammoth", "pptx", "openpyxl"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text(f"raise ImportError(name={folder!r})")
    script = (
        "import io, zipfile\nfrom lloco_engine.config import ReadConfig\n"
        "from lloco_engine.readers.formats import parse\n"
        "out = io.BytesIO()\nzipfile.ZipFile(out, 'w').close()\n"
        "for suffix in ('.docx', '.pptx', '.xlsx'):\n"
        "    try: parse(suffix, out.getvalue(), ReadConfig())\n    except Exception as error: print(error)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(apart.__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.stdout.count("pip install 'lloco[documents]'") == 3, done.stdout + done.stderr


def test_the_command_line_takes_limits():
    import typer

    from lloco_engine.cli.options import parse_limits

    assert parse_limits(["max_pages=9", "max_seconds=2.5"]) == ReadConfig(max_pages=9, max_seconds=2.5)
    for wrong in ("max_pages=0", "pages=3", "max_pages=many"):
        with pytest.raises(typer.BadParameter, match="pages"):
            parse_limits([wrong])
