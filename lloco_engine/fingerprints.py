"""Fingerprints: hex digits that tell models and tokenizers apart, in milliseconds.

A model's has 24: 16 that stores and adapters have always had, of a few bytes of every tensor, and 8 of many more, which
those that were made earlier lack (`agree`).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lloco_engine.errors import ModelNotFound
from lloco_engine.weights import safetensors_header, sample_file, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["agree", "model_fingerprint", "tokenizer_fingerprint"]

_NOT_ARCHITECTURE = {"_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype"}
_SAMPLE = 256  # bytes read at the start, middle and end of every tensor
_EARLIER = 16  # hex digits of a fingerprint, of those samples alone
_WHOLE = 65_536  # bytes of a tensor that is read whole for the other digits
_PIECES = 16  # that are read of a larger one, evenly spread


def agree(one: str, other: str) -> bool:
    """Whether two fingerprints stand for the same; of one that was made earlier, with 16 digits, the first 16 count."""
    return one == other or (_EARLIER in (len(one), len(other)) and one[:_EARLIER] == other[:_EARLIER])


def model_fingerprint(model: str | Path | PreTrainedModel) -> str:
    """24 hex digits that stand for a model's architecture and weights.

    From a folder: config.json without its incidental fields, and of every tensor the name, dtype, shape and the bytes
    at its start, middle and end, of small ones all bytes, of others 16 pieces from start to end, so that it shows where
    a sixteenth of a tensor is another; equal for a copy under another name or in other shards, and read in
    milliseconds.
    From a loaded model: the same taken from memory (not equal to its folder's: dtype and names may differ).

    Raises:
        ModelNotFound: the folder holds no config.json or no weights.
    """
    if not isinstance(model, str | Path):
        return _memory_fingerprint(model)
    folder = Path(model)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"a model folder must hold a readable config.json: {error}") from error
    files = weight_files(folder)
    if not files:
        raise ModelNotFound(f"a model folder must hold its weights, all shards of them; {folder} does not")
    digest, finer = hashlib.sha256(_architecture(config)), hashlib.sha256()
    tensors: dict[str, tuple[bytes, bytes]] = {}
    for file in files:
        if file.suffix == ".safetensors":
            tensors.update(_sample_safetensors(file))
        else:
            sample_file(file, digest)
            sample_file(file, finer, 1024)
    for name, (sample, more) in sorted(tensors.items()):
        digest.update(name.encode() + b"\0" + sample)
        finer.update(more)
    return digest.hexdigest()[:_EARLIER] + finer.hexdigest()[:8]


def _architecture(config: dict[str, Any]) -> bytes:
    kept = {key: value for key, value in config.items() if key not in _NOT_ARCHITECTURE}
    return json.dumps(kept, sort_keys=True, default=str).encode()


def _memory_fingerprint(model: PreTrainedModel) -> str:
    import torch

    digest, finer = hashlib.sha256(_architecture(model.config.to_dict())), hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        size, count = flat.numel(), _SAMPLE // 4
        starts = sorted({0, max(0, size // 2), max(0, size - count)})
        sample = torch.cat([flat[start : start + count] for start in starts]).to("cpu", torch.float32)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
        step = max(size // _PIECES, 1)
        whole = size <= _WHOLE // 4
        more = flat if whole else torch.cat([flat[start : start + count] for start in range(0, size, step)])
        finer.update(more.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:_EARLIER] + finer.hexdigest()[:8]


def _sample_safetensors(file: Path) -> dict[str, tuple[bytes, bytes]]:
    """Of every tensor what its fingerprint is made of: the first digits, the others."""
    try:
        start, header = safetensors_header(file)
    except ValueError as error:
        raise ModelNotFound(str(error)) from error
    samples = {}
    with file.open("rb") as handle:
        for name, (dtype, shape, (begin, end)) in header.items():
            sample = f"{dtype} {shape}".encode()
            for offset in sorted({begin, max(begin, (begin + end) // 2), max(begin, end - _SAMPLE)}):
                handle.seek(start + offset)
                sample += handle.read(min(_SAMPLE, end - offset))
            size, more = end - begin, b""
            for piece in range(1 if size <= _WHOLE else _PIECES):
                handle.seek(start + begin + size * piece // _PIECES)
                more += handle.read(min(size, _WHOLE if size <= _WHOLE else _SAMPLE))
            samples[name] = sample, more
    return samples


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits that stand for what a tokenizer does: its serialised form, or its vocabulary where it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        form = json.loads(backend.to_str())
        form.pop("truncation", None)  # state of the last call, not of the tokenizer
        form.pop("padding", None)
    else:
        form = {"vocabulary": tokenizer.get_vocab(), "special": tokenizer.all_special_tokens}
    return hashlib.sha256(json.dumps(form, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
