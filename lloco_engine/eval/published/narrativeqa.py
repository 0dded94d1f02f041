"""NarrativeQA (Kočiský et al. 2018) as its repository publishes it: CSV files, and a text file for each story.

``documents.csv`` (document_id, set, wiki_title, ...), ``qaps.csv`` (document_id, set, question, answer1, answer2, ...),
``third_party/wikipedia/summaries.csv`` (document_id, set, summary, ...) and ``tmp/DOCUMENT_ID.content``, the stories,
which its download script fetches. A story that was not fetched is stood in for by its summary, and the record's
``source`` says so.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

from lloco_engine.errors import DocumentError
from lloco_engine.eval.published.base import Bad, Documents, Published, text_of
from lloco_engine.readers.records import Question, Record

__all__ = ["NarrativeQACSV"]


class NarrativeQACSV(Published):
    """Books and film scripts with two answers to each question."""

    name = "narrativeqa_csv"
    about = "the folder with documents.csv, qaps.csv, summaries.csv and the stories (ID.content or ID.txt)"
    splits = ("train", "valid", "test")

    def read(self, source: Path, split: str) -> Iterator[Record | Bad]:
        """See `Published.read`."""
        if not source.is_dir():
            raise DocumentError(f"{self.name} is read from {self.about}, not from {source}")
        titles: dict[str, str] = {}
        texts: dict[str, str] = {}
        sources: dict[str, str] = {}
        summaries = dict(_summaries(source))
        for where, row in _rows(source / "documents.csv"):
            if row.get("set") != split:
                continue
            try:
                doc_id = text_of(row, "document_id", where)
                story = _story(source, doc_id)
                texts[doc_id] = story or summaries.get(doc_id, "")
                sources[doc_id] = "NarrativeQA" if story else "NarrativeQA, summary"
                if not texts[doc_id].strip():
                    raise DocumentError(f"{where}: document {doc_id} must have a story or a summary, and has neither")
            except DocumentError as error:
                yield Bad(str(error))
                continue
            titles[doc_id] = row.get("wiki_title") or ""
        documents = Documents()
        for where, row in _rows(source / "qaps.csv"):
            if row.get("set") != split:
                continue
            try:
                doc_id, question, answer = (
                    text_of(row, name, where) for name in ("document_id", "question", "answer1")
                )
                if not texts.get(doc_id, "").strip():
                    raise DocumentError(
                        f"{where}: field 'document_id' must be a document that was read, not {doc_id!r}"
                    )
            except DocumentError as error:
                yield Bad(str(error))
                continue
            answers = tuple(dict.fromkeys(each.strip() for each in (answer, row.get("answer2") or "") if each.strip()))
            identity = where.rpartition(" ")[2]
            asked = Question(question.strip(), answers, f"{doc_id}-{identity}")
            documents.add(doc_id, texts[doc_id], asked, title=titles[doc_id], source=sources[doc_id])
        yield from documents.records()


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    csv.field_size_limit(1 << 24)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            for row in reader:
                yield f"{path.name}, line {reader.line_num}", row
    except OSError as error:
        raise DocumentError(f"the data file {path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DocumentError(f"the data file {path} must be CSV in UTF-8: {error}") from error


def _summaries(source: Path) -> Iterator[tuple[str, str]]:
    for place in (source / "third_party" / "wikipedia" / "summaries.csv", source / "summaries.csv"):
        if place.is_file():
            for _, row in _rows(place):
                yield row.get("document_id") or "", row.get("summary") or ""
            return


def _story(source: Path, doc_id: str) -> str:
    """The story's text; empty where it was not fetched. An id is a name of a file and nothing more."""
    if not doc_id.isalnum():
        raise DocumentError(f"documents.csv: field 'document_id' must be letters and digits, not {doc_id!r}")
    for folder in ("tmp", "stories", "."):
        for suffix in ("content", "txt"):
            place = source / folder / f"{doc_id}.{suffix}"
            if place.is_file():
                return place.read_text(encoding="utf-8", errors="replace")
    return ""
