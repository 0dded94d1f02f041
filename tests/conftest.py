"""Fixtures shared by all tests. A model is loaded once per session; a test that changes one makes its own."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch, faiss or tokenizers are imported: tests are small, so threads cost more than they give.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

if TYPE_CHECKING:
    from lloco_engine.decoder.local import LocalDecoder

DATA = Path(os.environ.get("LLOCO_DATA", Path(__file__).parents[2] / "shared" / "data"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much the trials of tests/torture try, and where pictures of the server's page go."""
    parser.addoption("--screenshots", metavar="FOLDER", help="write what the browser's tests see")
    group = parser.getgroup("torture")
    group.addoption("--seed", type=int, default=0, help="of everything that is drawn in tests/torture")
    for name, count, what in (
        ("kills", 100, "kill -9 of a writer"),
        ("flips", 1000, "damaged bytes of a store"),
        ("inputs", 60, "bad files"),
        ("forgeries", 100_000, "forged handles, and requests to vLLM"),
        ("live", 200, "files damaged under a running engine"),
        ("full", 60, "changes on a disk with little room"),
        ("soak", 30, "seconds of asking beside a writer"),
        ("victims", os.cpu_count() or 1, "processes at once that are killed"),
    ):
        group.addoption(f"--{name}", type=int, default=count, metavar="N", help=f"{what} in tests/torture ({count})")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    gpu = [item for item in items if "gpu" in item.keywords]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def embedded_decoder() -> LocalDecoder:
    """The embedded decoder, loaded once. Read-only: a test that loads an adapter must take it off again."""
    from lloco_engine.decoder.local import LocalDecoder

    return LocalDecoder.load("embedded")


@pytest.fixture
def no_network() -> Iterator[None]:
    """Any socket but a Unix one, which asyncio needs, is an error."""
    import pytest_socket

    pytest_socket.disable_socket(allow_unix_socket=True)
    yield
    pytest_socket.enable_socket()


@pytest.fixture
def closed_loop(request: pytest.FixtureRequest) -> Iterator[None]:
    """An event loop for a test that is not async: LlamaIndex would make one and leave it open."""
    if inspect.iscoroutinefunction(request.function):
        yield
        return
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny seeded decoder's folder, with a window of 4096. Read-only."""
    from lloco_engine.testing import save_tiny_decoder

    return save_tiny_decoder(tmp_path_factory.mktemp("tiny"), max_position_embeddings=4096)


@pytest.fixture(scope="session")
def tiny_loaded(tiny_folder: Path) -> LocalDecoder:
    """The decoder of `tiny_folder`, loaded once. Read-only."""
    from lloco_engine.decoder.local import LocalDecoder

    return LocalDecoder.load(str(tiny_folder))


@pytest.fixture(scope="module")
def decoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny seeded decoder's folder of a module's own."""
    from lloco_engine.testing import save_tiny_decoder

    return save_tiny_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def decoder(decoder_folder: Path) -> LocalDecoder:
    """The decoder of `decoder_folder`, which a module's tests may load adapters into."""
    from lloco_engine.decoder.local import LocalDecoder

    return LocalDecoder.load(str(decoder_folder))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of evaluation data beside the checkout (or at $LLOCO_DATA), which the project works without."""
    if not DATA.is_dir():
        pytest.skip(f"no evaluation data at {DATA}; set LLOCO_DATA to a folder that has it")
    return DATA
