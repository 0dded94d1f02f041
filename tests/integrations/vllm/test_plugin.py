"""The plug-in's door, and where segments come from: without vLLM."""

from __future__ import annotations

import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import fsspec
import pytest
from vllm_server_cases import made_store

from lloco_engine import LLoCOError, NotInStore, SegmentReader, SegmentUnavailable, StoreCorrupt, StoreMismatch
from lloco_engine.testing import save_tiny_decoder
from lloco_integrations.vllm import register
from lloco_integrations.vllm.sources import open_reader


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0", "dev"])
def test_another_version_of_vllm_is_refused_in_a_sentence(monkeypatch, version):
    fake = ModuleType("vllm")
    fake.__version__ = version
    monkeypatch.setitem(sys.modules, "vllm", fake)
    with pytest.raises(RuntimeError, match=rf"needs vllm>=0\.32,<0\.33, and this is vLLM {version}"):
        register()


@pytest.mark.parametrize(
    "device, opted, names",
    [
        ("cpu", "", {"CPU_ATTN": "lloco_integrations.vllm.cpu.SegmentBackend"}),
        ("cuda", "", {}),
        ("cuda", "1", {"FLASH_ATTN": "lloco_integrations.vllm.cuda.SegmentBackend"}),
    ],
)
def test_the_backend_of_the_device_is_replaced(monkeypatch, device, opted, names):
    made: dict[str, str] = {}
    platform = SimpleNamespace(is_cpu=lambda: device == "cpu", is_cuda=lambda: device == "cuda")
    modules = {
        "vllm": {"__version__": "0.32.0"},
        "vllm.platforms": {"current_platform": platform},
        "vllm.v1.attention.backends.registry": {
            "AttentionBackendEnum": SimpleNamespace(CPU_ATTN="CPU_ATTN", FLASH_ATTN="FLASH_ATTN"),
            "register_backend": lambda which, path: made.update({which: path}),
        },
    }
    for name, holds in modules.items():
        module = ModuleType(name)
        vars(module).update(holds)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("LLOCO_VLLM_CUDA", opted)
    register()
    assert made == names


def test_vllm_finds_the_plug_in_by_its_entry_point():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["lloco"].partition(":")
    assert getattr(import_module(module), name) is register


def test_segments_are_read_without_a_catalogue(tmp_path):
    store, ids = made_store(tmp_path)
    (store / "catalogue.sqlite").unlink()
    reader = open_reader(str(store))
    assert type(reader) is SegmentReader and reader.manifest["memory"] == "compact_kv"
    assert reader.read(ids[0]).source_tokens > 0
    for wrong in ("../manifest", ids[0].upper(), "", 7):
        with pytest.raises(NotInStore, match="32 lowercase hex digits"):
            reader.read(wrong)
    path = next(store.glob(f"segments/*/{ids[1]}.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(SegmentUnavailable, match="checksum"):
        reader.read(ids[1])


def test_segments_are_fetched_from_a_url_once(tmp_path):
    store, ids = made_store(tmp_path)
    remote = fsspec.filesystem("memory")
    remote.put(str(store), "/bucket/store", recursive=True)
    reader = open_reader("memory://bucket/store", str(tmp_path / "cache"))
    wanted = SegmentReader(store).read(ids[0])
    assert reader.read(ids[0]).keys.equal(wanted.keys)
    kept = next((tmp_path / "cache").glob(f"segments/*/{ids[0]}.safetensors"))
    kept.write_bytes(b"damaged here")
    assert reader.read(ids[0]).keys.equal(wanted.keys)  # fetched again
    remote.rm("/bucket/store", recursive=True)
    assert reader.read(ids[0]).keys.equal(wanted.keys)
    with pytest.raises(SegmentUnavailable, match="cannot be fetched"):
        reader.read(ids[1])
    with pytest.raises(NotInStore):
        reader.read("../../etc/passwd")
    left = {path.relative_to(tmp_path / "cache").parts[0] for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert left == {"manifest.json", "segments"}


def test_a_store_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="folder or URL"):
        open_reader(None)
    with pytest.raises(ValueError, match="needs a folder"):
        open_reader("memory://bucket/none")
    with pytest.raises(StoreCorrupt):
        open_reader(str(tmp_path))


def test_another_decoder_is_refused(tmp_path):
    store, _ = made_store(tmp_path)
    reader = SegmentReader(store)
    reader.check_decoder(tmp_path / "tiny")
    with pytest.raises(StoreMismatch, match="must be the one"):
        reader.check_decoder(save_tiny_decoder(tmp_path / "other", seed=1))
    with pytest.raises(LLoCOError):
        reader.check_decoder(tmp_path / "nothing")
