"""One small good file of each format, for trials that damage them."""

from __future__ import annotations

import io
import json
import zipfile
import zlib

OPC = "http://schemas.openxmlformats.org/package/2006"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
TEXT = "The pump of hall nine needs oil. Crane Orne lifts the green tram, and the bell rings at six."


def archive(members: dict[str, str | bytes]) -> bytes:
    """A ZIP archive of these members."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
        for name, data in members.items():
            made.writestr(name, data)
    return out.getvalue()


def members(data: bytes) -> dict[str, bytes]:
    """What an archive holds."""
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def pdf(objects: list[bytes], *, root: int = 1, prev: int | None = None) -> bytes:
    """A PDF of these objects, numbered from 1, with a right table of where they are."""
    out = bytearray(b"%PDF-1.7\n")
    places = []
    for number, content in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    at = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % place for place in places)
    before = b"" if prev is None else b"/Prev %d" % (at if prev < 0 else prev)
    out += b"trailer << /Size %d /Root %d 0 R %s >>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, root, before, at)
    return bytes(out)


def stream(data: bytes, more: bytes = b"", *, packed: bool = False) -> bytes:
    """A PDF stream."""
    if packed:
        data, more = zlib.compress(data), more + b"/Filter /FlateDecode"
    return b"<< /Length %d %s >>\nstream\n%s\nendstream" % (len(data), more, data)


def one_page(content: bytes, resources: bytes = b"", *more: bytes, packed: bool = False) -> bytes:
    """A PDF of one page with this content; further objects are numbered from 6."""
    return pdf(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 400 200] /Contents 4 0 R"
            b" /Resources << /Font << /F1 5 0 R >> %s >> >>" % resources,
            stream(content, packed=packed),
            b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
            *more,
        ]
    )


def docx(body: str, **more: str | bytes) -> bytes:
    """A Word document with this body."""
    kind = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
    return archive(
        {
            "[Content_Types].xml": f'<Types xmlns="{OPC}/content-types"><Default Extension="xml" ContentType="{kind}"/>'
            "</Types>",
            "_rels/.rels": f'<Relationships xmlns="{OPC}/relationships"><Relationship Id="r" '
            f'Type="{OFFICE}/officeDocument" Target="word/document.xml"/></Relationships>',
            "word/document.xml": f'<w:document xmlns:w="{WORD}"><w:body>{body}</w:body></w:document>',
            **more,
        }
    )


def epub(chapter: str | bytes, *, spine: int = 1, head: str = "") -> bytes:
    """A book whose spine names one chapter so many times."""
    references = '<itemref idref="a"/>' * spine
    return archive(
        {
            "META-INF/container.xml": '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
            '<rootfile full-path="b/p.opf"/></rootfiles></container>',
            "b/p.opf": f'{head}<package xmlns="http://www.idpf.org/2007/opf"><manifest><item id="a" href="a.xhtml"/>'
            f"</manifest><spine>{references}</spine></package>",
            "b/a.xhtml": chapter,
        }
    )


def xlsx(rows: list[list[object]]) -> bytes:
    """A workbook of one sheet."""
    import openpyxl

    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


def pptx(text: str) -> bytes:
    """A presentation of one slide."""
    import pptx as library

    deck = library.Presentation()
    deck.slides.add_slide(deck.slide_layouts[5]).shapes.title.text = text
    out = io.BytesIO()
    deck.save(out)
    return out.getvalue()


def good_files() -> dict[str, bytes]:
    """A good file by suffix."""
    page = (
        f"<html><head><title>T</title><style>p {{color: red}}</style></head><body><h1>H</h1><p>{TEXT}</p></body></html>"
    )
    return {
        ".txt": f"{TEXT} Größe 漢字.\n".encode(),
        ".md": f"---\ntitle: Pumps\n---\n# Head\n\n{TEXT}\n\n```\ncode\n```\n<!-- no -->\n".encode(),
        ".html": page.encode(),
        ".csv": f'name,where\n"pump; old","hall\nnine"\n{TEXT},x\n'.encode(),
        ".tsv": b"name\twhere\npump\thall nine\n",
        ".jsonl": "".join(
            json.dumps({"doc_id": f"r{n}", "text": TEXT, "title": "T", "year": n}) + "\n" for n in range(3)
        ).encode(),
        ".pdf": one_page(f"BT /F1 12 Tf 20 100 Td ({TEXT}) Tj ET".encode()),
        ".epub": epub(page),
        ".docx": docx(f"<w:p><w:r><w:t>{TEXT}</w:t></w:r></w:p>"),
        ".xlsx": xlsx([["name", "rpm"], ["pump", 3150], [TEXT, None]]),
        ".pptx": pptx(TEXT),
    }
