"""Folders with rings of links, pipes, names that are none and a thousand folders in each other: every file once."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from changes import open_engine

from lloco_engine.documents import file_of

A_TREE = 10  # bad files of --inputs for each tree
NAMES = ("a", "b.txt", "c.TXT", ".hidden", " x .txt", "new\nline.txt", "é.txt", "x" * 251 + ".txt", "-r.txt")


def grow(root: Path, rng: random.Random) -> None:
    """Put files, folders, links, pipes and odd names below a folder."""
    folders, files = [root], []
    for number in range(rng.randrange(5, 60)):
        place, kind = rng.choice(folders), rng.randrange(9)
        path = place / f"{number}{rng.choice(NAMES)}"[-255:]
        with suppress(OSError):  # a name or path that is too long
            if kind < 3:
                path = path.with_name(f"{path.stem[-200:]}.txt")
                path.write_text(f"The pump of hall {number} needs oil.")
                files.append(path)
            elif kind == 3:
                path.mkdir()
                folders.append(path)
            elif kind == 4:
                target = rng.choice((root, place, path, place.parent, Path("/"), root / "nowhere", *files, *folders))
                path.symlink_to(rng.choice((target, os.path.relpath(target, place))), target.is_dir())
            elif kind == 5 and files:
                os.link(rng.choice(files), path.with_suffix(".txt"))
            elif kind == 6:
                os.mkfifo(path.with_name(f"{number}pipe.txt"))
            elif kind == 7:
                Path(os.fsdecode(os.fsencode(place) + b"/\xff%d.txt" % number)).write_text("A name that is no text.")
            else:
                with socket.socket(socket.AF_UNIX) as made:
                    made.bind(str(place / f"{number}s.txt"))
    if rng.random() < 0.3:
        dig(root / "deep", rng.randrange(100, 1_500))


def dig(path: Path, depth: int) -> None:
    """So many folders in each other, with a file at the bottom."""
    here = os.open(path.parent, os.O_RDONLY)
    for name in [path.name] + ["d"] * depth:
        os.mkdir(name, dir_fd=here)
        inner = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    handle = os.open("bottom.txt", os.O_WRONLY | os.O_CREAT, dir_fd=here)
    os.write(handle, b"The bell at the bottom rings at six.")
    os.close(handle)
    os.close(here)


def known_files(root: Path) -> set[tuple[int, int]]:
    """The files below a folder that an ingest must tell of, by device and number."""
    # by `find`, which goes deeper than Python does
    seen = ("-type", "f", "-iname", "*.txt", "-not", "-name", ".*", "-printf", "%D %i\n")
    lines = subprocess.run(["find", root, *seen], check=True, capture_output=True, text=True).stdout.splitlines()
    return {(int(device), int(number)) for device, number in map(str.split, lines)}


def test_every_file_of_a_strange_tree_is_read_once_or_named(request, report, tmp_path, tiny_loaded):
    count, seed = request.config.getoption("--inputs") // A_TREE, request.config.getoption("--seed")
    documents = named = 0
    slowest = 0.0
    for number in range(count):
        root = tmp_path / str(number)
        root.mkdir()
        grow(root, random.Random(f"{seed} {number}"))
        with open_engine(tmp_path / f"{number}.store", tiny_loaded) as engine:
            began = time.monotonic()
            first = engine.ingest([root])
            slowest = max(slowest, time.monotonic() - began)
            assert all(len(failure.reason) > 10 for failure in first.failed)
            read = [os.stat(file_of(place.origin)) for place in engine.store.places()]
            left = known_files(root) - {(state.st_dev, state.st_ino) for state in read}
            told = [failure for failure in first.failed if "link is broken" not in failure.reason]
            assert len(read) == len({state.st_ino for state in read}) and len(left) <= len(told), (number, left)
            again = engine.ingest([root])
            assert sorted(again.unchanged) == sorted(first.added) and not again.added, number
            assert [problem for problem in engine.verify() if problem.kind != "orphan"] == []
        documents, named = documents + len(first.added), named + len(told)
        subprocess.run(["rm", "-r", root], check=True)
    report("strange trees of folders", count, 0, f"{documents} documents, {named} files named; slowest {slowest:.1f} s")
