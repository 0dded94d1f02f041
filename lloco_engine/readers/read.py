"""The readers' one door: paths in, Documents and Failures out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lloco_engine.config import ReadConfig
from lloco_engine.documents import check_document, origin_of, printable, record_of
from lloco_engine.errors import ConfigError, DocumentError
from lloco_engine.metadata import plain_metadata
from lloco_engine.readers.apart import parse_apart
from lloco_engine.readers.formats import FORMATS, parse
from lloco_engine.readers.identity import Identities
from lloco_engine.readers.jsonl import read_jsonl
from lloco_engine.readers.parsed import check_length
from lloco_engine.readers.walk import Found, find_files, open_file
from lloco_engine.types import Document, Failure, MetadataValue

__all__ = ["SUFFIXES", "Area", "Reader", "read_paths", "size_of_files"]

_RECORDS = (".jsonl",)  # files of documents with ids of their own
SUFFIXES = (*FORMATS, *_RECORDS)
_RESERVED = ("doc_id", "source", "title", "text", "tenant")


@dataclass
class Area:
    """A folder, or a file of records, that was read: what was read from it before and is not there now has vanished.

    ``origin`` is its own; ``source`` its name as given; ``files`` how many were found in it (of a file: its records).
    ``whole`` says whether all that it holds is known: not where a record could not be read, for which one that was is
    not known.
    """

    origin: str
    source: str
    records: bool = False
    files: int = 0
    whole: bool = True


class Reader:
    """One run over documents, files and folders: what each holds, every file once, however it is reached.

    Args:
        tenant: set on every document.
        metadata: added to every document; wins over a record's own field of the same name.
        config: limits; what is beyond them is a Failure.

    Raises:
        ConfigError: a metadata key is one of the names that every document has, or a value has no form in JSON.
    """

    def __init__(
        self,
        *,
        tenant: str = "",
        metadata: Mapping[str, MetadataValue] | None = None,
        config: ReadConfig | None = None,
    ) -> None:
        self._tenant = tenant
        self._metadata = plain_metadata(metadata or {})
        self._config = config or ReadConfig()
        self._met: set[str | tuple[int, int]] = set()
        self.skipped: Counter[str] = Counter()  # what folders hold but was left out, by reason
        self.areas: list[Area] = []  # what was read to its end
        self.bytes_done = 0  # of the files before the document at hand; a file of records counts by their texts
        self.bytes_at_hand = 0  # of the document at hand
        if clash := [key for key in self._metadata if key in _RESERVED]:
            raise ConfigError(
                f"metadata must not use the names {', '.join(_RESERVED)}, and {clash[0]!r} is one of them"
            )

    def read(self, source: object) -> Iterator[Document | Failure]:
        """The documents of one source, each as it may be (`check_document`); what cannot be used is a Failure.

        Args:
            source: a Document, or the path of a file or folder. Anything else is a Failure too.
        """
        if isinstance(source, Document):
            yield self._checked(source, printable(source.source or source.doc_id))
            return
        if not isinstance(source, str | os.PathLike) or not isinstance(path := os.fspath(source), str):
            reason = f"a source must be a Document or a path, not of type {type(source).__name__}"
            yield Failure(printable(repr(source))[:200], reason)
            return
        if not path:
            yield Failure("''", "a path must not be empty; name a file or a folder, '.' for this one")
            return
        try:
            root = Path(path).expanduser()
        except RuntimeError as error:
            yield Failure(printable(path), f"no such file or folder: {error}")
            return
        yield from self._files(root)

    def _files(self, root: Path) -> Iterator[Document | Failure]:
        area: Area | None = None
        if os.path.isdir(root):
            area = Area(origin_of(Path(os.path.realpath(root))), printable(root))
        for found in find_files(root, SUFFIXES, self.skipped):
            if isinstance(found, Failure):
                yield found
                continue
            if area is not None:
                area.files += 1
            if found.origin in self._met or found.linked in self._met:
                self.skipped["other name of a file that was read"] += 1
                self.bytes_done += found.size
                continue
            self._met |= {found.origin} | ({found.linked} if found.linked else set())
            yield from self._file(found)
        if area is not None:
            self.areas.append(area)

    def _file(self, found: Found) -> Iterator[Document | Failure]:
        records = found.path.suffix.lower() in _RECORDS
        area = Area(found.origin, printable(found.path), records=True)
        end = self.bytes_done + found.size
        for where, read in _documents(found, self._config):
            item = read
            if isinstance(read, Document):
                origin = record_of(found.origin, read.doc_id) if records else found.origin
                item = self._checked(replace(read, origin=origin), where)
            area.files += 1
            area.whole &= isinstance(item, Document)
            size = len(read.text) if records and isinstance(read, Document) else 0 if records else found.size
            self.bytes_at_hand = min(size, end - self.bytes_done)
            yield item
            self.bytes_done += self.bytes_at_hand
        self.bytes_done, self.bytes_at_hand = end, 0
        if records:
            self.areas.append(area)

    def _checked(self, document: Document, where: str) -> Document | Failure:
        """A document with the run's tenant and metadata, or the rule that it breaks, told of where it stands."""
        try:
            document = check_document(document)
            check_length(document.text, self._config.max_text)
            if self._tenant and document.tenant not in ("", self._tenant):
                raise DocumentError(
                    f"a document must be of the run's tenant {self._tenant!r}, and this one is of {document.tenant!r}"
                )
            tenant = self._tenant or document.tenant
            document = replace(document, tenant=tenant, metadata={**document.metadata, **self._metadata})
            if self._metadata or self._tenant:
                document = check_document(document)
        except DocumentError as error:
            return Failure(where, str(error), document.doc_id)
        return document


def size_of_files(paths: Iterable[str | Path]) -> int:
    """Bytes of the files that paths stand for, by what the folders say of them; no file is opened."""
    found = (item for path in paths for item in find_files(Path(path), SUFFIXES, Counter()))
    return sum(item.size for item in found if isinstance(item, Found))


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
    given itself, with as many folders before it as tell it from other files of the run; a JSON Lines record brings
    its own. Below a folder only known suffixes count. A file that is reached twice is read once.

    Args:
        paths: files of the kinds that docs/documents.md lists, and folders.
        tenant, metadata, config: as a `Reader` takes them.
        skipped: when given, counts what a folder holds but was left out, by reason.

    Raises:
        ConfigError: a metadata key is one of the names that every document has, or a value has no form in JSON.
    """
    reader = Reader(tenant=tenant, metadata=metadata, config=config)
    if skipped is not None:
        reader.skipped = skipped
    identities = Identities()
    return (identities.claimed(item) for path in paths for item in reader.read(path))


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
    with open_file(path) as handle:
        data = handle.read(most + 1) if path.stat().st_size <= most else None
    if data is None or len(data) > most:
        raise DocumentError(
            f"a file must be at most {most:,} bytes, not {path.stat().st_size:,}; split it, or raise the limit"
        )
    if not data.strip():
        raise DocumentError(f"a file must hold text, and this one is {'blank' if data else 'empty'}")
    return data
