from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lloco_engine import tokens


@pytest.fixture(autouse=True)
def _fresh_encoding():
    tokens._encoding.cache_clear()
    yield
    tokens._encoding.cache_clear()


@pytest.fixture
def _no_caches(monkeypatch, tmp_path):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)
    monkeypatch.setattr(tokens.tempfile, "gettempdir", lambda: str(tmp_path))


@pytest.mark.usefixtures("_no_caches")
def test_counts_offline_with_the_vocabulary_that_llama_index_ships(monkeypatch):
    import tiktoken.load

    monkeypatch.setattr(
        tiktoken.load, "read_file", lambda path: (path.startswith("/") and Path(path).read_bytes()) or 1 / 0
    )
    assert tokens.count_tiktoken("") == 0
    assert tokens.count_tiktoken("hello world") == 2
    assert tokens.count_tiktoken("<|endoftext|>") > 1  # a document's text is never read as a control token
    assert "TIKTOKEN_CACHE_DIR" not in os.environ


@pytest.mark.usefixtures("_no_caches")
def test_none_without_a_vocabulary(monkeypatch):
    monkeypatch.setattr(tokens, "find_spec", lambda name: None)
    assert tokens.count_tiktoken("hello") is None


def test_the_users_own_cache_comes_first_and_is_left_set(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert next(iter(tokens._cache_folders())) == tmp_path
    assert tokens.count_tiktoken("hello world") == 2  # the empty folder is passed over
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(tmp_path)
    assert not list(tmp_path.iterdir())


def test_neither_llama_index_nor_tiktoken_is_imported_by_the_module():
    code = (
        "import lloco_engine.tokens, sys; print([m for m in sys.modules if m.startswith(('llama_index', 'tiktoken'))])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
