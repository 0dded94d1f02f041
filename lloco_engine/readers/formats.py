"""The formats by suffix, and what each reader makes of a file's bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lloco_engine.config import ReadConfig
from lloco_engine.errors import DocumentError
from lloco_engine.readers.archives import parse_docx, parse_epub, parse_pptx, parse_xlsx
from lloco_engine.readers.encodings import decode
from lloco_engine.readers.html import parse_html
from lloco_engine.readers.markdown import parse_markdown
from lloco_engine.readers.parsed import Parsed, check_length, visible
from lloco_engine.readers.pdf import parse_pdf
from lloco_engine.readers.tables import parse_csv
from lloco_engine.types import Page, Span

__all__ = ["FORMATS", "parse", "read_html", "read_markdown", "read_pdf", "read_text"]


@dataclass(frozen=True)
class Format:
    """How files of a suffix are read.

    ``parse`` makes text of bytes; ``what`` is what a message calls such a file; ``apart`` says whether it is read in a
    process of its own, as all but plain text is; ``is_text`` whether the bytes are the text.
    """

    parse: Callable[[bytes, ReadConfig], Parsed]
    what: str
    apart: bool = True
    is_text: bool = False


def _plain(data: bytes, config: ReadConfig) -> Parsed:
    text, encoding = decode(data)
    return Parsed("", text, encoding)


_TEXT = Format(_plain, "text", apart=False, is_text=True)
_MARKDOWN = Format(lambda data, config: parse_markdown(data), "Markdown", is_text=True)
_HTML = Format(lambda data, config: parse_html(data, config.max_nesting), "HTML")
_TABLE = Format(lambda data, config: parse_csv(data), "table", is_text=True)

FORMATS: dict[str, Format] = {
    ".txt": _TEXT,
    ".text": _TEXT,
    ".md": _MARKDOWN,
    ".markdown": _MARKDOWN,
    ".html": _HTML,
    ".htm": _HTML,
    ".xhtml": _HTML,
    ".pdf": Format(lambda data, config: parse_pdf(data, config.max_pages, config.max_text), "PDF"),
    ".csv": _TABLE,
    ".tsv": _TABLE,
    ".epub": Format(parse_epub, "EPUB"),
    ".docx": Format(parse_docx, "Word document"),
    ".pptx": Format(parse_pptx, "presentation"),
    ".xlsx": Format(parse_xlsx, "workbook"),
}


def parse(suffix: str, data: bytes, config: ReadConfig) -> Parsed:
    """Title and text of a file, in this process.

    Args:
        suffix: one of `FORMATS`.
        data: the whole file.
        config: limits; those on seconds and memory are kept by `apart`.

    Raises:
        DocumentError: names the rule that the file breaks.
    """
    form = FORMATS[suffix]
    try:
        parsed = form.parse(data, config)
    except (DocumentError, MemoryError):
        raise
    except RecursionError as error:
        raise DocumentError(f"the {form.what} nests too deep to be read") from error
    except Exception as error:  # libraries let many kinds through for a damaged file
        raise DocumentError(f"the {form.what} is damaged: {type(error).__name__}: {str(error)[:300]}") from error
    check_length(parsed.text, config.max_text)
    if parsed.pages:
        return parsed if visible(parsed.text) == parsed.text else _visible_pages(parsed)
    return replace(parsed, text=visible(parsed.text), title=visible(parsed.title))


def _visible_pages(parsed: Parsed) -> Parsed:
    """A text with pages, made visible page by page, so that the pages' places stay right."""
    pieces, pages, at = list[str](), list[Page](), 0
    for page in parsed.pages:
        text = visible(parsed.text[page.span.start : page.span.end])
        pages.append(replace(page, span=Span(at, at + len(text))))
        pieces.append(text)
        at += len(text) + 2
    return replace(parsed, text="\n\n".join(pieces), title=visible(parsed.title), pages=tuple(pages))


def read_text(data: bytes) -> tuple[str, str]:
    """Plain text as it stands; it has no title."""
    return _pair(".txt", data)


def read_markdown(data: bytes) -> tuple[str, str]:
    """Markdown as it stands but for its comments, after its title."""
    return _pair(".md", data)


def read_html(data: bytes) -> tuple[str, str]:
    """The title of a page, and the text that a browser would show."""
    return _pair(".html", data)


def read_pdf(data: bytes) -> tuple[str, str]:
    """The title of a PDF, and its text layer."""
    return _pair(".pdf", data)


def _pair(suffix: str, data: bytes) -> tuple[str, str]:
    parsed = parse(suffix, data, ReadConfig())
    return parsed.title, parsed.text
