"""Servers on the loopback address, around tiny seeded decoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
import httpx
import serve_cases
from openai import OpenAI

from lloco_engine import Engine
from lloco_engine.serve.running import listening, serving


@pytest.fixture(scope="session")
def empty_store(tiny_loaded, tmp_path_factory) -> Callable[[], Engine]:
    """Makes engines on empty stores."""
    return lambda: serve_cases.open_engine(tmp_path_factory.mktemp("store") / "store", tiny_loaded)


@pytest.fixture(scope="module")
def engine(empty_store) -> Iterator[Engine]:
    """An engine with two documents of the tenant '' and one of another."""
    with empty_store() as made:
        made.ingest(serve_cases.DOCUMENTS)
        yield made


@pytest.fixture(scope="module")
def address(engine) -> Iterator[str]:
    """A server without keys."""
    with serving(engine) as where:
        yield where


@pytest.fixture(scope="module")
def http(address) -> Iterator[httpx.Client]:
    """Plain HTTP to it."""
    with httpx.Client(base_url=address, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def client(address) -> Iterator[OpenAI]:
    """The official client to it."""
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def listen() -> Iterator[Callable[[Any], str]]:
    """Starts servers that stop with the test."""
    with ExitStack() as held:
        yield lambda app: held.enter_context(listening(app))


@pytest.fixture
def keys_file(tmp_path) -> Path:
    """Where a file of keys may be."""
    return tmp_path / "keys.json"
