"""Files of vector stores are compressed behind the answers, one by one; what was begun goes on after a restart."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lloco_engine.adapters.loading import DEFAULT
from lloco_engine.adapters.routing import GROUP
from lloco_engine.config import ReadConfig
from lloco_engine.engine import Engine, Progress
from lloco_engine.errors import LLoCOError, StoreFull, StoreLocked
from lloco_engine.filters import Condition
from lloco_engine.readers import Reader
from lloco_engine.serve.groups import group_of
from lloco_engine.serve.metrics import Metrics
from lloco_engine.serve.records import Attachment, FileRecord, Records
from lloco_engine.serve.uploads import Uploads
from lloco_engine.types import Document, Failure, IngestReport

__all__ = ["Background", "Step"]

_PRIVATE = "vector_store_file"  # what a document keeps of where it came from, out of the reach of filters
_CONTENT = "content"  # what uploads are called on the disk, which readers take for a title
_AGAIN_S = 2.0  # where another process holds the store
_ERROR_CHARS = 500
_log = logging.getLogger("lloco.serve")


@dataclass(frozen=True)
class Step:
    """How far a file is: segments of the document at hand."""

    done: int = 0
    total: int = 0


class _Stopped(LLoCOError):
    """The file is not wanted any more, or the server stops: the same call goes on from here."""


class Background:
    """A thread that compresses what is to be compressed, and takes out what is to be taken out.

    Args:
        engine: does it.
        records: says what is to be done, and is told what was.
        uploads: where the files lie.
        metrics: counts.
        read: what a file may ask of the readers.
    """

    def __init__(
        self, engine: Engine, records: Records, uploads: Uploads, metrics: Metrics, read: ReadConfig | None = None
    ) -> None:
        self._engine, self._records, self._uploads, self._metrics = engine, records, uploads, metrics
        self._read = read or ReadConfig()
        self._work = threading.Event()
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._at_hand = 0  # the number of the attachment that the thread works on
        self._steps: dict[int, Step] = {}
        self._thread = threading.Thread(target=self._run, name="lloco-ingest", daemon=True)

    def start(self) -> None:
        """Begin, with what an earlier server left to do."""
        self._thread.start()
        self.wake()

    def wake(self) -> None:
        """There is something to do."""
        self._metrics.ingest_waiting.set(self._records.to_do())
        self._work.set()

    def stop(self) -> None:
        """End after the segment at hand; what is not done stays to be done."""
        self._stopping.set()
        self._work.set()
        if self._thread.is_alive():
            self._thread.join()

    def step(self, attachment: Attachment) -> Step:
        """How far a file is."""
        return self._steps.get(attachment.number, Step())

    def documents_of(self, attachment: Attachment) -> list[str]:
        """Ids of the documents that a file has become in its vector store."""
        wanted = Condition(_PRIVATE, "in", (attachment.name,), private=True)
        return self._engine.store.find_documents(wanted, attachment.tenant)

    def take_out(self, attachment: Attachment) -> None:
        """Remove the documents of a file that is to be taken out (`Records.doom`), unless it is being compressed: then
        the thread does, as soon as it has noticed.

        Raises:
            StoreLocked: another process holds the store; the thread tries again.
        """
        with self._lock:
            if self._at_hand != attachment.number:
                self._remove(attachment)
        self.wake()

    def _remove(self, attachment: Attachment) -> None:
        if found := self.documents_of(attachment):
            self._engine.delete_all(found, attachment.tenant)
        self._records.forget(attachment.number)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._metrics.ingest_waiting.set(self._records.to_do())
            self._work.clear()
            job = self._records.next_to_do()
            if job is None:
                self._work.wait()
                continue
            try:
                with self._lock:
                    self._at_hand = job.number
                self._do(job)
            except StoreLocked:
                self._stopping.wait(_AGAIN_S)
            except Exception as error:  # whatever it is, the next file must not wait for ever
                _log.error("a file could not be worked on", exc_info=error, extra={"file": job.file})
                if job.status == "deleting" or not self._records.settle(
                    job.number, "failed", error="the server failed on this file; its log says why", code="server_error"
                ):
                    self._stopping.wait(_AGAIN_S)
            finally:
                self._at_hand = 0
                self._steps.pop(job.number, None)

    def _do(self, job: Attachment) -> None:
        if job.status == "deleting":
            self._remove(job)
            return
        records = self._records.files(job.tenant, job.file)
        if not records:
            self._settle(job, "failed", "its file was deleted", "file_not_found")
            return
        watch = _Watch(self, job)
        try:
            report = self._engine.ingest(
                self._documents(job, records[0], watch), tenant=job.tenant, progress=watch.progress
            )
        except _Stopped:
            return  # to be taken out, which is the next thing to do, or to be gone on with
        except StoreFull:
            self._settle(
                job, "failed", "the disk of the store is full: free space, and attach the file again", "server_error"
            )
            return
        self._metrics.ingest_tokens.inc(report.source_tokens)
        self._metrics.ingest_s.inc(report.compress_s)
        self._judge(job, records[0], report, watch)

    def _judge(self, job: Attachment, record: FileRecord, report: IngestReport, watch: _Watch) -> None:
        made = (
            len(report.added) + len(report.replaced) + len(report.unchanged) + len(report.repaired) + len(report.moved)
        )
        failures = [*watch.failures, *report.failed]
        folder = str(self._uploads.path(record))
        said = "; ".join(dict.fromkeys(one.reason.replace(folder, record.filename) for one in failures))[:_ERROR_CHARS]
        if made and failures:
            self._settle(
                job,
                "completed",
                f"{len(failures)} of {made + len(failures)} records were left out: {said}",
                "invalid_file",
            )
        elif made:
            self._settle(job, "completed")
        else:
            self._settle(job, "failed", said or "the file holds no document", "invalid_file")

    def _settle(self, job: Attachment, status: str, error: str = "", code: str = "") -> None:
        if self._records.settle(job.number, status, error=error, code=code):  # type: ignore[arg-type]
            self._metrics.ingested.labels(status).inc()
            _log.info(
                "file", extra={"file": job.file, "vector_store": job.store, "tenant": job.tenant, "outcome": status}
            )

    def _documents(self, job: Attachment, record: FileRecord, watch: _Watch) -> Iterator[Document]:
        """What a file holds, under the names that it has in its vector store."""
        own = dict(job.attributes) | ({} if job.store == DEFAULT else {GROUP: group_of(job.store)})
        first = True
        for item in Reader(config=self._read).read(self._uploads.path(record)):
            watch.check()
            if isinstance(item, Failure):
                watch.failures.append(item)
                continue
            records = record.filename.lower().endswith(".jsonl")
            yield replace(
                item,
                doc_id=job.name if first and not records else f"{job.name}/{item.doc_id}",
                title=record.filename if item.title in ("", _CONTENT) else item.title,
                source=record.filename,
                origin="",
                metadata={**item.metadata, **own},
                private={_PRIVATE: job.name},
            )
            first = False


class _Watch:
    """Follows one file, and stops it where it is not wanted any more."""

    def __init__(self, background: Background, job: Attachment) -> None:
        self._background, self._job = background, job
        self.failures: list[Failure] = []

    def check(self) -> None:
        own = self._background
        if own._stopping.is_set() or not own._records.still_wanted(self._job.number):
            raise _Stopped("the server stops, or the file is not wanted any more")

    def progress(self, state: Progress) -> None:
        self._background._steps[self._job.number] = Step(state.done_segments, state.total_segments_of_document)
        self.check()
