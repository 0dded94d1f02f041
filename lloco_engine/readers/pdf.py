"""PDF -> the text that its pages show, page by page, by PDFium.

Left out is what no one sees: text in invisible mode (unless a picture lies there, as in a scan with its text), text in
white on the bare page, text smaller than a point, text outside the page, and text under an opaque box.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator
from typing import Any

from lloco_engine.errors import DocumentError
from lloco_engine.readers.parsed import Parsed, check_length
from lloco_engine.types import Page, Span

__all__ = ["parse_pdf"]

_TEXT, _PATH, _IMAGE, _SHADING, _FORM = 1, 2, 3, 4, 5  # PDFium's kinds of objects on a page
_INVISIBLE_MODES = (3, 7)  # neither filled nor stroked; a clip
_WHITE = 250  # of 255, from which on a colour is white
_SMALLEST = 1.0  # points
_MOST_BOXES = 1_000  # of a page, that may lie under or over text
_RECTANGLE = 6  # segments of a path, at most
_DEEPEST_FORM = 8
_CODES = {2: "it cannot be opened", 3: "it is not a PDF, or its structure is broken", 6: "a page cannot be read"}

Box = tuple[float, float, float, float]  # left, bottom, right, top


def parse_pdf(data: bytes, max_pages: int, max_text: int) -> Parsed:
    """The text layer of a PDF, pages parted by blank lines, and the title its properties give.

    Raises:
        DocumentError: it is encrypted, damaged, has no text layer, or more pages or text than it may.
    """
    import pypdfium2 as pdfium

    try:
        document = pdfium.PdfDocument(data)
    except pdfium.PdfiumError as error:
        raise _refusal(error) from error
    with contextlib.closing(document):
        count = len(document)
        if count > max_pages:
            raise DocumentError(
                f"a PDF must have at most {max_pages:,} pages, not {count:,}; split it, or raise max_pages"
            )
        if not count:
            raise DocumentError("the PDF is damaged: it has no pages")
        texts: list[str] = []
        size = broken = 0
        for number in range(count):
            try:
                texts.append(_text_of_page(document, number))
            except pdfium.PdfiumError:
                texts.append("")
                broken += 1
            size += len(texts[-1])
            check_length(size, max_text)
        if broken:
            raise DocumentError(f"the PDF is damaged: {broken:,} of its {count:,} pages cannot be read")
        title = " ".join(_clean(document.get_metadata_value("Title")).split())
        labels = [_clean(document.get_page_label(number)).strip() for number in range(count)]
    texts = _joined_words(texts)
    if not any(texts):
        raise DocumentError(f"a PDF must have a text layer, and none of its {count} pages does; run OCR on it")
    pages, pieces, at = [], list[str](), 0
    for number, (text, label) in enumerate(zip(texts, labels, strict=True), 1):
        if not text:
            continue
        at += 2 if pieces else 0
        pages.append(Page(number, "" if label == str(number) else label, Span(at, at + len(text))))
        pieces.append(text)
        at += len(text)
    return Parsed(title, "\n\n".join(pieces), pages=tuple(pages))


def _refusal(error: Exception) -> DocumentError:
    code = getattr(error, "err_code", None)
    if code == 4:
        return DocumentError("a PDF must not be encrypted, and this one asks for a password; save it without")
    if code == 5:
        return DocumentError("a PDF must not be encrypted, and this one is in a way that is not known; save it without")
    return DocumentError(f"the PDF is damaged: {_CODES.get(code or 0, str(error))}")


def _text_of_page(document: Any, number: int) -> str:
    page = document[number]
    try:
        page.set_rotation(0)  # else the lines of a page that is shown turned come in the wrong order
        _remove_unseen(page)
        words = page.get_textpage()
        try:
            return _clean(words.get_text_range()).strip()
        finally:
            words.close()
    finally:
        page.close()


def _clean(text: str) -> str:
    """Broken fonts yield NULs and lone surrogates, which no text may hold."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


_BROKEN_WORD = re.compile(r"(\w{1,64})\ufffe\s?(\w{1,64})")


def _joined_words(texts: list[str]) -> list[str]:
    """Pages with the words whole that PDFium found a hyphen in, at the end of a line.

    The hyphen stays where the document writes the word with one elsewhere.
    """
    if not any("\ufffe" in text for text in texts):
        return texts
    whole = set[str]()
    for text in texts:
        whole.update(re.findall(r"\w+-\w+", text))

    def join(found: re.Match[str]) -> str:
        hyphened = f"{found[1]}-{found[2]}"
        return hyphened if hyphened in whole or not found[2][0].islower() else found[1] + found[2]

    return [_BROKEN_WORD.sub(join, text).replace("\ufffe", "-") for text in texts]


class _Reader:
    """Reads the facts of page objects into numbers that are made once."""

    def __init__(self) -> None:
        import pypdfium2.raw as raw

        self.raw = raw
        self._box = [ctypes.c_float() for _ in range(4)]
        self._rgba = [ctypes.c_uint() for _ in range(4)]
        self._mode, self._stroke = ctypes.c_int(), ctypes.c_int()
        self._size, self._matrix = ctypes.c_float(), raw.FS_MATRIX()

    def box(self, thing: Any) -> Box | None:
        if not self.raw.FPDFPageObj_GetBounds(thing, *self._box):
            return None
        left, bottom, right, top = (value.value for value in self._box)
        return left, bottom, right, top

    def colour(self, thing: Any) -> tuple[int, int, int, int]:
        if not self.raw.FPDFPageObj_GetFillColor(thing, *self._rgba):
            return 0, 0, 0, 255
        red, green, blue, alpha = (value.value for value in self._rgba)
        return red, green, blue, alpha

    def filled(self, thing: Any) -> bool:
        """Whether a path is a rectangle, or near one, that is filled and can hide what is under it."""
        raw = self.raw
        return bool(
            raw.FPDFPath_GetDrawMode(thing, self._mode, self._stroke)
            and self._mode.value
            and 3 < raw.FPDFPath_CountSegments(thing) <= _RECTANGLE
        )

    def is_opaque(self, thing: Any) -> bool:
        """Whether nothing shows through: neither by its colour nor by how it is blended."""
        return self.colour(thing)[3] == 255 and not self.raw.FPDFPageObj_HasTransparency(thing)

    def size(self, thing: Any) -> float:
        """Height of a text's letters on the page, in points."""
        if not self.raw.FPDFTextObj_GetFontSize(thing, self._size):
            return _SMALLEST
        scale = 1.0
        if self.raw.FPDFPageObj_GetMatrix(thing, self._matrix):
            scale = (self._matrix.c**2 + self._matrix.d**2) ** 0.5
        return abs(self._size.value * scale)


def _is_white(colour: tuple[int, int, int, int]) -> bool:
    return min(colour[:3]) >= _WHITE


def _remove_unseen(page: Any) -> None:
    """Take those texts off a page that no one sees."""
    import pypdfium2.raw as raw

    reader = _Reader()
    objects = [raw.FPDFPage_GetObject(page.raw, number) for number in range(raw.FPDFPage_CountObjects(page.raw))]
    kinds = [raw.FPDFPageObj_GetType(thing) for thing in objects]
    grounds: list[Box] = []  # what is drawn before a text, and not white
    pictures = [
        box for thing, kind in zip(objects, kinds, strict=True) if kind == _IMAGE and (box := reader.box(thing))
    ]
    paper: Box = page.get_cropbox() or page.get_mediabox()
    unseen = []
    for thing, kind in zip(objects, kinds, strict=True):
        if kind == _TEXT:
            if _unseen_text(reader, thing, paper, grounds, pictures):
                unseen.append(thing)
            continue
        if kind == _FORM:
            _clear_form(reader, thing, 1)
        drawn = kind != _PATH or (reader.filled(thing) and not _is_white(reader.colour(thing)))
        if drawn and len(grounds) < _MOST_BOXES and (box := reader.box(thing)):
            grounds.append(box)
    gone = {ctypes.addressof(thing.contents) for thing in unseen}
    covers: list[Box] = []  # what is drawn after a text, and opaque
    for thing, kind in zip(reversed(objects), reversed(kinds), strict=True):
        box = reader.box(thing) if kind in (_TEXT, _PATH) else None
        if box is None:
            continue
        if kind == _TEXT:
            if ctypes.addressof(thing.contents) not in gone and any(_holds(cover, box) for cover in covers):
                unseen.append(thing)
        elif len(covers) < _MOST_BOXES and reader.filled(thing) and reader.is_opaque(thing):
            covers.append(box)
    for thing in unseen:
        if raw.FPDFPage_RemoveObject(page.raw, thing):
            raw.FPDFPageObj_Destroy(thing)


def _unseen_text(reader: _Reader, thing: Any, paper: Box, grounds: list[Box], pictures: list[Box]) -> bool:
    box = reader.box(thing)
    if box is None:
        return False
    if box[2] < paper[0] or box[0] > paper[2] or box[3] < paper[1] or box[1] > paper[3]:
        return True
    if reader.raw.FPDFTextObj_GetTextRenderMode(thing) in _INVISIBLE_MODES:
        return not any(_holds_middle(picture, box) for picture in pictures)
    colour = reader.colour(thing)
    if colour[3] == 0 or reader.size(thing) < _SMALLEST:
        return True
    return _is_white(colour) and not any(_holds_middle(ground, box) for ground in grounds)


def _clear_form(reader: _Reader, form: Any, depth: int) -> None:
    """The same within a form, whose coordinates are its own: invisible texts only, as a form may be on a picture."""
    raw = reader.raw
    if depth > _DEEPEST_FORM:
        return
    things = list(_things(raw, form))
    scanned = any(raw.FPDFPageObj_GetType(thing) == _IMAGE for thing in things)
    for thing in things:
        kind = raw.FPDFPageObj_GetType(thing)
        if kind == _FORM:
            _clear_form(reader, thing, depth + 1)
            continue
        unseen = kind == _TEXT and not scanned and raw.FPDFTextObj_GetTextRenderMode(thing) in _INVISIBLE_MODES
        if unseen and raw.FPDFFormObj_RemoveObject(form, thing):
            raw.FPDFPageObj_Destroy(thing)


def _things(raw: Any, form: Any) -> Iterator[Any]:
    for number in range(raw.FPDFFormObj_CountObjects(form)):
        yield raw.FPDFFormObj_GetObject(form, number)


def _holds(outer: Box, inner: Box) -> bool:
    return (
        outer[0] - 1 <= inner[0] and outer[1] - 1 <= inner[1] and inner[2] <= outer[2] + 1 and inner[3] <= outer[3] + 1
    )


def _holds_middle(outer: Box, inner: Box) -> bool:
    across, up = (inner[0] + inner[2]) / 2, (inner[1] + inner[3]) / 2
    return outer[0] <= across <= outer[2] and outer[1] <= up <= outer[3]
