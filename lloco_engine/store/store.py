"""The store's one door: a folder of compressed documents, open for reading, with a `Writer` for one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lloco_engine.config import StoreConfig
from lloco_engine.documents import Place
from lloco_engine.errors import (
    ConfigError,
    StoreCorrupt,
    StoreFull,
    StoreLocked,
    StoreMismatch,
    StoreNotFound,
)
from lloco_engine.filters import Filters, parse_filter
from lloco_engine.process import ProcessLock
from lloco_engine.store import lookup
from lloco_engine.store.adapters import StoredAdapters
from lloco_engine.store.backup import copy_store
from lloco_engine.store.catalogue import Catalogue
from lloco_engine.store.files import Layout, check_segment_id
from lloco_engine.store.held import HeldSegments
from lloco_engine.store.index import Query, SearchIndex
from lloco_engine.store.kept import KeptCatalogue
from lloco_engine.store.lock import CLAIM, claim, write_lock
from lloco_engine.store.making import make_ready, make_store
from lloco_engine.store.manifest import Manifest
from lloco_engine.store.records import DocumentInfo, Problem, SegmentStats
from lloco_engine.store.repair import repair_store
from lloco_engine.store.room import keep_reserve, spend_reserve
from lloco_engine.store.searching import search_segments
from lloco_engine.store.segments import SegmentFiles
from lloco_engine.store.verify import verify_store
from lloco_engine.store.writer import Writer, stats_of
from lloco_engine.types import AnySegment, Divergence, Document, Hit

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Store"]


class Store:
    """One folder: ``manifest.json``, ``catalogue.sqlite``, ``segments/``, ``index/``, ``adapters/``, a lock, ``tmp/``.

    Made by `create` or `open`; a context manager; safe for use from several threads, refused after a fork
    (`WrongProcess`). Who may not write to the folder reads it all the same, and writes nothing.
    Reading goes on while a writer, in this process or another, writes: each call sees one committed state.
    """

    def __init__(self, path: Path, manifest: Manifest, config: StoreConfig) -> None:
        self.path = path
        self.manifest = manifest
        self._config = config
        self._layout = Layout(path)
        self._files = SegmentFiles.of(self._layout, manifest.form)
        self._index = SearchIndex(self._layout, manifest.embedder_dim, config.hnsw_above)
        self._held = HeldSegments(self._files)
        self._lock = ProcessLock(f"the store at {path}")
        self._catalogue = Catalogue(self._layout.catalogue)
        self._for_writers = KeptCatalogue(self._layout.catalogue)
        self.adapters = StoredAdapters(self._layout, self._reading)

    @property
    def adapters_folder(self) -> Path:
        """Where adapters lie, and where the runs that train them keep what they go on from."""
        return self._layout.adapters

    @classmethod
    def create(cls, path: str | Path, manifest: Manifest, config: StoreConfig | None = None) -> Self:
        """Make an empty store in ``path``, a folder that is missing or empty, and open it.

        Raises:
            StoreError: the folder holds something else, or a store.
            ConfigError: ``config`` and ``manifest`` disagree about the type on disk.
        """
        config = StoreConfig(dtype=manifest.dtype) if config is None else config
        if config.dtype not in ("auto", manifest.dtype):
            raise ConfigError(f"store dtype must be the manifest's, {manifest.dtype!r}, not {config.dtype!r}")
        make_store(Layout(path), manifest)
        return cls.open(path, config=config)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        expect: Manifest | Mapping[str, Any] | None = None,
        config: StoreConfig | None = None,
    ) -> Self:
        """Open the store in ``path``.

        Args:
            path: the store's folder.
            expect: what the caller is about to use: a manifest, or only those of its fields that matter.
            config: only ``hnsw_above`` counts; the type on disk is the manifest's.

        Raises:
            StoreNotFound: there is none.
            StoreMismatch: names the first field that differs from ``expect``, and both values; or a newer engine
                made the store.
            StoreCorrupt: manifest or catalogue is damaged; names the file.
        """
        layout = Layout(path)
        if not layout.manifest.exists():
            if layout.segments.exists():
                raise StoreCorrupt(f"{layout.manifest} is missing; put a copy of it back, or repair the store")
            raise StoreNotFound(f"there is no store at {path}; ingest something to make one")
        manifest = Manifest.load(layout.manifest)
        if expect is not None:
            manifest.check(expect, layout.root)
        config = config or StoreConfig(dtype=manifest.dtype)
        try:
            return cls._opened(layout, manifest, config)
        except StoreFull:  # even reading takes a little room beside the catalogue
            if not spend_reserve(layout):
                raise
            return cls._opened(layout, manifest, config)

    @classmethod
    def _opened(cls, layout: Layout, manifest: Manifest, config: StoreConfig) -> Self:
        store = cls(layout.root, manifest, config)
        try:
            store._ready()
        except BaseException:
            store.close()
            raise
        return store

    @staticmethod
    def verify_path(path: str | Path, progress: Callable[[int, int], None] | None = None) -> list[Problem]:
        """Check a store that may be too damaged to open; see `verify.verify_store`."""
        return verify_store(path, progress)

    @staticmethod
    def repair(path: str | Path, *, manifest: Manifest | None = None, timeout: float = 10.0) -> list[str]:
        """Put a damaged store that nobody has open in order; see `verify.repair_store`."""
        return repair_store(path, manifest=manifest, timeout=timeout)

    def backup(
        self, dest: str | Path, *, link: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Copy the store, whole and checked, beside whoever writes; see `backup.copy_store`."""
        copy_store(self.path, dest, link=link, progress=progress)

    @staticmethod
    def restore(
        source: str | Path,
        path: str | Path,
        *,
        link: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Make a store in ``path``, which must be missing or empty, of a backup; see `backup.copy_store`."""
        copy_store(source, path, link=link, progress=progress)

    def close(self) -> None:
        """Let go of the files; segments that were loaded stay usable."""
        if self._lock.here:  # a forked child must not close what its parent has open
            with self._lock:
                self._catalogue.close()
                self._for_writers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ready(self) -> None:
        with self._lock:
            make_ready(self._layout, self._catalogue, self.manifest)

    @contextmanager
    def writer(self, timeout: float = 10.0, *, publish: bool = True) -> Iterator[Writer]:
        """The one writer of the store, for the length of the block; the search index is saved after it ends well.

        Args:
            timeout: seconds to wait for another writer.
            publish: save the index. Who writes in many short blocks saves it once, by `publish`.

        Raises:
            StoreLocked: another writer still holds the store; names its process id.
        """
        self._lock.check()
        with write_lock(self._layout.lock, timeout):
            self._layout.clear_temporary()
            with self._for_writers.open() as catalogue:
                yield Writer(self._layout, self.manifest, catalogue)
                keep_reserve(self._layout)
        if publish:
            self.publish()

    def publish(self) -> None:
        """Save the search index for what the store holds now, unless that was done.

        It is made without the write lock, for a large one takes long, and any later writer saves a newer one.
        """
        catalogue = Catalogue(self._layout.catalogue)
        try:
            if (ready := self._index.prepare(catalogue)) is not None:
                with suppress(StoreLocked), write_lock(self._layout.lock, timeout=10.0):
                    self._index.save(catalogue, ready)
        finally:
            catalogue.close()

    def segment_id(self, tenant: str, token_ids: Iterable[int], previous: str | None = None) -> str:
        """Content address of the segment that a tenant's tokens become in this store; see `Writer.segment_id`."""
        return self.manifest.segment_id(tenant, token_ids, previous)

    def segment_stats(self, segment_id: str) -> SegmentStats | None:
        """What `Writer.put_document` needs of a segment whose file is there; None when it must be made (again).

        Reads and checks the whole file.
        """
        with self._reading() as catalogue:
            return stats_of(segment_id, self._files, catalogue)

    def claim(self, segment_id: str) -> AbstractContextManager[None]:
        """Be the one who makes a segment, among threads and processes: others wait, and then find it made.

        The work is kept from being done twice, no more: who can't claim makes the segment all the same.
        """
        check_segment_id(segment_id)
        return claim(self._layout.temporary / f"{segment_id}{CLAIM}")

    @contextmanager
    def _reading(self) -> Iterator[Catalogue]:
        with self._lock, self._catalogue.transaction():
            yield self._catalogue

    def document_state(self, doc_id: str, tenant: str = "") -> tuple[str, int] | None:
        """Content hash and version of a document; None when the tenant has no such document."""
        with self._reading() as catalogue:
            state = catalogue.document_state(doc_id, tenant)
        return None if state is None else state[1:]

    def is_sound(self, doc_id: str, tenant: str = "") -> bool:
        """Whether all that the catalogue says of a document is what was written there; `NotInStore` without one."""
        with self._reading() as catalogue:
            return catalogue.is_sound(catalogue.doc_key(doc_id, tenant))

    def generation(self) -> int:
        """How many commits have changed a document: equal numbers of one store mean equal content."""
        with self._reading() as catalogue:
            return catalogue.generation()

    def documents(self, tenant: str | None = None) -> list[DocumentInfo]:
        """Documents of a tenant, or of all tenants, by tenant and id."""
        with self._reading() as catalogue:
            return catalogue.infos(tenant)

    def document(self, doc_id: str, tenant: str = "") -> DocumentInfo:
        """One document; `NotInStore` when the tenant has no such document."""
        with self._reading() as catalogue:
            catalogue.doc_key(doc_id, tenant)
            return catalogue.infos(tenant, doc_id)[0]

    def places(self, tenant: str = "", **wanted: str) -> list[Place]:
        """Where a tenant's documents came from, oldest first; ``doc_id``, ``origin``, ``content_hash`` and ``below``
        say which, as in `Catalogue.places`."""
        with self._reading() as catalogue:
            return catalogue.places(tenant, **wanted)

    def document_text(self, doc_id: str, tenant: str = "") -> str:
        """The whole text of a document; `NotInStore` when the tenant has no such document."""
        with self._reading() as catalogue:
            return catalogue.text(catalogue.doc_key(doc_id, tenant))

    def find_documents(self, filters: Filters | None = None, tenant: str = "") -> list[str]:
        """Ids of a tenant's documents that a filter lets through, in order; raises as `search` does."""
        wanted = parse_filter(filters)
        with self._reading() as catalogue:
            return catalogue.doc_ids(tenant, wanted)

    def load_documents(self, doc_ids: Sequence[str], tenant: str = "") -> list[Document]:
        """Whole documents of a tenant as they were put, each once, in the ids' order; unknown ids are left out."""
        wanted = list(dict.fromkeys(doc_ids))
        with self._reading() as catalogue:
            found = catalogue.documents(wanted, tenant)
        return [found[doc_id] for doc_id in wanted if doc_id in found]

    def chunks(self, doc_id: str, tenant: str = "") -> list[Hit]:
        """Every segment of a document, in order, score 1.0 (whole-document mode); `NotInStore` when there is none."""
        with self._reading() as catalogue:
            return catalogue.hits(catalogue.doc_key(doc_id, tenant))

    def hits_of_segment(self, segment_id: str, tenant: str = "") -> list[Hit]:
        """Every chunk of a tenant that a segment stands for, oldest first, score 1.0."""
        with self._reading() as catalogue:
            return catalogue.hits_of_segment(segment_id, tenant)

    def earlier(self, hit: Hit) -> list[Hit]:
        """What a hit's segment builds on, first to last, score 0.0; none where segments stand by themselves."""
        with self._reading() as catalogue:
            return catalogue.earlier(hit.segment_id, hit.doc_id, hit.tenant)

    def hits_of_text(self, text: str, tenant: str = "", about: Mapping[str, Any] | None = None) -> list[Hit]:
        """What a tenant has of exactly this text: the chunk, or all chunks of the document, score 1.0.

        White space around a chunk's text does not count. None where the text is not known. Of several documents with
        this text, the one that ``about`` says most of; see `lookup.hits_of_text`.
        """
        with self._reading() as catalogue:
            return lookup.hits_of_text(catalogue, text, tenant, about)

    def current(self, hits: Sequence[Hit]) -> list[Hit | None]:
        """Hits as the store has them now, all in one state of it; None for each whose document is not there any more.

        Of a hit only tenant, document, segment and ordinal are believed, as names to look up, and score and windows
        where they are possible ones.
        """
        with self._reading() as catalogue:
            return [lookup.current(catalogue, hit) for hit in hits]

    def neighbours(self, hit: Hit, n: int) -> list[Hit]:
        """Up to ``n`` segments before and ``n`` after a hit in its document, in order, without the hit itself.

        Their score is 0.0, for the search did not find them. None when the document was replaced or deleted since.
        """
        with self._reading() as catalogue:
            return lookup.neighbours(catalogue, hit, n)

    def missing_segments(self, doc_id: str, tenant: str = "", *, verify: bool = False) -> list[str]:
        """Ids of a document's segments that cannot be used and must be saved again, in order, each once.

        Args:
            doc_id: the document.
            tenant: whose it is.
            verify: read every byte and compare checksums, not only headers and sizes.
        """
        with self._reading() as catalogue:
            wanted = dict.fromkeys(hit.segment_id for hit in catalogue.hits(catalogue.doc_key(doc_id, tenant)))
            known = catalogue.segment_rows(tuple(wanted))
        return [
            segment_id
            for segment_id in wanted
            if not self._files.is_usable(segment_id, *known[segment_id], verify=verify)
        ]

    def search(
        self,
        vector: npt.NDArray[np.float32],
        *,
        top_k: int,
        tenant: str = "",
        filters: Filters | None = None,
        min_score: float = -1.0,
        question: str = "",
        lexical: float = 0.0,
    ) -> list[Hit]:
        """Segments of a tenant by their best search window (small to big), best first.

        A window's score is ``(1 - lexical) * cosine + lexical * coverage``: the cosine similarity of its vector, and
        the share of the question's words that it has, rare ones weighing more (`lloco_engine.keyword_score`).

        Args:
            vector: (embedder_dim,) float32, L2-normalised.
            top_k: distinct segments wanted; fewer come back only when no more match.
            tenant: whose documents are searched; no other's are ever seen.
            filters: which documents may be found, as `lloco_engine.filters` says: a mapping of metadata keys (and
                doc_id, source, title) to values, collections or operators, or LlamaIndex's ``MetadataFilters``.
                Applied inside the search.
            min_score: windows with a lower score do not count.
            question: whose words windows may have; without one the score is the cosine similarity.
            lexical: the share of the score that these words make up, from 0 to 1.

        Returns:
            hits with the matching windows that the search met, best first. A segment that several documents share
            comes once, as part of the first one, and names the others that may be found in ``also_in``.

        Raises:
            StoreMismatch: the vector's length is not the store's.
            ConfigError: a filter is not understood, or another argument is outside its rule.
        """
        import numpy as np

        near = np.ascontiguousarray(vector, dtype=np.float32)
        if near.shape != (self.manifest.embedder_dim,):
            raise StoreMismatch(
                f"embedder_dim of the store at {self.path} is {self.manifest.embedder_dim}, "
                f"not {near.shape}: search with the embedder {self.manifest.embedder!r}"
            )
        if top_k < 1:
            raise ConfigError(f"top_k must be at least 1, not {top_k!r}")
        if not 0 <= lexical <= 1:
            raise ConfigError(f"lexical must be between 0 and 1, not {lexical!r}")
        wanted = parse_filter(filters)
        query = Query(near, question, lexical)
        with self._reading() as catalogue:
            return search_segments(
                catalogue, self._index, query, top_k=top_k, tenant=tenant, wanted=wanted, min_score=min_score
            )

    def load_segment(self, segment_id: str, verify: bool = False) -> AnySegment:
        """One segment on the CPU, of the store's kind of memory, its checksum compared when its file was read.

        Keys, values and vectors are float16, bias float32, lengths int64. The tensors are shared: do not write to them.

        Args:
            segment_id: from a `Hit`.
            verify: read the file again even where it is as it was when it was last read.

        Raises:
            SegmentUnavailable: missing or damaged.
            NotInStore: not an id of a segment.
        """
        return self._files.read(segment_id) if verify else self._held.read(segment_id)

    def divergence(self, segment_id: str) -> Divergence | None:
        """How good a segment's refinement made it; None where it was not refined. Raises as `load_segment`."""
        return getattr(self.load_segment(segment_id), "divergence", None)

    def held_segments(self) -> tuple[int, int]:
        """How many segments are kept in memory, and their bytes."""
        return self._held.sizes()

    def forget_segments(self) -> None:
        """Let go of the segments kept in memory: the next use reads and checks their files again."""
        self._held.forget()

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[Problem]:
        """Everything that is wrong with the store, every byte of it read; see `verify.verify_store`."""
        return verify_store(self.path, progress)

    def stats(self) -> dict[str, Any]:
        """Counts over all tenants, bytes on disk by part, and what a source token costs.

        ``slots`` and ``source_tokens`` count a segment once, however many documents share it.
        """
        with self._reading() as catalogue:
            counts = catalogue.counts()
        sizes = {"segments": counts.pop("segment_bytes"), **self._layout.sizes()}
        total = sum(sizes.values())
        tokens = counts["source_tokens"]
        return {
            **counts,
            "bytes": sizes | {"total": total},
            "bytes_per_source_token": total / tokens if tokens else 0.0,
        }
