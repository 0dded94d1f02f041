"""The SCROLLS release (Shaham et al. 2022): JSON Lines, ``{"id", "pid", "input", "output"}``.

``input`` is the question, a blank line and the document; a question with several answers comes once for each of them,
under one ``id``.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from lloco_engine.errors import DocumentError
from lloco_engine.eval.published.base import Bad, Documents, Published, json_lines, text_of
from lloco_engine.readers.records import Question, Record

__all__ = ["NarrativeQA", "QMSum", "Qasper", "Scrolls"]

_REPOSITORY = "tau/scrolls"


class Scrolls(Published):
    """A data set of SCROLLS: a document is told by its text, since the release gives it no name."""

    splits = ("train", "validation")  # the answers of the test part are not published
    file: ClassVar[str]  # the release's own name

    def read(self, source: Path, split: str) -> Iterator[Record | Bad]:
        """See `Published.read`."""
        path = source / f"{split}.jsonl" if source.is_dir() else source
        documents = Documents()
        for where, line in json_lines(path):
            try:
                identity, read, answer = (text_of(line, name, where) for name in ("id", "input", "output"))
                question, blank, text = read.partition("\n\n")
                if not blank or not question.strip() or not text.strip():
                    raise DocumentError(f"{where}: field 'input' must be a question, a blank line and a document")
            except DocumentError as error:
                yield Bad(str(error))
                continue
            text = text.strip()
            doc_id = f"{self.file}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
            documents.add(doc_id, text, Question(question.strip(), (answer.strip(),), identity), source="SCROLLS")
        yield from documents.records()

    def fetch(self, split: str) -> Path:
        """See `Published.fetch`; the archive is unpacked beside itself in the hub's cache."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

        name = f"{self.file}/{split}.jsonl"
        try:
            archive = Path(hf_hub_download(_REPOSITORY, f"{self.file}.zip", repo_type="dataset"))
        except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
            raise DocumentError(
                f"{self.file}.zip of {_REPOSITORY} could not be had from the hub ({type(error).__name__}): "
                f"download it, unpack it and name {name}"
            ) from error
        try:
            with zipfile.ZipFile(archive) as files:
                return Path(files.extract(name, archive.parent / f"{self.file}.unpacked"))
        except (KeyError, zipfile.BadZipFile) as error:
            raise DocumentError(f"{archive.name} from the hub must hold {name}: {error}") from error


class Qasper(Scrolls):
    """Scientific papers; SCROLLS' own form of Qasper."""

    name = file = "qasper"
    about = "SCROLLS' qasper/SPLIT.jsonl, or the folder with it"


class QMSum(Scrolls):
    """Meetings; SCROLLS' own form of QMSum."""

    name = file = "qmsum"
    about = "SCROLLS' qmsum/SPLIT.jsonl, or the folder with it"


class NarrativeQA(Scrolls):
    """Books and film scripts; SCROLLS' own form of NarrativeQA."""

    name = file = "narrative_qa"
    about = "SCROLLS' narrative_qa/SPLIT.jsonl, or the folder with it"
