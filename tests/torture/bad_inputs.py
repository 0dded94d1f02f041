"""Bad files by kind: each maker draws one of its kind, its name or suffix and its bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from good_files import TEXT, WORD, archive, docx, epub, good_files, members, one_page, pdf, pptx, stream, xlsx

Made = tuple[str, bytes]
MAKERS: dict[str, Callable[[random.Random], Made]] = {}
_GOOD: dict[str, bytes] = {}
_SUFFIXES = (".txt", ".md", ".html", ".pdf", ".jsonl", ".csv", ".tsv", ".epub", ".docx", ".pptx", ".xlsx", ".xhtml")


def good(suffix: str) -> bytes:
    """A small good file; made once."""
    if not _GOOD:
        _GOOD.update(good_files())
    return _GOOD[suffix]


def maker(make: Callable[[random.Random], Made]) -> Callable[[random.Random], Made]:
    MAKERS[make.__name__.replace("_", " ")] = make
    return make


def texts(suffix: str, kinds: dict[str, Callable[[random.Random], str | bytes]]) -> None:
    """Makers of files of one suffix."""
    for name, kind in kinds.items():

        def make(rng: random.Random, kind: Callable[[random.Random], str | bytes] = kind) -> Made:
            made = kind(rng)
            return suffix, made if isinstance(made, bytes) else made.encode("utf-8", "surrogatepass")

        MAKERS[f"{suffix} {name}"] = make


def n(rng: random.Random, least: int, most: int) -> int:
    return rng.randrange(least, most + 1)


# -- text, Markdown, HTML --------------------------------------------------------------------------------------------

texts(
    ".md",
    {
        "heading of spaces": lambda r: f"# {' ' * n(r, 20_000, 300_000)}x #\n\n{TEXT}",
        "backticks": lambda r: " ".join("`" * k for k in range(1, n(r, 500, 900))),
        "brackets": lambda r: "[" * n(r, 20_000, 60_000) + "](a)" * 1000,
        "emphasis": lambda r: "*a **b _c " * n(r, 2_000, 8_000),
        "quotes in quotes": lambda r: ">" * n(r, 5_000, 60_000) + "x",
        "lists in lists": lambda r: "".join("  " * k + "- x\n" for k in range(n(r, 200, 600))),
        "comments": lambda r: "<!--" * n(r, 50_000, 200_000) + TEXT + "-->`" * n(r, 1_000, 50_000),
        "definitions": lambda r: f"# {TEXT}\n" + "".join(f"[{k}]: <{k}> '\n" for k in range(n(r, 2_000, 9_000))),
        "aliases in its front matter": lambda r: (
            "---\na0: &a0 [x]\n"
            + "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 20)}]\n" for k in range(1, n(r, 8, 30)))
            + f"title: [*a{7}]\n---\n{TEXT}"
        ),
        "a number as title": lambda r: f"---\ntitle: 0x{'f' * n(r, 5_000, 60_000)}\n---\n{TEXT}",
        "a deep front matter": lambda r: f"+++\ntitle = {'[' * n(r, 2_000, 60_000)}\n+++\n{TEXT}",
        "deep YAML": lambda r: f"---\ntitle: {'[' * n(r, 2_000, 60_000)}\n---\n{TEXT}",
    },
)
texts(
    ".html",
    {
        "spaces in pre": lambda r: f"<pre>{' ' * n(r, 10**6, 3 * 10**6)}x</pre>",
        "unclosed tags": lambda r: r.choice(("<b>x", "<font size=1>x", "<a>", "<nobr>")) * n(r, 9_000, 40_000),
        "deep": lambda r: f"<{(tag := r.choice(('div', 'span', 'ul><li')))}>" * n(r, 9_000, 100_000) + tag,
        "formats without end": lambda r: "".join(f"<b id={k}>" for k in range(n(r, 2_000, 6_000))) + "<p>x" * 5_000,
        "huge attribute": lambda r: f"<p {r.choice(('title', 'style', 'class'))}='{'a;' * n(r, 10**6, 2 * 10**6)}'>x",
        "entities": lambda r: (
            r.choice(("&amp;", "&#xD800;", "&#0;", "&#x10ffff;", "&notin;", "&")) * n(r, 9_000, 60_000)
        ),
        "attributes": lambda r: f"<p {' '.join(f'a{k}=1' for k in range(n(r, 20_000, 200_000)))}>x",
        "inline styles": lambda r: "".join(
            f"<p style='color:rgb({k % 256},{k // 256 % 256},0);top:{k}px'>x" for k in range(n(r, 5_000, 30_000))
        ),
        "rules": lambda r: (
            "<style>"
            + "".join(f".c{k} > p:not(.d{k}), #i{k} ~ * * {{color: #{k:06x}}}" for k in range(n(r, 2_000, 9_000)))
            + "</style>"
            + "<p class=c1>x" * 2_000
        ),
        "nested rules": lambda r: (
            f"<style>{r.choice(('a{', '(', '@media all{', '[', 'a:not(')) * n(r, 500, 90_000)}</style>x"
        ),
        "nested values": lambda r: f"<p style='color:{'(' * n(r, 500, 90_000)}'>x",
        "titles": lambda r: "<title>" * n(r, 10_000, 50_000) + "<svg>" * 5_000 + TEXT,
        "open angles": lambda r: r.choice(("<", "<!", "</", "<a", "<!--", "<![CDATA[")) * n(r, 10**5, 10**6) + TEXT,
        "formulas": lambda r: f"<math>{'<msup><mi>x</mi>' * n(r, 2_000, 9_000)}",
        "tables in tables": lambda r: "<table><tr><td>x" * n(r, 1_000, 30_000),
        "list that counts": lambda r: f"<ol start={'9' * n(r, 5, 9_999)}>" + f"<li value=-{'9' * 9}>x" * 9_000,
        "a lie of its charset": lambda r: (
            b"<meta charset=%s><p>\xe9\xff\x80 caf\xe9"
            % r.choice(
                (b"utf-16", b"rot13", b"zip", b"idna", b"unicode_escape", b"utf-7", b"x-user-defined", b"hz-gb-2312")
            )
        ),
    },
)
texts(
    ".txt",
    {
        "over its size": lambda r: b"x" * (100_000_000 + n(r, 1, 99)),
        "accents on one letter": lambda r: "e" + "\u0301" * n(r, 20_000, 200_000),
        "joined emoji": lambda r: "\U0001f468\u200d" * n(r, 9_000, 50_000),
        "flags": lambda r: "\U0001f1e6" * n(r, 5_000, 20_000) + "\U000e0041" * n(r, 5_000, 20_000),
        "one word": lambda r: r.choice("ax漢") * n(r, 10**5, 10**6),
        "line ends": lambda r: r.choice(("\n", "\r", "\v", "\x0c", "\u2028", "\x85")) * n(r, 10**5, 10**6) + "x",
        "directions": lambda r: "\u202e\u2066" * n(r, 1_000, 20_000) + TEXT,
        "NUL": lambda r: TEXT + "\0" * n(r, 1, 3_000) + TEXT,
        "a character cut": lambda r: (TEXT + "é漢\U0001f600")[: -n(r, 0, 2) or None].encode()[: -n(r, 1, 2)],
        "a piece of UTF-16": lambda r: (TEXT + "漢Ж").encode(r.choice(("utf-16-le", "utf-16-be", "utf-16")))[
            n(r, 0, 3) : -n(r, 1, 9)
        ],
        "a piece of UTF-32": lambda r: (TEXT + "漢Ж").encode(r.choice(("utf-32-le", "utf-32-be", "utf-32")))[
            n(r, 0, 5) : -n(r, 1, 9)
        ],
        "a mark alone": lambda r: r.choice(
            (b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf", b"\xff\xfe\0\0", b"\0\0\xfe\xff")
        ),
        "surrogates": lambda r: TEXT + "\ud800" * n(r, 1, 900),
        "escapes of a terminal": lambda r: "\x1b$B\x1b[2J\x1b(B" * n(r, 1, 9_000) + TEXT,
        "bytes beyond ASCII": lambda r: bytes(r.choices(range(128, 256), k=n(r, 100, 300_000))),
    },
)

# -- tables and records ----------------------------------------------------------------------------------------------

texts(
    ".csv",
    {
        "one field": lambda r: f'a,b\n"{"x" * n(r, 10**5, 10**6)}",c\n',
        "a quote without end": lambda r: 'a,b\n"' + "x,y\n" * n(r, 10_000, 50_000),
        "delimiters": lambda r: r.choice(",;|\t") * n(r, 10**5, 10**6) + "x",
        "quotes": lambda r: '"' * n(r, 10**5, 10**6),
        "NUL": lambda r: "a,b\0\n" * n(r, 1, 900),
    },
)


def record(**fields: object) -> str:
    return json.dumps({"doc_id": "r", "text": TEXT, **fields}) + "\n"


texts(
    ".jsonl",
    {
        "giant line": lambda r: (
            b'{"doc_id": "g", "text": "' + b"x" * (80_000_000 + n(r, 1, 99)) + b'"}\n' + record().encode()
        ),
        "deep": lambda r: (
            '{"doc_id": "d", "text": "x", "a": ' + r.choice(("[", '{"a":')) * n(r, 900, 200_000) + "\n" + record()
        ),
        "numbers": lambda r: "".join(
            record(a="@").replace('"@"', value)
            for value in (
                "NaN",
                "-Infinity",
                "1e400",
                "9" * n(r, 20, 9_000),
                "1E-400",
                "-0",
                "0x1",
                "9223372036854775808",
            )
        ),
        "keys twice": lambda r: '{"doc_id": "a", "doc_id": "b", "text": "x", "text": 3}\n' * n(r, 1, 50),
        "wrong types": lambda r: (
            "".join(
                json.dumps(value) + "\n"
                for value in (1, None, [], "x", {}, {"doc_id": 1, "text": "x"}, {"doc_id": "a", "text": ["x"]})
            )
            + record(title=r.choice((1, [], {}, False)))
        ),
        "surrogates in keys": lambda r: (
            '{"doc_id": "a", "text": "x", "\\ud800": 1}\n{"doc_id": "\\udfff", "text": "x"}\n'
        ),
        "names of frameworks": lambda r: (
            record(
                **{
                    key: r.choice(("x", 1, True))
                    for key in ("_node_content", "_node_type", "langchain", "document_id", "page")
                }
            )
            + record(doc_id="s", tenant="other", group=r.choice(("../x", "", "law")))
        ),
        "many keys": lambda r: record(**{f"k{k}": k for k in range(n(r, 500, 5_000))}),
        "odd names": lambda r: "".join(
            record(doc_id=doc_id)
            for doc_id in ("", " ", "a\nb", "\0", "x" * n(r, 9_000, 20_000), "../../etc/passwd", "#")
        ),
        "many records": lambda r: "".join(record(doc_id=f"m{k % 40}", text=f"x{k % 7}") for k in range(n(r, 50, 200))),
        "line ends": lambda r: (record() + "\u2028\n" + record(doc_id="s")).replace(
            "\n", r.choice(("\r\n", "\r", "\n\n"))
        ),
        "UTF-16": lambda r: (record() * 3).encode(r.choice(("utf-16", "utf-16-be", "utf-32")))[: -n(r, 1, 9)],
    },
)

# -- PDF -------------------------------------------------------------------------------------------------------------

CATALOG = b"<< /Type /Catalog /Pages 2 0 R >>"
SHOW = b"BT /F1 12 Tf 20 100 Td (pump) Tj ET "
texts(
    ".pdf",
    {
        "cut": lambda r: good(".pdf")[: n(r, 5, len(good(".pdf")) - 1)],
        "a page that holds itself": lambda r: pdf(
            [CATALOG, b"<< /Type /Pages /Kids [2 0 R 2 0 R] /Count %d >>" % n(r, 1, 9)]
        ),
        "deep tree": lambda r: pdf(
            [CATALOG]
            + [b"<< /Type /Pages /Kids [%d 0 R] /Count 1 >>" % (k + 3) for k in range(n(r, 500, 9_000))]
            + [b"<< /Type /Page >>"]
        ),
        "bomb": lambda r: one_page(SHOW + b" " * n(r, 10**8, 3 * 10**8), packed=True),
        "bomb in a bomb": lambda r: one_page(
            b"/X Do",
            b"/XObject << /X 6 0 R >>",
            stream(SHOW * n(r, 10**5, 10**6), b"/Type /XObject /Subtype /Form", packed=True),
        ),
        "many pages": lambda r: pdf(
            [
                CATALOG,
                b"<< /Type /Pages /Kids [%s] /Count %d >>" % (b"3 0 R " * (k := n(r, 5_001, 100_000)), k),
                b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 9 9] >>",
            ]
        ),
        "pages that may be": lambda r: pdf(
            [
                CATALOG,
                b"<< /Type /Pages /Kids [%s] /Count %d >>" % (b"3 0 R " * (k := n(r, 900, 4_999)), k),
                b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 400 200] /Contents 4 0 R"
                b" /Resources << /Font << /F1 5 0 R >> >> >>",
                stream(SHOW),
                b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
            ]
        ),
        "a count that lies": lambda r: good(".pdf").replace(
            b"/Count 1", b"/Count %d" % r.choice((-1, 0, 4_999, 2**31, 2**63))
        ),
        "a form that holds itself": lambda r: one_page(
            b"/X Do",
            b"/XObject << /X 6 0 R >>",
            stream(
                b"/X Do " * n(r, 1, 50) + SHOW,
                b"/Type /XObject /Subtype /Form /Resources << /XObject << /X 6 0 R >> >>",
            ),
        ),
        "a table before itself": lambda r: pdf(
            [CATALOG, b"<< /Type /Pages /Kids [] /Count 0 >>"], prev=r.choice((-1, 0, 10**9))
        ),
        "many texts": lambda r: one_page(SHOW * n(r, 9_000, 60_000), packed=True),
        "many boxes": lambda r: one_page(b"1 0 0 rg 0 0 9 9 re f " * n(r, 5_000, 50_000) + SHOW, packed=True),
        "deep arrays": lambda r: one_page(b"[" * n(r, 10_000, 10**6) + SHOW, b"/Y " + b"[" * n(r, 400, 90_000)),
        "numbers out of range": lambda r: one_page(
            b"BT /F1 1e38 Tf 1e38 -1e38 Td 99999999999999999999 Tz (pump) Tj ET"
        ),
    },
)

# -- archives --------------------------------------------------------------------------------------------------------


def changed(suffix: str, name: str, data: str | bytes) -> bytes:
    return archive(members(good(suffix)) | {name: data})


def sheet(inside: str) -> bytes:
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    return changed(
        ".xlsx", "xl/worksheets/sheet1.xml", f'<worksheet xmlns="{main}"><sheetData>{inside}</sheetData></worksheet>'
    )


PARAGRAPH = f"<w:p><w:r><w:t>{TEXT}</w:t></w:r></w:p>"
LAUGHS = (
    '<!DOCTYPE a [<!ENTITY a "xxxxxxxxxx">'
    + "".join(f'<!ENTITY {chr(98 + k)} "{f"&{chr(97 + k)};" * 50}">' for k in range(8))
    + "]>"
)
texts(
    ".docx",
    {
        "bomb by its contents": lambda r: docx(PARAGRAPH, **{"word/x.xml": b" " * n(r, 200_000_001, 250_000_000)}),
        "bomb within the limit": lambda r: docx(f"<w:p><w:r><w:t>{' ' * n(r, 10**7, 10**8)}x</w:t></w:r></w:p>"),
        "deep": lambda r: docx(f"<w:p>{'<w:ins>' * (k := n(r, 200, 90_000))}{'</w:ins>' * k}</w:p>"),
        "tables in tables": lambda r: docx(
            f"{'<w:tbl><w:tr><w:tc>' * (k := n(r, 20, 900))}{PARAGRAPH}{'</w:tc></w:tr></w:tbl>' * k}"
        ),
        "wide cells": lambda r: docx(
            f'<w:tbl><w:tr><w:tc><w:tcPr><w:gridSpan w:val="{n(r, 10**6, 10**9)}"/></w:tcPr>'
            f"{PARAGRAPH}</w:tc></w:tr></w:tbl>"
        ),
        "entities": lambda r: changed(
            ".docx",
            "word/document.xml",
            f'{LAUGHS}<w:document xmlns:w="{WORD}"><w:body>&{r.choice("efgh")};</w:body></w:document>',
        ),
        "many paragraphs": lambda r: docx("<w:p/>" * n(r, 10**5, 3 * 10**5) + PARAGRAPH),
        "names that climb": lambda r: docx(PARAGRAPH, **{"../../" * n(r, 1, 9) + "x.xml": "x", "/word/y.xml": "<a/>"}),
        "no body": lambda r: changed(".docx", "word/document.xml", r.choice(("", "<a/>", "<w:document", b"\xff\xfe"))),
    },
)
texts(
    ".xlsx",
    {
        "far corner": lambda r: sheet('<row r="1048576"><c r="XFD1048576"><v>1</v></c></row>' * n(r, 1, 3)),
        "wide rows": lambda r: sheet(
            "".join(f'<row r="{k}"><c r="XFD{k}"><v>1</v></c></row>' for k in range(1, n(r, 200, 900)))
        ),
        "rows that go back": lambda r: sheet(
            '<row r="9"><c r="B9"><v>1</v></c></row><row r="-2"><c r="A0"><v>x</v></c></row>'
        ),
        "strings that are not there": lambda r: sheet(f'<row r="1"><c r="A1" t="s"><v>{n(r, 10, 10**9)}</v></c></row>'),
        "many strings": lambda r: changed(
            ".xlsx",
            "xl/sharedStrings.xml",
            '<sst xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main">'
            + "<si><t>x</t></si>" * n(r, 10**5, 10**6)
            + "</sst>",
        ),
        "dates out of range": lambda r: sheet(f'<row r="1"><c r="A1" t="d"><v>{"9" * n(r, 4, 99)}-99-99</v></c></row>'),
        "entities": lambda r: changed(".xlsx", "xl/workbook.xml", f"{LAUGHS}<workbook>&{r.choice('efgh')};</workbook>"),
        "long cells": lambda r: xlsx([["x" * 32_767] * n(r, 2, 9)]),
    },
)
texts(
    ".epub",
    {
        "bomb": lambda r: epub(b" " * n(r, 5 * 10**7, 2 * 10**8)),
        "one chapter often": lambda r: epub(f"<p>{'<b>x</b>' * 50}", spine=n(r, 20_000, 100_000)),
        "an empty chapter often": lambda r: epub(f"<p>{'<b></b>' * 2_000}", spine=n(r, 20_000, 100_000)),
        "entities": lambda r: epub(TEXT, head=LAUGHS.replace("a [", "package [")),
        "deep": lambda r: epub("<div>" * n(r, 5_000, 90_000)),
        "many members": lambda r: archive({f"{k}": "" for k in range(n(r, 20_001, 30_000))}),
        "an archive in it": lambda r: epub(epub(TEXT)),
        "its size is a lie": lambda r: lying(epub(TEXT + " " * n(r, 10**6, 10**7))),
    },
)
texts(
    ".pptx",
    {
        "groups in groups": lambda r: changed(
            ".pptx",
            "ppt/slides/slide1.xml",
            members(good(".pptx"))["ppt/slides/slide1.xml"].replace(
                b"</p:spTree>", b"<p:grpSp>" * (k := n(r, 100, 9_000)) + b"</p:grpSp>" * k + b"</p:spTree>"
            ),
        ),
        "no slide": lambda r: archive({k: v for k, v in members(good(".pptx")).items() if "slides/slide1" not in k}),
        "one long slide": lambda r: pptx("word " * n(r, 10_000, 60_000)),
    },
)


def lying(data: bytes) -> bytes:
    """An archive whose table of contents says less than its members hold."""
    out = bytearray(data)
    at = out.rfind(b"PK\x01\x02")
    out[at + 24 : at + 28] = (9).to_bytes(4, "little")
    return bytes(out)


# -- any format ------------------------------------------------------------------------------------------------------


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Bytes changed, cut out, doubled or put in at a few places."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 3, 30))):
        at, many = rng.randrange(len(out) + 1), rng.choice((1, 4, 100))
        kind = rng.randrange(4)
        if kind == 0:
            out[at : at + many] = rng.randbytes(many)
        elif kind == 1:
            del out[at : at + many]
        elif kind == 2:
            out[at:at] = out[at : at + many] * rng.choice((1, 20))
        else:
            out[at:at] = rng.choice((b"\0", b"\xff", b"<", b'"', b"%s", b"]]>", b"9999999999", b"-1"))
    return bytes(out)


def _mutations(suffix: str) -> Callable[[random.Random], bytes]:
    def make(rng: random.Random) -> bytes:
        data = good(suffix)
        if data.startswith(b"PK") and rng.random() < 0.7:  # inside the archive, whose checksums then are right
            held = members(data)
            name = rng.choice(sorted(held))
            return archive(held | {name: mutated(rng, held[name])})
        return mutated(rng, data)

    return make


for _suffix in (".txt", ".md", ".html", ".csv", ".tsv", ".jsonl", ".pdf", ".epub", ".docx", ".xlsx", ".pptx"):
    texts(_suffix, {"mutated": _mutations(_suffix)})


@maker
def random_bytes(rng: random.Random) -> Made:
    head = rng.choice((b"", b"PK\x03\x04", b"%PDF-1.4\n", b"\xd0\xcf\x11\xe0", b"<html>", b'{"doc_id":'))
    return rng.choice(_SUFFIXES), head + rng.randbytes(n(rng, 1, 90_000))


@maker
def another_format(rng: random.Random) -> Made:
    return rng.choice(_SUFFIXES), good(rng.choice((".txt", ".html", ".jsonl", ".pdf", ".epub", ".xlsx")))


@maker
def nothing(rng: random.Random) -> Made:
    return rng.choice(_SUFFIXES), b" \n\t\0"[: n(rng, 0, 4)]


@maker
def odd_name(rng: random.Random) -> Made:
    names = (
        "a\nb.txt", "\u202etxt.exe.txt", "\udcff\udcfe.md", "-rf.txt", " .txt", "x" * 250 + ".md", "%00#?.txt", "..txt",
        "a\x1b[2J.csv", "CON.txt", "e\u0301.txt", "\u00e9.txt", "$(true).html", "'\";--.txt", "\U0001f600.md", "a.TXT",
        "no suffix",
    )  # fmt: skip
    return rng.choice(names), TEXT.encode()
