"""What tests of real vLLM servers share; a module's own fixtures go before these."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from vllm_server_cases import ids_in

from lloco_engine import Engine
from lloco_engine.demo import documents_folder


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the embedded decoder, with at least eight segments: the one that ``LLOCO_VLLM_STORE`` names, or a
    small one that is made. Read-only."""
    if given := os.environ.get("LLOCO_VLLM_STORE"):
        return Path(given)
    folder = tmp_path_factory.mktemp("vllm") / "store"
    paths = sorted(path for path in documents_folder().iterdir() if path.suffix in (".md", ".txt"))
    with Engine.open(folder) as engine:
        assert not engine.ingest(paths[:3]).failed
    assert len(ids_in(folder)) >= 8
    return folder


@pytest.fixture(scope="session")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of ``LLOCO_VLLM_KEY_FILE``, or one that is made."""
    if given := os.environ.get("LLOCO_VLLM_KEY_FILE"):
        return Path(given)
    file = tmp_path_factory.mktemp("key") / "vllm.key"
    file.write_text("4c" * 32 + "\n")
    return file
