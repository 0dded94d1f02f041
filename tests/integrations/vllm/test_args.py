"""The command that starts a vLLM server: what it says is what the store and its adapters are."""

from __future__ import annotations

import json
import shlex

import pytest
from adapter_cases import adapter
from summary_cases import save_tiny_autocompressor
from typer.testing import CliRunner

from lloco_engine import ChunkConfig, CompressConfig, Document, Engine
from lloco_engine.cli import app
from lloco_engine.testing import HashingEmbedder
from lloco_integrations.vllm.args import arguments
from lloco_integrations.vllm.client import served_name
from lloco_integrations.vllm.refusals import Refusals


@pytest.fixture
def store(tmp_path, tiny_folder):
    path = tmp_path / "a store"
    options = {"chunk": ChunkConfig(64, 24, 4), "compress": CompressConfig("uncompressed", 1)}
    with Engine.open(path, decoder=str(tiny_folder), embedder=HashingEmbedder(), **options) as engine:
        engine.ingest(Document("pumps", "The pump stands in hall 3."))
        for tenant in ("", "acme"):
            engine.adapters.registry.add(adapter(tmp_path / "made", engine.decoder), "law", tenant)
    return path


def printed(store, *more) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The environment and the flags of the command that is printed."""
    result = CliRunner().invoke(app, ["vllm-args", "--store", str(store), *map(str, more)])
    assert result.exit_code == 0, result.output
    words = shlex.split(result.stdout)
    at = words.index("python")
    assert words[at : at + 3] == ["python", "-m", "vllm.entrypoints.openai.api_server"]
    flags: dict[str, list[str]] = {}
    for word in words[at + 3 :]:
        if word.startswith("--"):
            flags[word] = []
        else:
            flags[next(reversed(flags))].append(word)
    return dict(word.split("=", 1) for word in words[:at]), flags


def test_the_command_names_the_store_the_decoder_and_its_adapters(store, tiny_folder, monkeypatch, tmp_path):
    monkeypatch.setattr("lloco_engine.embedder.Embedder", lambda *_: HashingEmbedder())
    manifest = json.loads((store / "manifest.json").read_text())
    environment, flags = printed(store, "--port", 8100, "--key-file", tmp_path / "key", "--pool-mib", 64)
    assert environment == {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "LLOCO_VLLM_CUDA": "1"}
    assert flags["--model"] == [str(tiny_folder)]
    assert flags["--served-model-name"] == [served_name(manifest["decoder_fingerprint"])]
    assert flags["--port"] == ["8100"] and flags["--max-model-len"] == ["4096"]
    assert flags["--attention-backend"] == ["FLASH_ATTN"] and "--dtype" not in flags
    connector = json.loads(flags["--kv-transfer-config"][0])
    assert connector["kv_connector_module_path"] == "lloco_integrations.vllm.connector"
    assert flags["--middleware"] == [f"{Refusals.__module__}.{Refusals.__name__}"]
    extra = {"store": str(store), "key_file": str(tmp_path / "key"), "pool_mib": 64}
    assert connector["kv_connector_extra_config"] == extra
    named = dict(word.split("=", 1) for word in flags["--lora-modules"])
    assert sorted(name.partition("-")[0] for name in named) == ["law@1", "law@1"]
    assert all((store / "adapters") in type(store)(folder).parents for folder in named.values())
    assert flags["--max-loras"] == ["3"] and flags["--max-lora-rank"] == ["8"] and "--enable-lora" in flags
    assert "--enable-prompt-embeds" not in flags


def test_on_a_cpu_and_from_an_object_store(store, monkeypatch):
    monkeypatch.setattr("lloco_engine.embedder.Embedder", lambda *_: HashingEmbedder())
    environment, flags = printed(
        store, "--device", "cpu", "--at", "s3://bucket/it", "--cache", "/c", "--host", "0.0.0.0"
    )
    assert environment["VLLM_TARGET_DEVICE"] == "cpu"
    assert flags["--dtype"] == ["float32"] and "--enforce-eager" in flags and "--attention-backend" not in flags
    extra = json.loads(flags["--kv-transfer-config"][0])["kv_connector_extra_config"]
    assert extra == {"store": "s3://bucket/it", "cache": "/c"}
    result = CliRunner().invoke(app, ["vllm-args", "--store", str(store), "--at", "s3://bucket/it"])
    assert result.exit_code == 1 and "name one with --cache" in result.output


def test_the_adapters_that_a_server_must_have_are_those_that_an_engine_asks_for(store):
    with Engine.open(store, embedder=HashingEmbedder()) as engine:
        _, given = arguments(engine)
        named = [word.partition("=")[0] for word in given[given.index("--lora-modules") + 1 :]]
        engine.adapters.load_all()
        assert sorted(engine.decoder.adapters) == sorted(named)


def test_what_vllm_cannot_adapt_is_refused(store):
    with Engine.open(store, embedder=HashingEmbedder()) as engine:
        folder = engine.adapters.folders()["law@1"]
        config = json.loads((folder / "adapter_config.json").read_text())
        for change in ({"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"peft_type": "LOHA"}, {"r": 1024}):
            (folder / "adapter_config.json").write_text(json.dumps(config | change))
            with pytest.raises(Exception, match=r"must be plain LoRA of rank 512 at most, and 'law@1' is not"):
                arguments(engine)


def test_summary_embeddings_need_no_connector(tmp_path):
    folder = save_tiny_autocompressor(tmp_path / "auto")
    options = {
        "embedder": HashingEmbedder(),
        "compress": CompressConfig("autocompressor"),
        "chunk": ChunkConfig(64, 24, 4),
    }
    with Engine.open(tmp_path / "store", decoder=str(folder), **options) as engine:
        _, given = arguments(engine, device="cpu")
    assert "--enable-prompt-embeds" in given and not {"--kv-transfer-config", "--middleware"} & {*given}
    assert given[given.index("--max-model-len") + 1] == "1024"
