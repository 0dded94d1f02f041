"""The FAISS index over search windows: derived from the catalogue, kept in step with it, saved by generation.

A window's score is its inner product with the question's vector and the share of the question's words that it has
(lexical.py). Exact inner product up to ``hnsw_above`` windows, HNSW beyond. Under HNSW a search among at most
``hnsw_above`` windows (a small tenant, a narrow filter) still scans them exactly, in the vectors that HNSW keeps.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lloco_engine.errors import StoreError
from lloco_engine.lexical import MOST, coverage, words
from lloco_engine.store.catalogue import Catalogue, Filters, filter_options
from lloco_engine.store.files import Layout, write_atomic

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Ids = npt.NDArray[np.int64]
    Vectors = npt.NDArray[np.float32]
    Shares = npt.NDArray[np.float32]

__all__ = ["Query", "SearchIndex", "remove_index_files"]

_log = logging.getLogger(__name__)
_LINKS = 32  # neighbours of a window in the HNSW graph
_BUILD_WIDTH = 80
_SEARCH_WIDTH = 64
_CACHED_FILTERS = 64
_MOST_WITH = 10_000  # a word that more windows have is not looked at, so that a search stays quick
_CANDIDATES = 256  # windows with the most of a question's words that are looked at beside the nearest


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
        self._ids: Ids | None = None  # what it holds, ascending
        self._generation = -1
        self._read_from = -1  # generation of the file that was last read
        self._allowed: OrderedDict[tuple[Any, ...], Ids] = OrderedDict()

    def search(
        self, catalogue: Catalogue, query: Query, k: int, tenant: str, filters: Filters
    ) -> tuple[list[tuple[int, float]], int]:
        """The best windows among those of a tenant that meet the filters.

        Returns:
            up to ``k`` pairs of window id and score, best first; and how many windows could be found at all.
        """
        with self._lock:
            self._follow(catalogue)
            allowed = self._allowed_ids(catalogue, tenant, filters)
            k = min(k, len(allowed))
            near = self._search(query.vector, k, allowed) if k else []
            having = self._having(catalogue, query, allowed)
            return (near if having is None else self._blend(query, near, *having)), len(allowed)

    def _having(self, catalogue: Catalogue, query: Query, allowed: Ids) -> tuple[Ids, Shares] | None:
        """Which allowed windows have how much of the query's words; what others' windows hold does not count."""
        import numpy as np

        if not query.lexical or not len(allowed):
            return None
        everything = len(allowed) == len(self._held())
        most = min(_MOST_WITH, len(allowed) // 4) if everything else _MOST_WITH
        found = (catalogue.window_ids_with(word, most) for word in words(query.text)[:MOST])
        ids = [np.array(each, np.int64) for each in found if each is not None]
        if not everything:
            ids = [np.intersect1d(each, allowed, assume_unique=True) for each in ids]
        return coverage(ids, len(allowed))

    def _blend(
        self, query: Query, near: list[tuple[int, float]], having: Ids, shares: Shares
    ) -> list[tuple[int, float]]:
        """As many as there are near by vector, of them and of those that have the query's words, by both."""
        import numpy as np

        ids, cosine = np.array([row for row, _ in near]), np.array([score for _, score in near])
        most = having[np.argsort(-shares, kind="stable")[:_CANDIDATES]]
        if len(others := np.setdiff1d(most, ids, assume_unique=True)):
            ids = np.concatenate([ids, others])
            cosine = np.concatenate([cosine, self._index.reconstruct_batch(others) @ query.vector])
        share = np.zeros(len(ids))
        place = np.searchsorted(having, ids).clip(max=max(len(having) - 1, 0))
        has = having[place] == ids if len(having) else np.zeros(len(ids), np.bool_)
        share[has] = shares[place[has]]
        scores = (1 - query.lexical) * cosine + query.lexical * share
        best = np.lexsort((ids, -scores))[: len(near)]
        return list(zip(ids[best].tolist(), scores[best].tolist(), strict=True))

    def publish(self, catalogue: Catalogue) -> None:
        """Save the index for the catalogue's state, record it there, and remove older files.

        For the holder of the write lock. A full disk is no error: the index can be made again.
        """
        faiss = _faiss()

        with self._lock, catalogue.transaction():
            recorded, generation = catalogue.index_file(), catalogue.generation()
            if recorded is not None and recorded[0] == generation and self._read(recorded)[1] is None:
                return
            self._follow(catalogue)
            live = self._live_ids(catalogue)
            graph = self._wants_graph(len(live))
            renew = graph != _is_graph(self._index) or len(live) < 0.5 * len(self._held())
            vectors = self._index.reconstruct_batch(live) if renew else None
            data: Any = None if renew else faiss.serialize_index(self._index)
        if vectors is not None:  # a graph takes long to make, and searches go on meanwhile
            index = _build(live, vectors, graph=graph)
            data = faiss.serialize_index(index)
            with self._lock:
                if self._generation == generation:
                    self._index, self._ids = index, live
        self._save(catalogue, generation, len(live), data.data)

    def _save(self, catalogue: Catalogue, generation: int, windows: int, data: memoryview) -> None:
        path = self._layout.index_file(generation)
        try:
            write_atomic(path, data, self._layout.temporary)
            row = (generation, windows, len(data), hashlib.sha256(data).hexdigest())
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
        self._allowed.clear()
        recorded = catalogue.index_file()
        if (
            recorded is not None
            and recorded[0] > self._read_from
            and (recorded[0] > self._generation or self._graph_is_waiting(catalogue))
        ):
            index, damage = self._read(recorded)
            if damage is None:
                self._adopt(index)
            else:
                _log.warning("%s; rebuilding the search index from the catalogue", damage)
            self._read_from = recorded[0]
        live = self._live_ids(catalogue)
        if self._index is None:
            self._index, self._ids = _build(live[:0], np.empty((0, self._dim), np.float32), graph=False), live[:0]
        self._add(catalogue, np.setdiff1d(live, self._held(), assume_unique=True))
        self._drop(np.setdiff1d(self._held(), live, assume_unique=True))
        self._generation = generation

    def _graph_is_waiting(self, catalogue: Catalogue) -> bool:
        """Whether a writer has published an HNSW graph that this exact index could be changed for."""
        if not self._wants_graph(len(self._held())) or _is_graph(self._index):
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

    def _adopt(self, index: Any) -> None:
        import numpy as np

        faiss = _faiss()

        self._index = index
        self._ids = np.sort(faiss.vector_to_array(index.id_map))

    def _add(self, catalogue: Catalogue, ids: Ids) -> None:
        import numpy as np

        for at in range(0, len(ids), 4096):  # a rebuild never holds all vectors twice
            rows = sorted(catalogue.vectors(ids[at : at + 4096].tolist()))
            vectors = np.frombuffer(b"".join(vector for _, vector in rows), "<f4").reshape(-1, self._dim)
            self._index.add_with_ids(vectors, np.array([row for row, _ in rows], np.int64))
        self._ids = np.union1d(self._held(), ids)

    def _drop(self, ids: Ids) -> None:
        import numpy as np

        faiss = _faiss()

        if len(ids) and not _is_graph(self._index):  # HNSW cannot forget; such windows are never allowed again
            self._index.remove_ids(faiss.IDSelectorBatch(ids))
            self._ids = np.setdiff1d(self._held(), ids, assume_unique=True)

    def _held(self) -> Ids:
        import numpy as np

        return np.empty(0, np.int64) if self._ids is None else self._ids

    def _live_ids(self, catalogue: Catalogue) -> Ids:
        import numpy as np

        return np.array(catalogue.window_ids(), np.int64)

    def _allowed_ids(self, catalogue: Catalogue, tenant: str, filters: Filters) -> Ids:
        import numpy as np

        key = (tenant, *sorted((name, filter_options(name, value)) for name, value in filters.items()))
        if (found := self._allowed.get(key)) is None:
            found = np.array(catalogue.allowed_window_ids(tenant, filters), np.int64)
            self._allowed[key] = found
            if len(self._allowed) > _CACHED_FILTERS:
                self._allowed.popitem(last=False)
        return found

    def _search(self, vector: Vectors, k: int, allowed: Ids) -> list[tuple[int, float]]:
        import numpy as np

        faiss = _faiss()

        selector = None
        if len(allowed) < self._index.ntotal:
            marks = np.zeros(int(self._held()[-1]) + 1, np.bool_)
            marks[allowed] = True
            selector = faiss.IDSelectorBitmap(np.packbits(marks, bitorder="little"))
        query = vector.reshape(1, -1)
        found = None
        with _one_thread():
            if not _is_graph(self._index):
                found = self._index.search(query, k, params=faiss.SearchParameters(sel=selector))
            elif self._wants_graph(len(allowed)):
                width = max(_SEARCH_WIDTH, 2 * k)
                found = self._index.search(query, k, params=faiss.SearchParametersHNSW(sel=selector, efSearch=width))
            if found is None or (found[1] < 0).any():  # the graph may not reach k allowed windows; a scan does
                found = self._scan(query, k, selector)
        pairs = zip(found[1][0].tolist(), found[0][0].tolist(), strict=True)
        return sorted(((row, score) for row, score in pairs if row >= 0), key=lambda pair: (-pair[1], pair[0]))

    def _scan(self, query: Vectors, k: int, selector: Any) -> Any:
        """Exact search among the vectors that an HNSW index keeps."""
        import numpy as np

        faiss = _faiss()

        flat = faiss.downcast_index(faiss.downcast_index(self._index.index).storage)
        ids = faiss.vector_to_array(self._index.id_map)
        inner = None if selector is None else faiss.IDSelectorTranslated(self._index.id_map, selector)
        scores, rows = flat.search(query, k, params=faiss.SearchParameters(sel=inner))
        return scores, np.where(rows < 0, -1, ids[rows])


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


def _is_graph(index: Any) -> bool:
    faiss = _faiss()

    return index is not None and isinstance(faiss.downcast_index(index.index), faiss.IndexHNSW)


def remove_index_files(layout: Layout) -> None:
    """Remove every generation; the next writer saves the index again."""
    with suppress(FileNotFoundError):
        for path in layout.index.iterdir():
            path.unlink(missing_ok=True)
