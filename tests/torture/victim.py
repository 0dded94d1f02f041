"""A process that is killed in the middle of its work, again and again.

Run as ``victim.py STORE DECODER ADAPTER FILES``. It loads what takes long once, then reads a line of JSON for each
trial, ``{"steps": [...], "after": seconds}``, forks a child that takes the steps one by one, kills it with SIGKILL, and
answers with the number of steps that the child had said were done.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from lloco_engine import Document, Engine
from lloco_engine.config import ChunkConfig, CompressConfig
from lloco_engine.decoder.local import LocalDecoder
from lloco_engine.errors import AdapterError, NotInStore
from lloco_engine.testing import HashingEmbedder

CHUNK = ChunkConfig(32, 16, 4)


def open_engine(store: Path, decoder: LocalDecoder | str) -> Engine:
    """The engine of the trials: small chunks, kept whole, so that little time goes into compressing."""
    return Engine.open(
        store, decoder=decoder, embedder=HashingEmbedder(), chunk=CHUNK, compress=CompressConfig("uncompressed", 1)
    )


def take(engine: Engine, step: list, adapter: Path, files: Path) -> None:
    """One step of a trial."""
    kind, *rest = step
    if kind == "put":
        doc_id, text, title = rest
        engine.ingest([Document(doc_id, text, title)])
    elif kind == "file":
        name, text = rest
        (files / name).write_text(text)
        engine.ingest([files / name])
    elif kind == "delete":
        with suppress(NotInStore):
            engine.delete(rest[0])
    elif kind == "adapter":
        registry = engine.adapters.registry
        with suppress(AdapterError):  # there is none to remove, or none before
            if rest[0] == "add":
                registry.add(adapter, "law")
            elif rest[0] == "rm":
                registry.remove("law")
            else:
                registry.rollback("law")


def trial(store: Path, decoder: LocalDecoder, steps: list, adapter: Path, files: Path, after: float) -> int:
    """Take steps in a child that is killed ``after`` seconds; how many it had finished."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        with open_engine(store, decoder) as engine:
            os.write(write, b"o")
            for step in steps:
                take(engine, step, adapter, files)
                os.write(write, b".")
        os._exit(0)
    os.close(write)
    done = os.read(read, 1)  # the store is open
    select.select([], [], [], after)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while piece := os.read(read, 4096):
        done += piece
    os.close(read)
    return done.count(b".")


def main() -> None:
    store, folder, adapter, files = map(Path, sys.argv[1:])
    decoder = LocalDecoder.load(str(folder))
    open_engine(store, decoder).close()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        began = time.monotonic()
        done = trial(store, decoder, order["steps"], adapter, files, order["after"])
        print(json.dumps({"done": done, "seconds": time.monotonic() - began}), flush=True)


if __name__ == "__main__":
    main()
