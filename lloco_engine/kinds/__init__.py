"""Kinds of memory: what a segment is, how it is packed into a file, and how it is placed in a prompt and read.

A decoder reads two things beside text: slots in its attention, and vectors in the place of input embeddings. A kind
says how its segments become one of these; no other part knows what kinds there are. One of your own derives from
`MemoryKind`, in a file that registers it and a compressor that makes it::

    from lloco_engine import Compressor, MemoryKind, register, register_memory
"""

from __future__ import annotations

from lloco_engine.kinds.base import Format, MemoryKind, Room, Sizes, Tensors, get, of, register_memory
from lloco_engine.kinds.compact_kv import CompactKV
from lloco_engine.kinds.summary import Summary

__all__ = ["Format", "MemoryKind", "Room", "Sizes", "Tensors", "get", "of", "register_memory"]

for _kind in (CompactKV, Summary):
    register_memory(_kind)
