"""Files and folders that are there wholly or not at all, and the one place that makes them."""

from __future__ import annotations

import ast
import errno
import os
from pathlib import Path

import pytest

import lloco_engine
from lloco_engine import atomic

PACKAGES = Path(lloco_engine.__file__).parents[1]
RENAMING = {"replace", "rename", "renames", "move"}  # of os and shutil
MAKING = {"NamedTemporaryFile", "mkstemp", "mkdtemp"}


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "made" / "file"
    atomic.write_file(path, b"old")
    assert path.read_bytes() == b"old"
    atomic.write_file(path, "größer\n", tmp_path / "tmp")
    assert path.read_bytes() == "größer\n".encode()
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["file"]


def test_what_could_not_be_written_leaves_everything_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic.write_file(path, b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="full"):
        atomic.write_file(path, b"new")
    with pytest.raises(OSError, match="full"), atomic.open_file(path) as file:
        file.write("new")
    with pytest.raises(OSError, match="full"), atomic.new_folder(tmp_path / "folder") as folder:
        (folder / "a").write_text("a")
    assert {p.name for p in tmp_path.iterdir()} == {"file"} and path.read_bytes() == b"old"


def test_a_text_is_there_when_its_block_ends_well(tmp_path):
    path = tmp_path / "lines"
    with atomic.open_file(path) as file:
        file.write("one\n")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), atomic.open_file(path) as file:
        file.write("two\n")
        _ = 1 / 0
    assert path.read_bytes() == b"one\n" and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_there_when_its_block_ends_well(tmp_path):
    target = tmp_path / "made" / "folder"
    with pytest.raises(ZeroDivisionError), atomic.new_folder(target) as draft:
        (draft / "a").write_text("a")
        _ = 1 / 0
    assert not list(target.parent.iterdir())
    with atomic.new_folder(target) as draft:
        (draft / "a").write_text("a")
        (draft / "a").chmod(0o600)
        assert not target.exists()
    assert (target / "a").read_text() == "a" and list(target.parent.iterdir()) == [target]
    assert (target / "a").stat().st_mode & 0o777 == target.stat().st_mode & 0o666, "whoever reads the folder reads it"


def naming(tree: ast.AST) -> list[str]:
    """Calls that give a file its name, or make a draft that will take one."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        of, called = node.func.value, node.func.attr
        by_module = isinstance(of, ast.Name) and of.id in ("os", "shutil", "tempfile")
        if by_module and called in RENAMING | MAKING:
            found.append(ast.unparse(node))
        elif not by_module and (called == "rename" or (called == "replace" and len(node.args) == 1)):
            found.append(ast.unparse(node))  # of a path: of a text it takes two
    return found


def test_nothing_else_gives_a_file_its_name():
    assert naming(ast.parse("os.replace(a, b); path.rename(b); path.replace(b); tempfile.mkstemp()")) == [
        "os.replace(a, b)", "path.rename(b)", "path.replace(b)", "tempfile.mkstemp()",
    ]  # fmt: skip
    assert not naming(ast.parse("text.replace('a', 'b'); replace(value, a=1); time.replace(tzinfo=None)"))
    files = [f for name in ("lloco_engine", "lloco_integrations") for f in (PACKAGES / name).rglob("*.py")]
    assert len(files) > 100
    found = {str(f): calls for f in files if (calls := naming(ast.parse(f.read_text(encoding="utf-8"))))}
    assert set(found) == {str(PACKAGES / "lloco_engine" / "atomic.py")}
