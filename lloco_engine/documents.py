"""What a document may be, and where it came from: the one place of both rules, for whoever reads, cuts or keeps one."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

from lloco_engine.errors import ConfigError, DocumentError
from lloco_engine.metadata import plain_metadata
from lloco_engine.types import Document

__all__ = [
    "Place",
    "check_document",
    "check_text",
    "file_of",
    "is_gone",
    "is_older_note",
    "is_record",
    "origin_of",
    "printable",
    "record_of",
]

_MAX_ID = 10_000  # characters; no path that can be opened is half as long
_SCHEME = "file://"


def check_document(document: object) -> Document:
    """The document as it is kept, its metadata as JSON values; what could not be kept, found again and shown is refused
    before any work is done on it.

    Raises:
        DocumentError: names the field and the rule that it breaks: every field is text without NUL and without lone
            surrogates; the id is not empty, not over 10,000 characters and holds no control characters; the text is
            not blank; metadata is a mapping of such text to what `lloco_engine.metadata` takes.
    """
    if not isinstance(document, Document):
        raise DocumentError(f"a document must be a Document, not {_shown(document)}")
    for name in ("doc_id", "title", "source", "tenant", "origin", "text"):
        check_text(name, getattr(document, name))
    if not document.doc_id.strip():
        raise DocumentError("a document's id must not be empty")
    if len(document.doc_id) > _MAX_ID:
        raise DocumentError(f"a document's id must have at most {_MAX_ID:,} characters, not {len(document.doc_id):,}")
    control = (at for at, one in enumerate(document.doc_id) if unicodedata.category(one) == "Cc")
    if (at := next(control, None)) is not None:
        raise DocumentError(f"a document's id must hold no control characters, and character {at} is one")
    if not document.text.strip():
        raise DocumentError("a document must hold text, and this one is blank")
    if not isinstance(document.metadata, Mapping):
        raise DocumentError(f"metadata must be a mapping of names to values, not {_shown(document.metadata)}")
    try:
        metadata, private = plain_metadata(document.metadata), plain_metadata(document.private)
    except ConfigError as error:
        raise DocumentError(str(error)) from error
    return replace(document, metadata=metadata, private=private)


def check_text(name: str, value: object) -> None:
    """Refuse what is not text that a file, a tokenizer and a screen can take.

    Raises:
        DocumentError: it is no string, or holds NUL or a lone surrogate; says where.
    """
    if not isinstance(value, str):
        raise DocumentError(f"{name} must be text, not {_shown(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DocumentError(f"{name} must be valid Unicode, and character {error.start} is a lone surrogate") from error
    if "\0" in value:
        raise DocumentError(f"{name} must not be binary, and character {value.index(chr(0))} is NUL")


@dataclass(frozen=True)
class Place:
    """What tells one kept document from another: its id, where it was read (`Document.origin`), its source as it is
    cited, and the hash of its text."""

    doc_id: str
    origin: str
    source: str
    content_hash: str


def origin_of(path: Path) -> str:
    """The origin of a file, by its resolved path: a file URI, whatever bytes the path has."""
    return f"{_SCHEME}{quote(os.fsencode(path))}"


def record_of(origin: str, doc_id: str) -> str:
    """The origin of one record of a file: the file's, with the record's id as its fragment."""
    return f"{origin}#{quote(doc_id, safe='', errors='backslashreplace')}"


def is_record(origin: str) -> bool:
    """Whether the document is one record of its file, and so has an id of its own."""
    return "#" in origin


def file_of(origin: str) -> str:
    """The path of the file that an origin names."""
    return os.fsdecode(unquote_to_bytes(origin.removeprefix(_SCHEME).partition("#")[0]))


def is_gone(origin: str) -> bool:
    """Whether there is no such file any more. One that cannot be looked at is not gone."""
    try:
        return stat.S_ISDIR(os.stat(file_of(origin)).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False


def is_older_note(origin: str, source: str, file: str) -> bool:
    """Whether a document whose origin was never noted was read from the file of this origin: its source says so."""
    try:
        return bool(source and file) and not origin and os.path.realpath(source) == file_of(file)
    except (OSError, ValueError):
        return False


def printable(path: object) -> str:
    """A path, or any text, as any output can take it, bytes that are not UTF-8 shown as ``\\udcXX``."""
    text = path.as_posix() if isinstance(path, Path) else str(path)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _shown(value: object) -> str:
    shown = printable(f"{type(value).__name__} {value!r}")
    return shown if len(shown) <= 80 else shown[:77] + "..."
