"""More bad files by kind, as somebody else would draw them: archives in archives, trees that are rings, mixed marks."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile

from bad_inputs import MAKERS, PARAGRAPH, SHOW, changed, good, n, sheet, texts
from good_files import OFFICE, TEXT, WORD, archive, docx, epub, members, one_page, pdf, stream

__all__ = ["MAKERS"]

MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\xff\xfe\0\0", b"\0\0\xfe\xff")
CODES = ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "utf-7", "cp1252", "cp037")

# -- text and its marks ----------------------------------------------------------------------------------------------


def mixed(rng: random.Random) -> bytes:
    """Pieces of a text in several encodings, with marks before, in and after them."""
    pieces = [rng.choice(MARKS), f"{TEXT} é漢".encode(rng.choice(CODES), "ignore")]
    for _ in range(n(rng, 0, 3)):
        pieces += [rng.choice((*MARKS, b"", b"\n")), f"{TEXT} Ж".encode(rng.choice(CODES), "ignore")]
    return b"".join(pieces)


for _suffix in (".txt", ".md", ".html", ".csv", ".jsonl"):
    texts(_suffix, {"mixed marks": mixed})
texts(
    ".txt",
    {
        "UTF-7": lambda r: f"{TEXT} größe <b>漢字</b>\n".encode("utf-7") * n(r, 1, 900),
        "UTF-7 without end": lambda r: b"+" + b"AGEA" * n(r, 1_000, 90_000),
        "overlong UTF-8": lambda r: (
            TEXT.encode() + r.choice((b"\xc0\xaf", b"\xe0\x80\xaf", b"\xf8\x88\x80\x80\x80")) * 9
        ),
        "marks": lambda r: r.choice(MARKS) * n(r, 1_000, 90_000) + TEXT.encode(),
    },
)

# -- records and tables ----------------------------------------------------------------------------------------------


def nested(rng: random.Random, depth: int) -> bytes:
    """Records of a field so deep, closed as it should be; and one that is as it should be."""
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")))
    deep = opening * depth + "1" + closing * depth
    field = rng.choice(('"a"', '"title"', '"text"', '"doc_id"', '"source"'))
    return f'{{"doc_id": "d", "text": "x", {field}: {deep}}}\n{json.dumps({"doc_id": "e", "text": TEXT})}\n'.encode()


def number(rng: random.Random) -> str:
    digits = "9" * n(rng, 4_000, 10**6)
    return rng.choice((digits, f"-{digits}", f"0.{digits}", f"1e{digits}", f"{digits}e-{len(digits)}", f"{digits}.0"))


texts(
    ".jsonl",
    {
        "a deep field": lambda r: nested(r, n(r, 50, 3_000)),
        "a very deep field": lambda r: nested(r, n(r, 3_000, 300_000)),
        "huge numbers": lambda r: f'{{"doc_id": "n", "text": "x", "a": {number(r)}, "b": [{number(r)}]}}\n',
        "a mark on each line": lambda r: "".join(
            f'\ufeff{{"doc_id": "m{k}", "text": "x"}}\n' for k in range(n(r, 1, 99))
        ),
        "one long key": lambda r: json.dumps({"doc_id": "k", "text": "x", "k" * n(r, 10**5, 10**7): 1}),
        "escapes": lambda r: (
            '{"doc_id": "e", "text": "' + r.choice(("\\u0000", "\\ud83d", "\\\\", "\\/")) * 90_000 + '"}'
        ),
    },
)
texts(
    ".csv",
    {
        "a million columns": lambda r: "\n".join(["," * n(r, 10**6, 2 * 10**6) + "x"] * n(r, 1, 3)),
        "a million rows": lambda r: r.choice(("\n", ",\n", '""\n')) * n(r, 10**6, 2 * 10**6) + "x",
        "longer and longer rows": lambda r: "\n".join("," * k + "x" for k in range(n(r, 500, 1_500))),
        "other quotes": lambda r: '\'a;b\'|"c\t""d""\\"\n' * n(r, 100, 50_000),
    },
)

# -- PDF: rings ------------------------------------------------------------------------------------------------------


def ring(more: bytes, *objects: bytes) -> bytes:
    """A good page whose catalogue also says this; further objects are numbered from 6."""
    return one_page(SHOW, b"", *objects).replace(b"/Type /Catalog", b"/Type /Catalog " + more, 1)


def bent(data: bytes, old: bytes, new: bytes) -> bytes:
    """A PDF with something changed, and so a wrong table, which a reader mends."""
    assert old in data
    return data.replace(old, new, 1)


texts(
    ".pdf",
    {
        "a ring of outlines": lambda r: ring(
            b"/Outlines 6 0 R",
            b"<< /First 7 0 R /Last 7 0 R /Count %d >>" % r.choice((-1, 1, 2**31)),
            b"<< /Title (x) /Parent 6 0 R /Next 7 0 R /Prev 7 0 R /First 6 0 R >>",
        ),
        "a ring of page labels": lambda r: ring(
            b"/PageLabels 6 0 R",
            b"<< /Kids [7 0 R 6 0 R] >>",
            b"<< /Kids [6 0 R 7 0 R] /Limits [0 %d] >>" % n(r, 0, 10**9),
        ),
        "deep page labels": lambda r: ring(
            b"/PageLabels 6 0 R", *(b"<< /Kids [%d 0 R] >>" % (k + 7) for k in range(n(r, 500, 30_000)))
        ),
        "a ring of names": lambda r: ring(
            b"/Names << /Dests 6 0 R /EmbeddedFiles 6 0 R >>", b"<< /Kids [6 0 R 6 0 R] >>"
        ),
        "a tree of rings": lambda r: pdf(
            [b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [3 0 R 4 0 R] /Count 9 >>"]
            + [b"<< /Type /Pages /Parent 2 0 R /Kids [%s] /Count 9 >>" % (b"2 0 R 3 0 R 4 0 R " * n(r, 1, 900))] * 2
        ),
        "pages of many parents": lambda r: pdf(
            [b"<< /Type /Catalog /Pages 2 0 R >>"]
            + [
                b"<< /Type /Pages /Kids [%s] /Count %d >>" % (b"%d 0 R " % (k + 3) * 10, 10**9)
                for k in range(n(r, 5, 30))
            ]
            + [b"<< /Type /Page /MediaBox [0 0 9 9] >>"]
        ),
        "its own parent": lambda r: bent(good(".pdf"), b"/Parent 2 0 R /MediaBox [0 0 400 200]", b"/Parent 3 0 R"),
        "a length that is itself": lambda r: bent(one_page(SHOW), b"/Length %d" % len(SHOW), b"/Length 4 0 R"),
        "a font of itself": lambda r: bent(
            one_page(SHOW, b"", stream(b"500 0 0 0 9 9 d1 BT /F1 1 Tf (pump) Tj ET")),
            b"/Subtype /Type1 /BaseFont /Helvetica",
            b"/Subtype /Type3 /FontBBox [0 0 9 9] /FontMatrix [1 0 0 1 0 0] /CharProcs << /a 6 0 R >> /FirstChar 112"
            b" /LastChar 112 /Widths [9] /Encoding << /Differences [112 /a] >> /Resources << /Font << /F1 5 0 R >> >>",
        ),
        "a map of itself": lambda r: bent(
            one_page(
                SHOW, b"", stream(b"/Own usecmap 1 beginbfrange <00> <ffffffff> <0000> endbfrange", b"/UseCMap 6 0 R")
            ),
            b"/BaseFont /Helvetica",
            b"/BaseFont /Helvetica /ToUnicode 6 0 R",
        ),
        "filters on filters": lambda r: bent(
            one_page(SHOW),
            b"/Length %d" % len(SHOW),
            b"/Length 9 /Filter [%s]" % (b"/ASCIIHexDecode " * n(r, 99, 99_999)),
        ),
        "an object of itself": lambda r: bent(good(".pdf"), b"<< /Type /Font", b"5 0 R << /Type /Font"),
    },
)

# -- archives --------------------------------------------------------------------------------------------------------


def packed_often(data: bytes, times: int) -> bytes:
    """An archive in an archive in an archive."""
    for _ in range(times):
        data = archive({"word/document.xml": data, "a.zip": data})
    return data


def overlapping(data: bytes, times: int) -> bytes:
    """An archive whose table of contents names its largest member again and again: a bomb without nesting."""
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        largest = max(opened.infolist(), key=lambda info: info.file_size)
        start = opened.start_dir
    of_data = (largest.CRC, largest.compress_size, largest.file_size)
    out = bytearray(data[:start])
    for number in range(times):
        name = f"word/x{number}.xml".encode()
        head = (b"PK\x01\x02", 20, 20, largest.flag_bits, largest.compress_type, 0, 33, *of_data)
        out += struct.pack("<4s6H3L5H2L", *head, len(name), 0, 0, 0, 0, 0, largest.header_offset) + name
    end = (b"PK\x05\x06", 0, 0, times, times, len(out) - start, start, 0)
    return bytes(out) + struct.pack("<4s4H2LH", *end)


def of_styles(count: int) -> str:
    """Styles each of which is based on the next, and the last on the first."""
    return "".join(
        f'<w:style w:type="paragraph" w:styleId="s{k}"><w:name w:val="s{k}"/>'
        f'<w:basedOn w:val="s{(k + 1) % count}"/></w:style>'
        for k in range(count)
    )


FIELD = '<w:r><w:fldChar w:fldCharType="begin"/></w:r>'
NOTE = '<w:r><w:footnoteReference w:id="1"/></w:r>'
texts(
    ".docx",
    {
        "archives in archives": lambda r: packed_often(docx(PARAGRAPH), n(r, 1, 9)),
        "one member often": lambda r: overlapping(
            docx(PARAGRAPH, **{"word/x.xml": "<a/>" + " " * n(r, 10**4, 10**7)}), n(r, 100, 19_000)
        ),
        "many parts": lambda r: docx(PARAGRAPH, **{f"word/p{k}.xml": "<a/>" for k in range(n(r, 5_000, 19_000))}),
        "styles in a ring": lambda r: docx(
            f'<w:p><w:pPr><w:pStyle w:val="s0"/></w:pPr><w:r><w:t>{TEXT}</w:t></w:r></w:p>',
            **{"word/styles.xml": f'<w:styles xmlns:w="{WORD}">{of_styles(n(r, 1, 999))}</w:styles>'},
        ),
        "fields in fields": lambda r: docx(f"<w:p>{FIELD * n(r, 900, 90_000)}</w:p>{PARAGRAPH}"),
        "attributes": lambda r: docx("<w:p " + " ".join(f'a{k}=""' for k in range(n(r, 9_000, 200_000))) + "/>"),
        "spaces of names": lambda r: docx(
            "".join(f'<w:p xmlns:n{k}="u{k}">' for k in range(240)) + "</w:p>" * 240 + PARAGRAPH
        ),
        "a number without end": lambda r: docx(
            f'<w:p><w:r><w:rPr><w:sz w:val="{"9" * n(r, 9_000, 10**6)}"/></w:rPr><w:t>{TEXT}</w:t></w:r></w:p>'
        ),
        "a note of itself": lambda r: docx(
            f"{PARAGRAPH}<w:p>{NOTE * n(r, 1, 99)}</w:p>",
            **{
                "word/footnotes.xml": f'<w:footnotes xmlns:w="{WORD}"><w:footnote w:id="1">'
                f"<w:p>{NOTE * 2}</w:p></w:footnote></w:footnotes>"
            },
        ),
    },
)


def worksheet(inside: str) -> bytes:
    """The good workbook with another first sheet."""
    return changed(".xlsx", "xl/worksheets/sheet1.xml", f'<worksheet xmlns="{MAIN}">{inside}</worksheet>')


CELL, MERGED = '<row r="1"><c r="A1"><v>1</v></c></row>', '<mergeCell ref="A1:XFD1048576"/>'
STYLE = '<xf numFmtId="0"/>'
texts(
    ".xlsx",
    {
        "everything merged": lambda r: worksheet(
            f'<dimension ref="A1:XFD1048576"/><sheetData>{CELL}</sheetData>'
            f"<mergeCells>{MERGED * n(r, 1, 9)}</mergeCells>"
        ),
        "a wide row": lambda r: sheet(f'<row r="1">{"<c/>" * n(r, 10**5, 10**6)}</row>'),
        "a number without end": lambda r: sheet(f'<row r="1"><c r="A1"><v>{"9" * n(r, 4_000, 10**6)}</v></c></row>'),
        "a far row": lambda r: sheet(f'<row r="{n(r, 10**6, 10**12)}"><c><v>1</v></c></row>'),
        "a place that is none": lambda r: sheet(f'<row r="1"><c r="{"Z" * n(r, 3, 9_000)}1"><v>1</v></c></row>'),
        "many styles": lambda r: changed(
            ".xlsx",
            "xl/styles.xml",
            f'<styleSheet xmlns="{MAIN}"><cellXfs>{STYLE * n(r, 10**5, 10**6)}</cellXfs></styleSheet>',
        ),
        "sheets of one part": lambda r: changed(
            ".xlsx",
            "xl/workbook.xml",
            f'<workbook xmlns="{MAIN}" xmlns:r="{OFFICE}"><sheets>'
            + "".join(f'<sheet name="s{k}" sheetId="{k}" r:id="rId1"/>' for k in range(1, n(r, 900, 20_000)))
            + "</sheets></workbook>",
        ),
    },
)


def book(package: str, **more: str | bytes) -> bytes:
    """A book whose package says this."""
    good_one = members(epub(TEXT))
    return archive(good_one | {"b/p.opf": f'<package xmlns="http://www.idpf.org/2007/opf">{package}</package>', **more})


texts(
    ".epub",
    {
        "a chapter that is the package": lambda r: book(
            '<manifest><item id="a" href="p.opf"/></manifest><spine><itemref idref="a"/></spine>' * n(r, 1, 3)
        ),
        "a chapter above": lambda r: book(
            f'<manifest><item id="a" href="{"../" * n(r, 1, 99)}etc/passwd"/></manifest>'
            '<spine><itemref idref="a"/></spine>'
        ),
        "many items": lambda r: book(
            "<manifest>"
            + "".join(f'<item id="i{k}" href="a.xhtml"/>' for k in range(n(r, 9_000, 90_000)))
            + '</manifest><spine><itemref idref="i1"/></spine>'
        ),
        "archives in archives": lambda r: epub(packed_often(epub(TEXT), n(r, 1, 9))),
        "one member often": lambda r: overlapping(epub(f"<p>{'<b>x</b>' * 10**5}"), n(r, 100, 19_000)),
    },
)
