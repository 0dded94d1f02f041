"""How many tokens a text has for tiktoken, without the network.

tiktoken downloads its vocabularies. llama-index-core ships two of them (cl100k_base and o200k_base) as a tiktoken
cache, so a machine that has that package, or a cache of its own, can count offline.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tiktoken

__all__ = ["count_tiktoken"]

ENCODING = "cl100k_base"
# tiktoken names a cached file by the SHA-1 of its address; this is cl100k_base's
CACHED_FILE = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
_environment = Lock()


def count_tiktoken(text: str) -> int | None:
    """Tokens of ``text`` in tiktoken's ``cl100k_base``; None where this machine lacks tiktoken or the vocabulary."""
    encoding = _encoding()
    return None if encoding is None else len(encoding.encode_ordinary(text))


@cache
def _encoding() -> tiktoken.Encoding | None:
    folder = next((folder for folder in _cache_folders() if (folder / CACHED_FILE).is_file()), None)
    if folder is None or find_spec("tiktoken") is None:
        return None
    import tiktoken

    with _environment:  # tiktoken takes the folder from the environment only
        before = os.environ.get("TIKTOKEN_CACHE_DIR")
        os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
        try:
            return tiktoken.get_encoding(ENCODING)
        except (OSError, ValueError):  # a damaged file, which tiktoken would fetch again
            return None
        finally:
            if before is None:
                del os.environ["TIKTOKEN_CACHE_DIR"]
            else:
                os.environ["TIKTOKEN_CACHE_DIR"] = before


def _cache_folders() -> Iterator[Path]:
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if folder := os.environ.get(variable):
            yield Path(folder)
    yield Path(tempfile.gettempdir()) / "data-gym-cache"
    spec = find_spec("llama_index")  # a namespace package: finding it imports nothing
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        yield Path(folder) / "core" / "_static" / "tiktoken_cache"
