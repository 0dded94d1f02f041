"""Whatever checkpoint a user brings is read right or refused in one sentence, and none of its code runs."""

from __future__ import annotations

import ast
import json
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lloco_engine
from lloco_engine import models
from lloco_engine.compress import registry
from lloco_engine.config import ChunkConfig
from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.embedder import Embedder
from lloco_engine.engine import Engine
from lloco_engine.errors import ModelNotFound, UnsupportedModel
from lloco_engine.shape import DecoderShape
from lloco_engine.testing import HashingEmbedder, save_tiny_decoder, tiny_config, tiny_decoder, tiny_tokenizer
from lloco_engine.types import Document


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_tiny_decoder(tmp_path / "tiny", max_position_embeddings=4096)


def change(folder: Path, file: str = "config.json", /, **fields) -> Path:
    path = folder / file
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in (values | fields).items() if value is not ...}))
    return folder


def ways_in(folder: Path, store: Path):
    """What a user may begin with."""
    yield lambda: Engine.open(store, decoder=str(folder), embedder=HashingEmbedder())
    yield lambda: LocalDecoder.load(str(folder))


# -- code ------------------------------------------------------------------------------------------------------------


def test_all_reading_goes_through_one_place():
    package = Path(lloco_engine.__file__).parent
    readers = {"from_pretrained", "SentenceTransformer", "snapshot_download"}
    found = {}
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in readers:
                found.setdefault(path.name, set()).add(node.attr)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in readers:
                found.setdefault(path.name, set()).add(node.func.id)
    found["autocompressor.py"] = found.get("autocompressor.py", set()) - {"from_pretrained"}  # its own
    assert {name for name, calls in found.items() if calls} == {"pretrained.py", "hub.py"}


@pytest.fixture
def no_questions(monkeypatch):
    def ask(*_):
        raise AssertionError("the user was asked whether code may run")

    monkeypatch.setattr("builtins.input", ask)


def with_code(folder: Path, mark: Path) -> Path:
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass A: pass\n")
    auto = {"AutoConfig": "own.A", "AutoModelForCausalLM": "own.A", "AutoModel": "own.A", "AutoTokenizer": "own.A"}
    return change(folder, auto_map=auto)


@pytest.mark.parametrize("kind", ["llama", "sorcery"])
def test_code_of_a_decoder_never_runs(kind, folder, tmp_path, no_questions):
    mark = tmp_path / "it ran"
    change(with_code(folder, mark), model_type=kind)
    change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.A", None]})
    for begin in ways_in(folder, tmp_path / "store"):
        if kind == "llama":  # the library's own class serves
            begin()
        else:
            with pytest.raises(UnsupportedModel, match=r"'sorcery', and code .* is never run"):
                begin()
    assert not mark.exists()


def test_code_of_an_embedder_never_runs(tmp_path, no_questions):
    mark, copy = tmp_path / "it ran", tmp_path / "embedder"
    shutil.copytree(models.embedder_folder(), copy)
    (copy / "own.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass A: pass\n")
    parts = json.loads((copy / "modules.json").read_text())
    parts[0]["type"] = "own.A"
    (copy / "modules.json").write_text(json.dumps(parts))
    with pytest.raises(UnsupportedModel, match=r"'own\.A'.*never run"):
        Embedder(str(copy)).encode(["a"])
    for text in ("{", "[1]", '[{"name": "x"}]'):
        (copy / "modules.json").write_text(text)
        with pytest.raises(ModelNotFound, match=r"modules\.json"):
            Embedder(str(copy)).encode(["a"])
    assert not mark.exists()


# -- config.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "named"),
    [
        ({"model_type": "sorcery"}, UnsupportedModel, "'sorcery'"),
        ({"model_type": "vit"}, UnsupportedModel, "'vit'"),
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, UnsupportedModel, "some of conv"),
        ({"model_type": ...}, UnsupportedModel, "None"),
        ({"model_type": 3}, UnsupportedModel, "3"),
        ({"hidden_size": "wide"}, ModelNotFound, "config.json"),
        ({"num_attention_heads": None}, ModelNotFound, "config.json"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, UnsupportedModel, "4bit"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, UnsupportedModel, "8bit"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, UnsupportedModel, "compressed-tensors"),
        ({"quantization_config": {"quant_method": "torchao"}}, UnsupportedModel, "torchao"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, UnsupportedModel, "gptq"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, UnsupportedModel, "awq"),
        ({"quantization_config": {"bits": 4}}, UnsupportedModel, "does not name"),
    ],
)
def test_what_cannot_be_run_is_said_before_the_weights_are_read(fields, error, named, folder, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    change(folder, **fields)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    for begin in ways_in(folder, tmp_path / "store"):
        with pytest.raises(error, match=named) as caught:
            begin()
        assert "\n\n" not in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_a_decoder_with_an_adapter_in_its_folder_is_refused(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "owner/base"}')
    with pytest.raises(UnsupportedModel, match="load_adapter"):
        LocalDecoder.load(str(folder))


@pytest.mark.parametrize(
    ("rope", "positions", "window"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 32768, 131072),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 40960, 131072),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}, 2048, 2048),
        ({"rope_type": "yarn", "factor": 2.0}, 1024, 2048),
        ({"rope_type": "linear", "factor": 2.0}, 2048, 2048),
    ],
)
def test_the_window_is_what_yarn_makes_of_it(rope, positions, window):
    config = tiny_config("qwen2", max_position_embeddings=positions, rope_parameters=rope | {"rope_theta": 1e6})
    assert DecoderShape.of(config).window == window


# -- weights ---------------------------------------------------------------------------------------------------------


def test_weights_without_a_place_are_named(folder, tmp_path):
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name in ("model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.q_norm.weight", "score.weight"):
        save_file(weights | {name: torch.ones(32)}, file, metadata={"format": "pt"})
        with pytest.raises(UnsupportedModel, match=name):
            LocalDecoder.load(str(folder))
    harmless = ["model.layers.0.self_attn.rotary_emb.inv_freq", "v_head.summary.weight"]
    save_file(weights | {name: torch.ones(4) for name in harmless}, file, metadata={"format": "pt"})
    LocalDecoder.load(str(folder))
    save_file({k: v for k, v in weights.items() if "1.mlp.up_proj" not in k}, file, metadata={"format": "pt"})
    with pytest.raises(ModelNotFound, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        LocalDecoder.load(str(folder))
    layers = {k.replace("layers.1", "layers.2"): v.clone() for k, v in weights.items() if "layers.1" in k}
    save_file(weights | layers, file, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"layers\.2.* \(\d+ tensors in all\)"):
        LocalDecoder.load(str(folder))


def test_a_model_that_is_not_plain_is_refused():
    from peft import LoraConfig, get_peft_model

    with pytest.raises(UnsupportedModel, match="it has an adapter in it"), models.quiet():
        made = get_peft_model(tiny_decoder(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        LocalDecoder(made.base_model.model, tiny_tokenizer())


class InBytes(torch.nn.Linear):
    """Stands for a quantised layer: weights of a byte each, with a scale a row."""

    def __init__(self, plain: torch.nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None)
        self.scales = plain.weight.abs().amax(1, keepdim=True) / 127
        self.weight = torch.nn.Parameter((plain.weight / self.scales).round().to(torch.int8), requires_grad=False)
        self.bias = plain.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scales, self.bias)


def test_quantised_layers_are_run_as_they_are():
    model = tiny_decoder("qwen2", tie_word_embeddings=False)
    for name, part in list(model.model.named_modules()):
        if isinstance(part, torch.nn.Linear):
            owner, _, attribute = name.rpartition(".")
            setattr(model.model.get_submodule(owner), attribute, InBytes(part))
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        expected = model(ids).logits
        decoder = LocalDecoder(model, tiny_tokenizer())
        runner = decoder.runner
        hidden = runner.forward(ids, torch.arange(30), decoder.new_cache(1, 30))
        torch.testing.assert_close(runner.logits(hidden), expected, rtol=1e-4, atol=1e-4)
    assert type(runner).__name__ == "InterfaceRunner"
    assert all(type(part) is InBytes for part in runner.linears())
    assert decoder.generate([Prompt("Who?")])[0].token_ids


def test_block_fp8_is_read_as_what_it_stands_for(tmp_path):
    folder = save_tiny_decoder(tmp_path / "fp8", hidden_size=128, intermediate_size=128, head_dim=32)
    file = folder / "model.safetensors"
    weights, plain = load_file(file), {}
    for name in [name for name in weights if "_proj.weight" in name]:
        weight = weights.pop(name)
        blocks = [-(-size // 128) for size in weight.shape]
        scale = torch.full(blocks, float(weight.abs().max()) / 448)
        weights[name] = (weight / scale[0, 0]).to(torch.float8_e4m3fn)
        weights[name.replace(".weight", ".weight_scale_inv")] = scale
        plain[name] = weights[name].float() * scale[0, 0]
    save_file(weights, file, metadata={"format": "pt"})
    method = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    change(folder, quantization_config=method)
    decoder = LocalDecoder.load(str(folder))
    read = decoder.runner.model.state_dict()
    assert plain and all(torch.allclose(read[name], value, rtol=1e-2) for name, value in plain.items())
    assert decoder.generate([Prompt("Who?")])[0].token_ids


# -- tokenizers ------------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_cannot_be_read_is_an_error_of_ours(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{broken")
    for begin in ways_in(folder, tmp_path / "store"):
        with pytest.raises(ModelNotFound, match="needs a tokenizer"):
            begin()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (folder / "tokenizer.model").write_bytes(b"\x0e\x0a\x05<unk>")
    with pytest.raises(ModelNotFound, match="needs a tokenizer"):
        LocalDecoder.load(str(folder))


# -- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_window_of_2048_opens_with_what_fits_and_says_so(family, tmp_path, capsys):
    folder = save_tiny_decoder(tmp_path / "tiny", family, max_position_embeddings=2048)
    with Engine.open(tmp_path / "store", decoder=str(folder), embedder=HashingEmbedder()) as engine:
        said = capsys.readouterr().err
        chosen = engine.manifest.chunk["segment_tokens"]
        longest = registry.get("attention_matching").longest_chunk(engine._setup.facts)
        assert longest - 64 < chosen <= longest < 1536 and chosen % 64 == 0
        assert f"segment_tokens is {chosen}" in said and "2048" in said
        engine.ingest(Document("mill", "The mill at Orne has three wheels. " * 60))
        assert engine.ask("Who?").text is not None
    with Engine.open(tmp_path / "store", embedder=HashingEmbedder()) as again:
        assert again.manifest.chunk["segment_tokens"] == chosen
    assert "segment_tokens" not in capsys.readouterr().err


def test_a_size_that_was_chosen_is_not_changed(tmp_path):
    folder = save_tiny_decoder(tmp_path / "tiny", max_position_embeddings=2048)
    with pytest.raises(lloco_engine.ConfigError, match="segment_tokens must be at most"):
        Engine.open(tmp_path / "store", decoder=str(folder), embedder=HashingEmbedder(), chunk=ChunkConfig())


# -- the hub ---------------------------------------------------------------------------------------------------------


class Hub:
    """A hub of one repository, with a cache of its own; takes what `huggingface_hub.snapshot_download` does."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.cache = repository, cache
        self.fetched: list[str] = []
        self.revisions: list[str | None] = []

    def snapshot_download(
        self, name, *, revision=None, local_files_only=False, allow_patterns=None, ignore_patterns=()
    ):
        from huggingface_hub.errors import LocalEntryNotFoundError

        self.revisions.append(revision)
        folder = self.cache / "snapshots" / "c0ffee"
        if local_files_only:
            if not folder.exists():
                raise LocalEntryNotFoundError("not cached")
            return str(folder)
        for path in sorted(self.repository.rglob("*")):
            file = path.relative_to(self.repository).as_posix()
            wanted = any(fnmatch(file, pattern) for pattern in allow_patterns)
            if path.is_file() and wanted and not any(fnmatch(file, pattern) for pattern in ignore_patterns):
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                if not (folder / file).exists():
                    shutil.copyfile(path, folder / file)
                    self.fetched.append(file)
        return str(folder)


@pytest.fixture
def hub(folder, tmp_path, monkeypatch) -> Hub:
    import huggingface_hub

    made = Hub(folder, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    return made


def add(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0" * 1000)


COPIES = ("consolidated.safetensors", "pytorch_model.bin", "onnx/model.onnx", "original/consolidated.00.pth", "m.gguf")


def test_only_what_is_read_is_fetched_and_of_the_commit_that_was_checked(hub, folder):
    add(folder, *COPIES, "tf_model.h5", "flax_model.msgpack", "photo.png", "onnx/config.json")
    found = models.decoder_folder("owner/model@v2")
    assert hub.fetched[0] == "config.json"
    kept = {file.name for file in folder.iterdir() if file.suffix in (".json", ".jinja")} | {"model.safetensors"}
    assert set(hub.fetched) == kept
    assert hub.revisions == ["v2", "v2", "c0ffee"]
    hub.fetched.clear()
    assert models.decoder_folder("owner/model@v2") == found and not hub.fetched
    assert LocalDecoder.load("owner/model@v2").shape.window == 4096


def test_shards_and_bin_files_are_fetched_where_a_release_has_them(hub, folder):
    (folder / "model.safetensors").unlink()
    tiny_decoder(max_position_embeddings=4096).save_pretrained(folder, max_shard_size="20KB")
    shards = {file.name for file in folder.glob("model-*.safetensors")}
    models.decoder_folder("owner/model")
    assert len(shards) > 1 and shards <= set(hub.fetched)


def test_a_release_of_bin_files_alone_is_fetched(hub, folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    models.decoder_folder("owner/model")
    assert "pytorch_model.bin" in hub.fetched


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "vit"},
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
        {"quantization_config": {"quant_method": "gptq"}},
        {"auto_map": {"AutoConfig": "own.A"}, "model_type": "own"},
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_large_is_fetched(fields, hub, folder, tmp_path):
    change(folder, **fields)
    with pytest.raises((UnsupportedModel, ModelNotFound)):
        Engine.open(tmp_path / "store", decoder="owner/model", embedder=HashingEmbedder())
    assert hub.fetched == ["config.json"]


def test_an_embedders_parts_are_fetched_from_their_folders(hub, folder, tmp_path):
    shutil.rmtree(folder)
    shutil.copytree(models.embedder_folder(), folder)
    add(folder, "onnx/model.onnx", "openvino/openvino_model.xml", "2_Dense/model.safetensors", "rust_model.ot")
    found = Path(models.embedder_folder("owner/embedder"))
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"} <= set(hub.fetched)
    assert not [name for name in hub.fetched if name.endswith((".onnx", ".xml", ".ot", ".bin"))]
    assert Embedder(str(found)).encode(["a"]).shape == (1, 384)


def test_the_manifest_keeps_the_revision(hub, tmp_path):
    with Engine.open(tmp_path / "store", decoder="owner/model@v2", embedder=HashingEmbedder()) as engine:
        assert engine.manifest.decoder == "owner/model@v2"


# -- GGUF ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gguf(monkeypatch) -> Path:
    """The embedded decoder's file."""
    return models._embedded_gguf()


def test_a_gguf_file_is_read_as_the_embedded_one(gguf, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LLOCO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "dir").mkdir()
    os.symlink(gguf, tmp_path / "dir" / "m.gguf")
    copied = []
    monkeypatch.setattr(models, "_convert", lambda file, folder: copied.append(file) or save_tiny_decoder(folder))
    monkeypatch.chdir(tmp_path)
    first = models.decoder_folder("dir/m.gguf")
    assert models.decoder_folder(str(tmp_path / "dir" / "m.gguf")) == first and len(copied) == 1
    assert "converting m.gguf" in capsys.readouterr().err
    with pytest.raises(ModelNotFound, match=r"name the file in it, dir/m\.gguf"):
        models.decoder_folder("dir")


def test_what_is_no_gguf_file_is_never_looked_up(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.setenv("LLOCO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match=r"there is no file 'dir/m\.gguf'"):
        models.decoder_folder("dir/m.gguf")
    (tmp_path / "m.GGUF").write_bytes(b"no gguf" * 100)
    with pytest.raises(ModelNotFound, match="could not be read as a GGUF file"):
        models.decoder_folder("m.GGUF")
    with pytest.raises(ModelNotFound, match="not from a GGUF file"):
        models.embedder_folder("m.GGUF")


def written(path: Path, architecture: str, **fields: float) -> Path:
    """A GGUF file of one tensor."""
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(str(path), architecture)
    for name, value in fields.items():
        writer.add_float32(name.replace("__", "."), value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_of_what_is_not_run_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("LLOCO_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UnsupportedModel, match="'gemma3'"):
        models.decoder_folder(str(written(tmp_path / "a.gguf", "gemma3")))
    with pytest.raises(UnsupportedModel, match="scales its rotary embedding"):
        models.decoder_folder(str(written(tmp_path / "b.gguf", "llama", llama__rope__scaling__factor=8.0)))
    assert not list((tmp_path / "cache").rglob("model.safetensors"))
