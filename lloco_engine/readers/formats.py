"""One file's bytes -> (title, text), by suffix. A reader raises DocumentError with the rule that a file breaks."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from html.parser import HTMLParser

from lloco_engine.errors import DocumentError

__all__ = ["FORMATS", "decode_utf8", "read_html", "read_markdown", "read_pdf", "read_text"]

_UNSEEN = {"script", "style", "template", "noscript", "svg", "math", "iframe", "object"}
_BLOCKS = {
    "address", "article", "aside", "blockquote", "body", "dd", "details", "dialog", "div", "dl", "dt", "fieldset",
    "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "html", "legend",
    "main", "nav", "ol", "p", "pre", "section", "summary", "table", "ul",
}  # fmt: skip
_LINES = {"br", "li", "tr", "option", "caption"}
_HEADING = re.compile(r"^#{1,6}[ \t]+(.+?)[ \t]*#*[ \t]*$", re.MULTILINE)


def decode_utf8(data: bytes) -> str:
    """UTF-8 bytes, with or without a byte order mark, as text.

    Raises:
        DocumentError: the bytes are binary (hold NUL) or are not UTF-8; names the offset.
    """
    if (nul := data.find(b"\0")) >= 0:
        raise DocumentError(f"a text must not be binary, and byte {nul} is NUL; if it is UTF-16, save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        mark = 3 if data.startswith(b"\xef\xbb\xbf") else 0  # offsets are counted after the mark
        raise DocumentError(
            f"a text must be UTF-8, and byte {error.start + mark} is not ({error.reason}); save it as UTF-8"
        ) from error


def read_text(data: bytes) -> tuple[str, str]:
    """Plain text as it stands; it has no title."""
    return "", decode_utf8(data)


def read_markdown(data: bytes) -> tuple[str, str]:
    """Markdown as it stands; its title is its first heading."""
    text = decode_utf8(data)
    heading = _HEADING.search(text)
    return (heading[1] if heading else ""), text


class _TextOfHTML(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.titles: list[str] = []
        self.headings: list[str] = []
        self.unseen: list[str] = []
        self.inside: str = ""  # "title", "h1" or nothing
        self.preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _UNSEEN:
            self.unseen.append(tag)
        elif not self.unseen:
            self._break(tag, opens=True)
            self.preformatted += tag == "pre"
            if tag in ("title", "h1"):
                self.inside = tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if not self.unseen:
            self._break(tag, opens=True)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.unseen:
            del self.unseen[self.unseen.index(tag) :]
        elif not self.unseen:
            self._break(tag, opens=False)
            self.preformatted = max(0, self.preformatted - (tag == "pre"))
            if tag == self.inside:
                self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.unseen:
            return
        if self.inside == "title":
            self.titles.append(data)
            return
        if self.inside == "h1":
            self.headings.append(data)
        if not self.preformatted:
            data = re.sub(r"\s+", " ", data)
            if not self.pieces or self.pieces[-1][-1:].isspace():
                data = data.lstrip()
        if data:
            self.pieces.append(data)

    def _break(self, tag: str, *, opens: bool) -> None:
        if tag in _BLOCKS:
            self.pieces.append("\n\n")
        elif opens and tag in _LINES:
            self.pieces.append("\n")
        elif opens and tag in ("td", "th"):
            self.pieces.append("\t")


def read_html(data: bytes) -> tuple[str, str]:
    """The text that a browser would show, paragraphs parted by blank lines; titled by <title>, else by <h1>."""
    parser = _TextOfHTML()
    parser.feed(decode_utf8(data))
    parser.close()
    text = re.sub(r"[ \t]+\n", "\n", "".join(parser.pieces))
    text = re.sub(r"\n[ \t](?! )", "\n", text)  # what a collapsed space or a row's first cell left; indented code stays
    text = re.sub(r" ?\t ?", "\t", re.sub(r"\n{3,}", "\n\n", text))
    title = "".join(parser.titles) or "".join(parser.headings)
    return " ".join(title.split()), text.strip()


@contextlib.contextmanager
def _quiet_pypdf() -> Iterator[None]:
    logger = logging.getLogger("pypdf")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def read_pdf(data: bytes) -> tuple[str, str]:
    """The text layer of a PDF, pages parted by blank lines, and the title its properties give.

    Raises:
        DocumentError: it is encrypted, damaged, or has no text layer.
    """
    with _quiet_pypdf():
        from pypdf import PasswordType, PdfReader

        try:
            reader = PdfReader(io.BytesIO(data))
            if reader.is_encrypted and reader.decrypt("") == PasswordType.NOT_DECRYPTED:
                raise DocumentError("a PDF must not be encrypted, and this one asks for a password; save it without")
            pages = [page.extract_text() for page in reader.pages]
            title = str(reader.metadata.title or "") if reader.metadata else ""
        except DocumentError:
            raise
        except Exception as error:  # pypdf lets many kinds through for a damaged file
            if type(error).__name__ == "DependencyError":
                raise DocumentError("a PDF must not be encrypted, and this one is (AES); save it without") from error
            raise DocumentError(f"the PDF is damaged: {str(error) or type(error).__name__}") from error
    # Broken fonts yield NULs and lone surrogates, which no text may hold.
    text = "\n\n".join(page.strip() for page in pages if page.strip()).replace("\0", "")
    if not text.strip():
        raise DocumentError(f"a PDF must have a text layer, and none of its {len(pages)} pages does; run OCR on it")
    return " ".join(title.split()), text.encode("utf-8", "replace").decode("utf-8")


FORMATS: dict[str, Callable[[bytes], tuple[str, str]]] = {
    ".txt": read_text,
    ".text": read_text,
    ".md": read_markdown,
    ".markdown": read_markdown,
    ".html": read_html,
    ".htm": read_html,
    ".pdf": read_pdf,
}
