"""Which document a file is: the one that was read from it, from wherever it lay when it was read, or a new one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Protocol

from lloco_engine.documents import Place, file_of, is_gone, is_older_note, is_record, printable
from lloco_engine.errors import DocumentError
from lloco_engine.types import Document, Failure

__all__ = ["Identities"]


class Places(Protocol):
    """Where the documents of a tenant came from that a store holds, oldest first; see `Store.places`."""

    def __call__(self, tenant: str, **wanted: str) -> Sequence[Place]: ...


def _nowhere(tenant: str, **wanted: str) -> Sequence[Place]:
    return ()


class Identities:
    """The ids of one run's documents. A record, or a document that comes as such, brings its own; a file is

    1. the document that was read from it before, by whatever root, name, link or hard link;
    2. else one with the same text whose file is gone: it was moved or renamed;
    3. else a new one. Its id is its path below the root, with as many of the folders above before it as it takes for
       no other document to have it.

    Args:
        places: what the store holds; by default nothing.
    """

    def __init__(self, places: Places = _nowhere) -> None:
        self._places = places
        self._claims: dict[tuple[str, str], tuple[str, str]] = {}  # tenant and id: origin, and what to call it
        self._linked: dict[str, dict[tuple[int, int], str]] = {}  # tenant: files with several names, and their ids

    def claimed(self, item: Document | Failure) -> Document | Failure:
        """What `claim` gives; a Failure where it refuses, and for one."""
        if isinstance(item, Failure):
            return item
        try:
            return self.claim(item)
        except DocumentError as error:
            return Failure(item.source or item.doc_id, str(error))

    def claim(self, document: Document) -> Document:
        """The document with its id, which no other of the run can have after.

        Raises:
            DocumentError: an earlier one has it.
        """
        named = self.identify(document)
        key = named.tenant, named.doc_id
        if key in self._claims:
            first = self._claims[key][1]
            raise DocumentError(f"a doc_id must come once in a run, and {named.doc_id!r} was read from {first}")
        self._claims[key] = named.origin, named.source or "a document before"
        return named

    def has(self, tenant: str, doc_id: str) -> bool:
        """Whether a document of the run has this id."""
        return (tenant, doc_id) in self._claims

    def identify(self, document: Document) -> Document:
        """The document with the id that is its own now: writers beside this one change what is known.

        Raises:
            DocumentError: other documents have every name that it could have.
        """
        if not document.origin or is_record(document.origin):
            return document
        return replace(document, doc_id=self._known(document) or self._new(document))

    def _known(self, document: Document) -> str | None:
        for place in self._places(document.tenant, origin=document.origin):
            return place.doc_id
        if (linked := self._by_other_name(document)) is not None:
            return linked
        path = file_of(document.origin)
        same_text = self._places(document.tenant, content_hash=document.content_hash)
        same_id = self._places(document.tenant, doc_id=document.doc_id)
        for place in (*same_id, *same_text):
            if self._is_free(place.doc_id, document) and is_older_note(place.origin, place.source, document.origin):
                return place.doc_id
        moved = [place for place in same_text if self._is_free(place.doc_id, document) and _has_moved(place, document)]
        moved.sort(key=lambda place: (place.doc_id != document.doc_id, os.path.basename(place.source) != _name(path)))
        return moved[0].doc_id if moved else None

    def _by_other_name(self, document: Document) -> str | None:
        """The id of the document that was read from this file by another of its names (hard links)."""
        if (key := _linked(document.origin)) is None:
            return None
        if document.tenant not in self._linked:
            places = (place for place in self._places(document.tenant) if place.origin and not is_record(place.origin))
            known = ((_linked(place.origin), place.doc_id) for place in places)
            self._linked[document.tenant] = {other: doc_id for other, doc_id in known if other is not None}
        return self._linked[document.tenant].get(key)

    def _new(self, document: Document) -> str:
        for name in _names(document):
            if self._is_free(name, document) and not self._places(document.tenant, doc_id=name):
                return name
        raise DocumentError(f"a document needs an id of its own, and others have {name!r} and all that are shorter")

    def _is_free(self, doc_id: str, document: Document) -> bool:
        """Whether no other document of the run has an id."""
        claim = self._claims.get((document.tenant, doc_id))
        return claim is None or claim[0] == document.origin


def _names(document: Document) -> Iterator[str]:
    yield document.doc_id
    path = PurePosixPath(printable(Path(file_of(document.origin))))
    for count in range(len(PurePosixPath(document.doc_id).parts) + 1, len(path.parts)):
        yield "/".join(path.parts[-count:])
    yield str(path)


def _has_moved(place: Place, document: Document) -> bool:
    """Whether a document with the same text may have been this file: its own is gone."""
    if place.origin:
        return not is_record(place.origin) and is_gone(place.origin)
    return place.doc_id == document.doc_id and bool(place.source) and not os.path.exists(place.source)


def _linked(origin: str) -> tuple[int, int] | None:
    """Device and number of a file that has several names."""
    try:
        state = os.stat(file_of(origin))
    except OSError:
        return None
    return (state.st_dev, state.st_ino) if state.st_nlink > 1 else None


def _name(path: str) -> str:
    return printable(os.path.basename(path))
