"""The FAISS index over search windows: derived from the catalogue, kept in step with it, saved by generation.

A window's score is its inner product with the question's vector and the share of the question's words that it has
(keyword_score.py). Exact inner product up to ``hnsw_above`` windows, HNSW beyond. Under HNSW a search among at most
``hnsw_above`` windows (a small tenant, a narrow filter) still scans them exactly, in the vectors that HNSW keeps.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from lloco_engine.errors import StoreError
from lloco_engine.filters import And, Filter
from lloco_engine.keyword_score import MOST, coverage, words
from lloco_engine.store.catalogue import Catalogue
from lloco_engine.store.files import Layout, write_atomic
from lloco_engine.store.where import where

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Ids = npt.NDArray[np.int64]
    Rows = npt.NDArray[np.int64]
    Vectors = npt.NDArray[np.float32]
    Shares = npt.NDArray[np.floating]

__all__ = ["Query", "SearchIndex", "remove_index_files"]

_Value = TypeVar("_Value")
_log = logging.getLogger(__name__)
_LINKS = 32  # neighbours of a window in the HNSW graph
_BUILD_WIDTH = 80
_SEARCH_WIDTH = 64
_CACHED_FILTERS = 64
_CACHED_WORDS = 256  # 20 MB at most
_MOST_WITH = 10_000  # a word that more windows of a tenant have is not looked at, so that a search stays quick
_CANDIDATES = 256  # windows with the most of a question's words that are looked at beside the nearest in a graph


@dataclass(frozen=True)
class Query:
    """What is searched for.

    Args:
        vector: (dim,) float32, L2-normalised.
        text: whose words windows may have.
        lexical: the share of the score that having them makes up, from 0 to 1; the rest is the inner product.
    """

    vector: Vectors
    text: str = ""
    lexical: float = 0.0


@dataclass(frozen=True)
class Published:
    """An index ready to be saved: the generation that it is of, how many windows it holds, its bytes."""

    generation: int
    windows: int
    data: memoryview


class SearchIndex:
    """Windows of one store in memory. Safe for use from several threads.

    Every method that takes a catalogue expects it inside a transaction, and answers for the state seen there.
    """

    def __init__(self, layout: Layout, dim: int, hnsw_above: int) -> None:
        self._layout = layout
        self._dim = dim
        self._hnsw_above = hnsw_above
        self._lock = threading.RLock()
        self._index: Any = None  # faiss.IndexIDMap2; may hold windows that the catalogue no longer has
        self._graph: Any = None  # the HNSW graph in it, if there is one
        self._flat: Any = None  # the vectors in it
        self._ids: Ids  # the window of each row
        self._order: Rows  # rows by ascending window
        self._generation = -1
        self._read_from = -1  # generation of the file that was last read
        self._allowed: OrderedDict[str, Rows] = OrderedDict()
        self._having: OrderedDict[tuple[str, str, int], Rows | None] = OrderedDict()

    def search(
        self, catalogue: Catalogue, query: Query, k: int, tenant: str, wanted: Filter
    ) -> tuple[list[tuple[int, float]], int]:
        """The best windows among those of a tenant that meet the filter.

        Returns:
            up to ``k`` pairs of window id and score, best first; and how many windows could be found at all.
        """
        with self._lock:
            self._follow(catalogue)
            allowed = self._allowed_rows(catalogue, tenant, wanted)
            if not len(allowed):
                return [], 0
            k = min(k, len(allowed))
            shares = self._shares(catalogue, query, allowed, tenant, narrowed=wanted != And())
            rows = self._candidates(query, k, allowed, shares)
            scores = self._products(query.vector, rows)
            if shares is not None:
                scores = (1 - query.lexical) * scores + query.lexical * shares[rows]
            best = _highest(scores, k)
            return list(zip(self._ids[rows[best]].tolist(), scores[best].tolist(), strict=True)), len(allowed)

    def _shares(
        self, catalogue: Catalogue, query: Query, allowed: Rows, tenant: str, *, narrowed: bool
    ) -> Shares | None:
        """How much of the query's words each allowed window has.

        A word weighs by how many of the allowed windows have it. Whether it is looked at at all depends on all windows
        of the tenant, whatever the filters. What others' windows hold never counts.
        """
        if not query.lexical:
            return None
        most = _MOST_WITH if narrowed else min(_MOST_WITH, len(allowed) // 4)
        having = (self._rows_having(catalogue, tenant, word, most) for word in words(query.text)[:MOST])
        found = [rows for rows in having if rows is not None]
        if len(allowed) < len(self._ids):
            marks = self._marks(allowed)
            found = [rows[marks[rows]] for rows in found]
        return coverage(found, len(allowed), len(self._ids))

    def _candidates(self, query: Query, k: int, allowed: Rows, shares: Shares | None) -> Rows:
        """The rows to score: all allowed ones, or of many the nearest in the graph and those with the most words."""
        import numpy as np

        near = self._nearest(query.vector, k, allowed) if self._wants_graph(len(allowed)) else None
        if near is None:
            return allowed
        if shares is None:
            return near
        having = np.flatnonzero(shares)
        return np.union1d(near, having[_highest(shares[having], _CANDIDATES)])

    def _nearest(self, vector: Vectors, k: int, allowed: Rows) -> Rows | None:
        """The ``k`` nearest allowed rows by the graph; None without a graph, or when it does not reach so many."""
        import numpy as np

        faiss = _faiss()

        if self._graph is None:
            return None
        selector = None
        if len(allowed) < len(self._ids):
            selector = faiss.IDSelectorBitmap(np.packbits(self._marks(allowed), bitorder="little"))
        parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=max(_SEARCH_WIDTH, 2 * k))
        with _one_thread():
            rows: Rows = self._graph.search(vector.reshape(1, -1), k, params=parameters)[1][0]
        return None if (rows < 0).any() else rows

    def _products(self, vector: Vectors, rows: Rows) -> Vectors:
        """Inner products of a vector with those of the rows, which FAISS reads where they lie.

        `compute_distance_subset` looks at no other rows; `range_search` among them takes five times as long where a
        filter lets 2% through. It has no wrapper that takes arrays, so it is told where those of ours are.
        """
        import numpy as np

        ptr = _faiss().swig_ptr
        made = np.empty(len(rows), np.float32)
        with _one_thread():
            self._flat.compute_distance_subset(1, ptr(vector), len(rows), ptr(made), ptr(rows))
        return made

    def publish(self, catalogue: Catalogue) -> None:
        """`prepare` and `save`, for the holder of the write lock."""
        if (ready := self.prepare(catalogue)) is not None:
            self.save(catalogue, ready)

    def prepare(self, catalogue: Catalogue) -> Published | None:
        """The index for the catalogue's state, ready to be saved; None where a good one is on disk."""
        faiss = _faiss()

        with self._lock, catalogue.transaction():
            recorded, generation = catalogue.index_file(), catalogue.generation()
            if recorded is not None and recorded[0] == generation and self._read(recorded)[1] is None:
                return None
            self._follow(catalogue)
            live = self._live_ids(catalogue)
            graph = self._wants_graph(len(live))
            renew = graph != (self._graph is not None) or len(live) < 0.5 * len(self._ids)
            vectors = self._index.reconstruct_batch(live) if renew else None
            data: Any = None if renew else faiss.serialize_index(self._index)
        if vectors is not None:  # a graph takes long to make, and searches go on meanwhile
            index = _build(live, vectors, graph=graph)
            data = faiss.serialize_index(index)
            with self._lock:
                if self._generation == generation:
                    self._hold(index)
        return Published(generation, len(live), data.data)

    def save(self, catalogue: Catalogue, ready: Published) -> None:
        """Save an index, record it in the catalogue, and remove older files; nothing where a newer one is recorded.

        For the holder of the write lock. A full disk is no error: the index can be made again.
        """
        with catalogue.transaction():
            recorded = catalogue.index_file()
        if recorded is not None and recorded[0] > ready.generation:
            return
        path = self._layout.index_file(ready.generation)
        try:
            write_atomic(path, ready.data, self._layout.temporary)
            row = (ready.generation, ready.windows, len(ready.data), hashlib.sha256(ready.data).hexdigest())
            with catalogue.transaction(write=True) as connection:
                connection.execute("DELETE FROM index_file")
                connection.execute("INSERT INTO index_file VALUES (?, ?, ?, ?)", row)
        except StoreError as error:
            _log.warning("the search index could not be saved and will be rebuilt when needed: %s", error)
            return
        for old in self._layout.index.iterdir():
            if old != path:
                old.unlink(missing_ok=True)

    def damage(self, catalogue: Catalogue) -> str | None:
        """What is wrong with the index on disk, if anything; a file older than the catalogue is not wrong."""
        recorded = catalogue.index_file()
        return None if recorded is None else self._read(recorded)[1]

    def _follow(self, catalogue: Catalogue) -> None:
        """Bring the index to the catalogue's generation."""
        import numpy as np

        generation = catalogue.generation()
        if generation == self._generation and not self._graph_is_waiting(catalogue):
            return
        if self._index is None:
            self._index = _build(np.empty(0, np.int64), np.empty((0, self._dim), np.float32), graph=False)
        self._hold(self._index)
        recorded = catalogue.index_file()
        if (
            recorded is not None
            and recorded[0] > self._read_from
            and (recorded[0] > self._generation or self._graph_is_waiting(catalogue))
        ):
            index, damage = self._read(recorded)
            if damage is None:
                self._hold(index)
            else:
                _log.warning("%s; rebuilding the search index from the catalogue", damage)
            self._read_from = recorded[0]
        live = self._live_ids(catalogue)
        self._add(catalogue, np.setdiff1d(live, self._ids, assume_unique=True))
        self._drop(np.setdiff1d(self._ids, live, assume_unique=True))
        self._hold(self._index)
        self._generation = generation

    def _hold(self, index: Any) -> None:
        """Search in this index, as it is now. Rows are places in it, so nothing that is known of rows stays."""
        import numpy as np

        faiss = _faiss()

        inner = faiss.downcast_index(index.index)
        self._index = index
        self._graph = inner if isinstance(inner, faiss.IndexHNSW) else None
        self._flat = inner if self._graph is None else faiss.downcast_index(inner.storage)
        self._ids = faiss.vector_to_array(index.id_map)
        self._order = np.argsort(self._ids)
        self._allowed.clear()
        self._having.clear()

    def _graph_is_waiting(self, catalogue: Catalogue) -> bool:
        """Whether a writer has published an HNSW graph that this exact index could be changed for."""
        if not self._wants_graph(len(self._ids)) or self._graph is not None:
            return False
        recorded = catalogue.index_file()
        return recorded is not None and recorded[0] > self._read_from and self._wants_graph(recorded[1])

    def _wants_graph(self, windows: int) -> bool:
        return windows > self._hnsw_above

    def _read(self, recorded: tuple[int, int, int, str]) -> tuple[Any, str | None]:
        """The index file that the catalogue records, or what is wrong with it."""
        import numpy as np

        faiss = _faiss()

        generation, windows, size, checksum = recorded
        path = self._layout.index_file(generation)
        try:
            data = path.read_bytes()
        except OSError as error:
            return None, f"{path} cannot be read ({error.strerror})"
        if len(data) != size or hashlib.sha256(data).hexdigest() != checksum:
            return None, f"{path} is damaged: its {len(data)} bytes do not match the checksum of the {size} written"
        try:
            index: Any = faiss.deserialize_index(np.frombuffer(data, np.uint8))
        except RuntimeError as error:
            return None, f"{path} cannot be read by this faiss ({error})"
        if index.d != self._dim or index.ntotal < windows:
            return None, f"{path} holds {index.ntotal} vectors of {index.d}, not {windows} of {self._dim}"
        return index, None

    def _add(self, catalogue: Catalogue, ids: Ids) -> None:
        import numpy as np

        for at in range(0, len(ids), 4096):  # a rebuild never holds all vectors twice
            rows = sorted(catalogue.vectors(ids[at : at + 4096].tolist()))
            vectors = np.frombuffer(b"".join(vector for _, vector in rows), "<f4").reshape(-1, self._dim)
            self._index.add_with_ids(vectors, np.array([row for row, _ in rows], np.int64))

    def _drop(self, ids: Ids) -> None:
        faiss = _faiss()

        if len(ids) and self._graph is None:  # HNSW cannot forget; such windows are never allowed again
            self._index.remove_ids(faiss.IDSelectorBatch(ids))

    def _live_ids(self, catalogue: Catalogue) -> Ids:
        import numpy as np

        return np.array(catalogue.window_ids(), np.int64)

    def _rows(self, ids: Sequence[int] | Ids) -> Rows:
        """The rows of windows that are held."""
        import numpy as np

        return self._order[np.searchsorted(self._ids, np.asarray(ids, np.int64), sorter=self._order)]

    def _marks(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Of every row whether it is one of these."""
        import numpy as np

        marks = np.zeros(len(self._ids), np.bool_)
        marks[rows] = True
        return marks

    def _allowed_rows(self, catalogue: Catalogue, tenant: str, wanted: Filter) -> Rows:
        term = where(tenant, wanted)
        return _cached(self._allowed, term.key, _CACHED_FILTERS, lambda: self._rows(catalogue.allowed_window_ids(term)))

    def _rows_having(self, catalogue: Catalogue, tenant: str, word: str, most: int) -> Rows | None:
        """The rows of a tenant's windows that have a word; None when over ``most``."""

        def look_up() -> Rows | None:
            ids = catalogue.window_ids_with(word, tenant, most)
            return None if ids is None else self._rows(ids)

        return _cached(self._having, (tenant, word, most), _CACHED_WORDS, look_up)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One question is one thread's work. FAISS would start a team of threads for each thread that searches, and on a
    small machine the teams wait for each other and for torch's."""
    faiss = _faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _faiss() -> Any:
    """FAISS, untyped: its stubs lack half of what is used here."""
    import faiss

    return faiss


def _build(ids: Ids, vectors: Vectors, *, graph: bool) -> Any:
    """An index of exactly these windows."""
    faiss = _faiss()

    if graph:
        inner: Any = faiss.IndexHNSWFlat(vectors.shape[1], _LINKS, faiss.METRIC_INNER_PRODUCT)
        inner.hnsw.efConstruction = _BUILD_WIDTH
    else:
        inner = faiss.IndexFlatIP(vectors.shape[1])
    index = faiss.IndexIDMap2(inner)
    if len(ids):
        index.add_with_ids(vectors, ids)
    return index


def _highest(scores: Shares, most: int) -> Rows:
    """Places of the highest scores, highest first, equal ones in order; sorts no more than it must."""
    import numpy as np

    if most >= len(scores):
        return np.argsort(-scores, kind="stable")
    least = np.partition(scores, -most)[-most]
    places = np.flatnonzero(scores >= least)
    return places[np.argsort(-scores[places], kind="stable")[:most]]


def _cached(cache: OrderedDict[Any, _Value], key: Hashable, most: int, make: Callable[[], _Value]) -> _Value:
    """What a cache has for a key, made when it has nothing; of more than ``most`` the longest unused one goes."""
    if key not in cache:
        cache[key] = make()
        if len(cache) > most:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]


def remove_index_files(layout: Layout) -> None:
    """Remove every generation; the next writer saves the index again."""
    with suppress(FileNotFoundError):
        for path in layout.index.iterdir():
            path.unlink(missing_ok=True)
