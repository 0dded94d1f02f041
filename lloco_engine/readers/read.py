"""The readers' one door: paths in, Documents and Failures out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from lloco_engine.config import ReadConfig
from lloco_engine.errors import ConfigError, DocumentError
from lloco_engine.readers.apart import parse_apart
from lloco_engine.readers.formats import FORMATS, parse
from lloco_engine.readers.jsonl import read_jsonl
from lloco_engine.readers.walk import Found, find_files, printable
from lloco_engine.types import Document, Failure, MetadataValue

__all__ = ["SUFFIXES", "read_paths"]

SUFFIXES = (*FORMATS, ".jsonl")
_RESERVED = ("doc_id", "source", "title", "text", "tenant")


def read_paths(
    paths: Iterable[str | Path],
    *,
    tenant: str = "",
    metadata: Mapping[str, MetadataValue] | None = None,
    config: ReadConfig | None = None,
    skipped: Counter[str] | None = None,
) -> Iterator[Document | Failure]:
    """Documents read from files and folders, one at a time; what cannot be used is a Failure, and the rest go on.

    A file's id is its path relative to the folder that was given (``/`` between parts), or its name where it was
    given itself; a JSON Lines record brings its own. Below a folder only known suffixes count.

    Args:
        paths: files of the kinds that docs/documents.md lists, and folders.
        tenant: set on every document.
        metadata: added to every document; wins over a record's own field of the same name.
        config: limits; what is beyond them is a Failure.
        skipped: when given, counts what a folder holds but was left out, by reason.

    Raises:
        ConfigError: a metadata key is one of the names that every document has.
    """
    extra = dict(metadata or {})
    if clash := [key for key in extra if key in _RESERVED]:
        raise ConfigError(f"metadata must not use the names {', '.join(_RESERVED)}, and {clash[0]!r} is one of them")
    return _read(paths, tenant, extra, config or ReadConfig(), Counter() if skipped is None else skipped)


def _read(
    paths: Iterable[str | Path],
    tenant: str,
    metadata: Mapping[str, MetadataValue],
    config: ReadConfig,
    skipped: Counter[str],
) -> Iterator[Document | Failure]:
    first_seen: dict[str, str] = {}
    for path in paths:
        for found in find_files(Path(path).expanduser(), SUFFIXES, skipped):
            if isinstance(found, Failure):
                yield found
                continue
            for where, item in _documents(found, config):
                if isinstance(item, Failure):
                    yield item
                elif problem := _problem(item, first_seen):
                    yield Failure(where, problem)
                else:
                    first_seen[item.doc_id] = where
                    yield replace(item, tenant=tenant, metadata={**item.metadata, **metadata})


def _documents(found: Found, config: ReadConfig) -> Iterator[tuple[str, Document | Failure]]:
    """Where each document of one file stands, and the document."""
    source, suffix = printable(found.path), found.path.suffix.lower()
    try:
        if suffix == ".jsonl":
            empty = True
            for where, item in read_jsonl(found.path, config):
                empty = False
                yield where, item
            if empty:
                raise DocumentError("a file must hold text, and this one is empty")
        elif suffix in FORMATS:
            yield source, _document(found, source, suffix, config)
        else:
            known = ", ".join(SUFFIXES)
            raise DocumentError(
                f"a file's suffix must be one of {known}, not {suffix or 'none'!r}; rename or convert it"
            )
    except DocumentError as error:
        yield source, Failure(source, str(error))
    except OSError as error:
        yield source, Failure(source, f"cannot be read: {error.strerror or error}")


def _document(found: Found, source: str, suffix: str, config: ReadConfig) -> Document:
    form = FORMATS[suffix]
    most = min(config.max_bytes, 4 * config.max_text) if form.is_text else config.max_bytes
    parsed = (parse_apart if form.apart else parse)(suffix, _bytes(found.path, most), config)
    return Document(
        doc_id=found.doc_id,
        text=parsed.text,
        title=parsed.title or found.path.stem,
        source=source,
        pages=parsed.pages,
        encoding=parsed.encoding,
    )


def _bytes(path: Path, most: int) -> bytes:
    with path.open("rb") as handle:
        data = handle.read(most + 1) if path.stat().st_size <= most else None
    if data is None or len(data) > most:
        raise DocumentError(
            f"a file must be at most {most:,} bytes, not {path.stat().st_size:,}; split it, or raise the limit"
        )
    if not data.strip():
        raise DocumentError(f"a file must hold text, and this one is {'blank' if data else 'empty'}")
    return data


def _problem(document: Document, first_seen: Mapping[str, str]) -> str:
    """The rule that a document breaks as a whole; empty when it breaks none."""
    if not document.text.strip():
        return "a document must hold text, and this one is blank"
    fields = {"doc_id": document.doc_id, "text": document.text, "title": document.title, "source": document.source}
    words = {key: value for key, value in document.metadata.items() if isinstance(value, str)}
    for name, value in (fields | words).items():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"{name} must be valid Unicode, and character {error.start} is a lone surrogate"
        if "\0" in value:
            return f"{name} must not be binary, and character {value.index(chr(0))} is NUL"
    if document.doc_id in first_seen:
        return f"a doc_id must come once in a run, and {document.doc_id!r} was read from {first_seen[document.doc_id]}"
    return ""
