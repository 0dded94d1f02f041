"""An engine under which files are damaged while it answers, and put back again.

Run as ``live.py STORE DECODER COUNT SEED``. A line of JSON for each trial says which file, what was done to it, and
what came of the next question: the same answer, an answer with a warning, or an error of the engine's own. Anything
else is wrong, and so is an engine that does not answer as before once the file is whole again.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

from changes import open_engine

from lloco_engine import Document, Engine, GenerateConfig, LLoCOError
from lloco_engine.decoder.local import LocalDecoder

SHORT = GenerateConfig(max_new_tokens=2)
THINGS = ("pump", "crane", "tram", "court", "mill", "bell", "lamp", "kettle")
WAYS = ("flip", "flip", "flip", "cut", "empty", "gone", "other")


def chosen(store: Path, read: tuple, rng: random.Random) -> Path:
    """A file: mostly one of the segments that the answer reads, else any but the log and the locks."""
    files = [file for file in sorted(store.rglob("*")) if file.is_file()]
    files = [file for file in files if not file.name.endswith((".lock", "-wal", "-shm", "reserve"))]
    used = [file for file in files if file.stem in {segment_id for _, segment_id, *_ in read}]
    return rng.choice(used if rng.random() < 0.7 else files)


def damage(path: Path, whole: bytes, way: str, rng: random.Random) -> None:
    """Change a file where it lies, as a disk or another program would."""
    at = rng.randrange(len(whole))
    if way == "gone":
        path.unlink()
    elif way in ("cut", "empty"):
        os.truncate(path, at if way == "cut" else 0)
    else:
        piece = bytes([whole[at] ^ 1 << rng.randrange(8)]) if way == "flip" else rng.randbytes(64)
        handle = os.open(path, os.O_WRONLY)
        os.pwrite(handle, piece, at)
        os.close(handle)


def put_back(path: Path, whole: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.pwrite(handle, whole, 0)
    os.ftruncate(handle, len(whole))
    os.close(handle)


def answer(engine: Engine, question: str) -> tuple:
    """What an answer says, and from what, and whether it warns of anything."""
    made = engine.ask(question, generate=SHORT, top_k=2, floor=-1)
    hits = tuple((hit.doc_id, hit.segment_id, hit.text, hit.title) for hit in made.hits)
    return (made.text, made.token_ids, hits), bool(made.warnings)


def main() -> None:
    store, folder, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    rng = random.Random(int(sys.argv[4]))
    decoder = LocalDecoder.load(folder)
    engine = open_engine(store, decoder)
    engine.ingest([Document(f"{thing}.md", f"The {thing} stands in hall {n}. " * 9) for n, thing in enumerate(THINGS)])
    questions = [f"Where is the {thing}?" for thing in THINGS]
    right = {question: answer(engine, question)[0] for question in questions}
    engine.close()
    engine = open_engine(store, decoder)
    for _ in range(count):
        way, question = rng.choice(WAYS), rng.choice(questions)
        path = chosen(store, right[question][2], rng)
        whole = path.read_bytes()
        catalogue = path.name.startswith("catalogue")
        wrong = came = ""
        damage(path, whole, way, rng)
        try:
            got, warned = answer(engine, question)
            came = "warned" if warned else "the same" if got == right[question] else "of a damaged catalogue"
            if not warned and got != right[question] and not (catalogue and engine.verify()):
                wrong = f"another answer without a word: {got}"
        except LLoCOError as error:
            came = type(error).__name__
        except BaseException as error:
            wrong = f"{type(error).__name__}: {error}"
        put_back(path, whole)
        if catalogue:  # whose pages SQLite keeps
            engine.close()
            engine = open_engine(store, decoder)
        if not wrong and rng.random() < 0.25 and answer(engine, question) != (right[question], False):
            wrong = "it does not answer as before when the file is whole again"
        trial = {"file": str(path.relative_to(store)), "way": way, "came": came, "wrong": wrong}
        print(json.dumps(trial), flush=True)
    assert all(answer(engine, question) == (right[question], False) for question in questions)
    engine.close()


if __name__ == "__main__":
    main()
