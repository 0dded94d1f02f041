"""Where a server reads segments: a store's folder, or an object store by way of a folder that keeps what was read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lloco_engine import SegmentReader, SegmentUnavailable
from lloco_integrations.vllm.cache import FileCache

__all__ = ["CACHE_MIB", "open_reader"]

CACHE_MIB = 16 * 1024  # of files of a store at a URL that are kept
_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
_ID = re.compile(r"[0-9a-f]{32}")


def open_reader(store: object, cache: object = None, cache_mib: float = CACHE_MIB) -> SegmentReader:
    """What gives the segments of a store.

    Args:
        store: its folder, or a URL that fsspec knows (``s3://bucket/store``).
        cache: a folder of this machine for what comes from a URL.
        cache_mib: that its files may take together.

    Raises:
        ValueError: neither is given, or a URL without a folder.
        StoreCorrupt: there is no store.
    """
    if not isinstance(store, str) or not store:
        raise ValueError(f"kv_connector_extra_config must say the store's folder or URL as store, not {store!r}")
    if not _URL.match(store):
        return SegmentReader(store)
    if not isinstance(cache, str) or not cache:
        raise ValueError(f"a store at a URL needs a folder for what is read of it, cache, not {cache!r}")
    return _Remote(FileCache(store, Path(cache), int(cache_mib * 2**20)))


class _Remote(SegmentReader):
    """See `open_reader`. What lies in the folder is read as any store's is, checksums included."""

    def __init__(self, files: FileCache) -> None:
        self._cache = files
        files.path("manifest.json")
        super().__init__(files.folder)

    def read(self, segment_id: str) -> Any:
        """See `SegmentReader`; a file that is not here yet is fetched, and one that is damaged here fetched again."""
        if not isinstance(segment_id, str) or not _ID.fullmatch(segment_id):
            return super().read(segment_id)  # says what is wrong
        name = f"segments/{segment_id[:2]}/{segment_id}.safetensors"
        try:
            self._cache.path(name)
            try:
                return super().read(segment_id)
            except SegmentUnavailable:
                self._cache.path(name, again=True)
        except OSError as error:
            where = self._cache.url
            raise SegmentUnavailable(f"segment {segment_id} cannot be fetched from {where}: {error}") from error
        return super().read(segment_id)
