"""Documents that are ZIP archives: .epub (by this module alone), .docx, .pptx and .xlsx (by the extra ``documents``).

An archive is refused by what its table of contents says before anything in it is unpacked, and ``zipfile`` gives no
more of a member than is said there.
"""

from __future__ import annotations

import io
import posixpath
import zipfile
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote
from xml.etree import ElementTree

from lloco_engine.errors import DocumentError
from lloco_engine.readers.encodings import declared_charset, decode
from lloco_engine.readers.html import text_of_html
from lloco_engine.readers.parsed import Parsed, check_length
from lloco_engine.types import Page, Span

if TYPE_CHECKING:
    from lloco_engine.config import ReadConfig

__all__ = ["parse_docx", "parse_epub", "parse_pptx", "parse_xlsx"]

_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_M = "{http://schemas.openxmlformats.org/officeDocument/2006/math}"
_OPF = "{http://www.idpf.org/2007/opf}"
_CONTAINER = "{urn:oasis:names:tc:opendocument:xmlns:container}"
_DC = "{http://purl.org/dc/elements/1.1/}"
_MOST_MEMBERS = 20_000


def parse_docx(data: bytes, config: ReadConfig) -> Parsed:
    """A Word document: body, tables, lists, notes and text boxes, in order; hidden and deleted text is left out.

    Raises:
        DocumentError: it is damaged, too large unpacked, or the extra is not installed.
    """
    archive = _open(data, config)
    try:
        import mammoth
        from lxml import etree
    except ImportError as error:
        raise _extra(error) from error
    parser = etree.XMLParser(resolve_entities=False, no_network=True, huge_tree=False)
    out = io.BytesIO()
    title = ""
    with archive, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as shown:
        for name in archive.namelist():
            if name.startswith(("word/media/", "word/embeddings/")):
                continue
            member = archive.read(name)
            if name.startswith("word/") and name.endswith(".xml"):
                root = etree.fromstring(member, parser)
                _show(root, etree)
                member = etree.tostring(root)
            elif name == "docProps/core.xml":
                title = etree.fromstring(member, parser).findtext(f"{_DC}title") or ""
            shown.writestr(name, member)
    out.seek(0)
    heading, text = text_of_html(
        str(mammoth.convert_to_html(out, ignore_empty_paragraphs=True).value), config.max_nesting
    )
    return Parsed(" ".join(title.split()) or heading, text)


def _show(root: Any, etree: Any) -> None:
    """Take hidden runs out, and put formulas in as text, which the converter would leave out."""
    for run in list(root.iter(f"{_W}r")):
        vanish = run.find(f"{_W}rPr/{_W}vanish")
        if vanish is not None and vanish.get(f"{_W}val", "1") not in ("0", "false", "off"):
            for part in list(run):
                run.remove(part)
    for formula in list(root.iter(f"{_M}oMath")):
        run = etree.Element(f"{_W}r")
        etree.SubElement(run, f"{_W}t").text = "".join(_formula(formula))
        run.tail = formula.tail
        parent = formula.getparent()
        if parent is None:
            continue
        if parent.tag == f"{_M}oMathPara" and parent.getparent() is not None:
            parent.addnext(run)
        else:
            parent.replace(formula, run)


def _formula(formula: Any) -> Iterator[str]:
    for part in formula.iter():
        if part.tag in (f"{_M}sup", f"{_M}sub"):
            yield "^" if part.tag.endswith("sup") else "_"
        elif part.tag == f"{_M}den":
            yield "/"
        elif part.tag == f"{_M}deg":
            yield "√"
        elif part.tag == f"{_M}t":
            yield part.text or ""


def parse_pptx(data: bytes, config: ReadConfig) -> Parsed:
    """A presentation: each slide's text, tables and notes, a slide a page; hidden slides are left out.

    Raises:
        DocumentError: it is damaged, too large unpacked, or the extra is not installed.
    """
    _open(data, config).close()
    try:
        import pptx
    except ImportError as error:
        raise _extra(error) from error
    presentation = pptx.Presentation(io.BytesIO(data))
    slides = list(presentation.slides)
    if len(slides) > config.max_pages:
        raise DocumentError(
            f"a presentation must have at most {config.max_pages:,} slides, not {len(slides):,}; raise max_pages"
        )
    texts = ["" if slide.element.get("show") == "0" else "\n".join(_slide(slide)).strip() for slide in slides]
    pieces, pages, at = list[str](), list[Page](), 0
    for number, text in enumerate(texts, 1):
        if text:
            at += 2 if pieces else 0
            pages.append(Page(number, "", Span(at, at + len(text))))
            pieces.append(text)
            at += len(text)
    title = presentation.core_properties.title or ""
    return Parsed(" ".join(title.split()), "\n\n".join(pieces), pages=tuple(pages))


def _slide(slide: Any) -> Iterator[str]:
    yield from _shapes(slide.shapes)
    if slide.has_notes_slide and (frame := slide.notes_slide.notes_text_frame) is not None and frame.text.strip():
        yield f"\n{_lines(frame.text)}"


def _shapes(shapes: Iterable[Any]) -> Iterator[str]:
    waiting = list(reversed(list(shapes)))
    while waiting:
        shape = waiting.pop()
        if hasattr(shape, "shapes"):
            waiting += reversed(list(shape.shapes))
        elif getattr(shape, "has_table", False):
            for row in shape.table.rows:
                yield "\t".join(" ".join(cell.text.split()) for cell in row.cells)
        elif getattr(shape, "has_text_frame", False) and shape.text_frame.text.strip():
            yield _lines(shape.text_frame.text)


def _lines(text: str) -> str:
    return text.replace("\v", "\n")


def parse_xlsx(data: bytes, config: ReadConfig) -> Parsed:
    """A workbook: each sheet's name and rows, cells parted by tabs, with the values last calculated.

    Hidden sheets are left out, and so are rows and columns that hold nothing.

    Raises:
        DocumentError: it is damaged, too large, or the extra is not installed.
    """
    with _open(data, config) as archive:
        parts = len(archive.namelist())
    try:
        import openpyxl
    except ImportError as error:
        raise _extra(error) from error
    book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True)
    try:
        if len(book.worksheets) > parts:  # one part shown thousands of times makes a large document of a small file
            raise DocumentError(
                f"a workbook must hold its sheets, each a part of its own; this one names {len(book.worksheets):,} "
                f"sheets and holds {parts:,} parts: save it anew with the program that made it"
            )
        title = book.properties.title or ""
        pieces: list[str] = []
        size = 0
        for sheet in book.worksheets:
            if sheet.sheet_state != "visible":
                continue
            sheet.reset_dimensions()
            rows: list[dict[int, str]] = []
            for row in sheet.iter_rows(values_only=True):
                cells = {at: " ".join(str(value).split()) for at, value in enumerate(row) if value is not None}
                if cells := {at: text for at, text in cells.items() if text}:
                    rows.append(cells)
                    size += sum(map(len, cells.values())) + len(cells)
                check_length(size, config.max_text)
            place = {column: at for at, column in enumerate(sorted({column for cells in rows for column in cells}))}
            check_length(size + sum(place[max(cells)] for cells in rows), config.max_text)
            if rows:
                pieces.append("\n".join((sheet.title, *(_line(cells, place) for cells in rows))))
    finally:
        book.close()
    return Parsed(" ".join(title.split()), "\n\n".join(pieces))


def _line(cells: dict[int, str], place: dict[int, int]) -> str:
    """A row, each cell in its place among the columns that hold something."""
    line = [""] * (place[max(cells)] + 1)
    for column, text in cells.items():
        line[place[column]] = text
    return "\t".join(line)


def parse_epub(data: bytes, config: ReadConfig) -> Parsed:
    """A book: the chapters of its spine, in reading order.

    Raises:
        DocumentError: it is damaged or encrypted, or too large unpacked.
    """
    with _open(data, config) as archive:
        names = set(archive.namelist())
        if "META-INF/encryption.xml" in names and b"EncryptedData" in archive.read("META-INF/encryption.xml"):
            fonts_only = all(name.lower().endswith((".ttf", ".otf", ".woff", ".woff2")) for name in _encrypted(archive))
            if not fonts_only:
                raise DocumentError("an EPUB must not be encrypted, and this one is; save it without")
        container = ElementTree.fromstring(archive.read("META-INF/container.xml"))
        rootfile = next((found.get("full-path") for found in container.iter(f"{_CONTAINER}rootfile")), None)
        if not rootfile or rootfile not in names:
            raise DocumentError("the EPUB is damaged: it names no package document")
        package = ElementTree.fromstring(archive.read(rootfile))
        title = package.findtext(f".//{_DC}title") or ""
        home = posixpath.dirname(rootfile)
        items = {item.get("id"): item.get("href", "") for item in package.iter(f"{_OPF}item")}
        chapters: list[str] = []
        size = 0
        met = set[str]()
        for reference in package.iter(f"{_OPF}itemref"):
            href = unquote(items.get(reference.get("idref"), "").split("#")[0])
            name = posixpath.normpath(posixpath.join(home, href))
            if name not in names or name in met:  # a spine names each chapter once
                continue
            met.add(name)
            page = archive.read(name)
            source, _ = decode(page, declared=declared_charset(page))
            if text := text_of_html(source, config.max_nesting)[1]:
                chapters.append(text)
                size += len(text)
            check_length(size, config.max_text)
    return Parsed(" ".join(title.split()), "\n\n".join(chapters))


def _encrypted(archive: zipfile.ZipFile) -> Iterator[str]:
    for node in ElementTree.fromstring(archive.read("META-INF/encryption.xml")).iter():
        if node.tag.endswith("CipherReference"):
            yield node.get("URI", "")


def _open(data: bytes, config: ReadConfig) -> zipfile.ZipFile:
    """The archive, judged by its table of contents.

    Raises:
        DocumentError: it is no archive, is encrypted, or holds more than it may.
    """
    if data.startswith(b"\xd0\xcf\x11\xe0"):
        raise DocumentError(
            "the file is encrypted or of Office before 2007; save it without a password, in today's format"
        )
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise DocumentError(f"the file is damaged: it is not a ZIP archive ({error})") from error
    members = archive.infolist()
    size = sum(member.file_size for member in members)
    if size > config.max_unpacked or len(members) > _MOST_MEMBERS:
        archive.close()
        raise DocumentError(
            f"an archive must hold at most {config.max_unpacked:,} bytes in {_MOST_MEMBERS:,} files, and this one "
            f"holds {size:,} in {len(members):,}; raise max_unpacked"
        )
    return archive


def _extra(error: ImportError) -> DocumentError:
    return DocumentError(
        f".docx, .pptx and .xlsx need the extra 'documents', and {error.name} is not installed; "
        "pip install 'lloco[documents]'"
    )
