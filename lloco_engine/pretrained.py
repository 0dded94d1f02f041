"""The one place where configurations, tokenizers, weights and embedders are read by the libraries that know them.

A checkpoint is data: code that it brings along never runs and nobody is asked whether it may, and nothing is looked up
on the hub, since every folder is a local one by now.
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lloco_engine.errors import AdapterError, ModelNotFound, UnsupportedModel
from lloco_engine.shape import DecoderShape
from lloco_engine.weights import weight_files

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ends_of",
    "quiet",
    "read_adapter_config",
    "read_decoder",
    "read_decoder_config",
    "read_embedder",
    "read_ends",
    "read_gguf",
    "read_gguf_config",
    "read_tokenizer",
]

_SAFE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_WRAPPED = {r"^(module\.|_orig_mod\.|base_model\.model\.)+": ""}  # what a training run puts before its weights' names
# Tensors that a causal language model does not need: tables that old releases kept of what the configuration says,
# and the value head that reinforcement learning leaves behind.
_HARMLESS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.(masked_)?bias)|v_head\..*")
_GGUF = ("llama", "mistral", "qwen2", "qwen3")  # whose tensors the conversion from GGUF is known to name and turn right
_SUMMARY = "embed_summary.weight"  # of a published AutoCompressor, whose config.json says summary_length


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars, log lines and warnings of transformers; everything is as before at the end."""
    from transformers.utils import logging as module

    logging: Any = module  # its functions are untyped
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# -- decoders --------------------------------------------------------------------------------------------------------


def read_decoder_config(folder: str | Path) -> PretrainedConfig:
    """A decoder's configuration, once it is known that the engine can run it. Only config.json is read.

    Raises:
        ModelNotFound: there is none that can be read.
        UnsupportedModel: it is no causal language model that transformers knows, or one with layers that keep more than
            keys and values; or its weights are quantised in a way that is not read on this machine.
    """
    path = Path(folder) / "config.json"
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"a decoder folder must hold a readable config.json, {path}: {error}") from error
    kind = said.get("model_type") if isinstance(said, dict) else None
    if not _is_known(kind):
        code = ", and code that a checkpoint brings along is never run" if "auto_map" in (said or ()) else ""
        raise UnsupportedModel(
            "a decoder must be a causal language model that the installed transformers knows, as model_type in "
            f"config.json says; in {folder} it is {kind!r}{code}"
        )
    if quantised := said.get("quantization_config"):
        _check_quantised(folder, quantised)
    if (Path(folder) / "adapter_config.json").is_file():
        raise UnsupportedModel(
            f"a decoder's folder must hold no adapter, and {folder} has adapter_config.json: name the decoder's own "
            "folder, and load the adapter with Engine.load_adapter"
        )
    from transformers import AutoConfig

    try:
        with quiet():
            config: PretrainedConfig = AutoConfig.from_pretrained(str(folder), **_SAFE)
        DecoderShape.of(config)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"the decoder in {folder} cannot be run: {error}") from error
    except Exception as error:  # transformers raises many kinds for fields that are missing or of another type
        raise ModelNotFound(f"the decoder in {folder} has a config.json that cannot be read: {error}") from error
    return config


def read_ends(folder: str | Path, tokenizer: Any) -> set[int]:
    """The tokens that end a decoder's answers: those that its generation config names, and its tokenizer's."""
    from transformers import GenerationConfig

    try:
        with quiet():
            config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    except OSError:  # it has none of its own
        config = GenerationConfig.from_model_config(read_decoder_config(folder))
    return ends_of(config, tokenizer)


def ends_of(config: Any, tokenizer: Any) -> set[int]:
    """The tokens that end answers, by a generation config, which may be None, and a tokenizer."""
    named = None if config is None else config.eos_token_id
    return {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id} - {None}


def _check_quantised(folder: str | Path, quantised: Any) -> None:
    """Refuse quantised weights that transformers has no means to read here.

    Raises:
        UnsupportedModel: a package or a device is missing, or the method is none that it knows; says which.
    """
    method = _method(quantised)
    if method == "fp8":  # is read as what it stands for
        return
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        with quiet():
            quantiser: Any = AutoHfQuantizer.from_config(quantised, pre_quantized=True)
            quantiser.validate_environment(device_map=None)
    except Exception as error:  # transformers raises many kinds for what is missing
        raise UnsupportedModel(
            f"a decoder's weights must be such as transformers can read on this machine, and those in {folder} are "
            f"quantised, by {method}: {error}; or name its release in bfloat16 or float16, or a GGUF file"
        ) from error


def _method(quantised: Any) -> str:
    """How weights are quantised, in a few words."""
    if not isinstance(quantised, dict):
        return str(quantised)
    method = str(quantised.get("quant_method") or "a method that config.json does not name")
    bits = [name for name in ("load_in_4bit", "load_in_8bit") if quantised.get(name)]
    return f"{method} ({bits[0]})" if bits else method


def _is_known(kind: Any) -> bool:
    """Whether transformers has a causal language model of this ``model_type``."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return isinstance(kind, str) and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def read_decoder(folder: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """A decoder with its weights, on the CPU: every tensor of its files has a place in it, and none is missing.

    Raises:
        ModelNotFound: the files cannot be read, or lack a tensor.
        UnsupportedModel: as `read_decoder_config`; or the files hold weights that the configuration has no place for.
    """
    config: Any = read_decoder_config(folder)
    from transformers import AutoModelForCausalLM

    if not weight_files(Path(folder)):
        raise ModelNotFound(f"a decoder folder must hold safetensors weights, all shards of them; {folder} does not")
    options: dict[str, Any] = {}
    quantised = getattr(config, "quantization_config", None)
    if isinstance(quantised, dict) and quantised.get("quant_method") == "fp8":  # its kernels are a GPU's
        from transformers import FineGrainedFP8Config

        options["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder),
                config=config,
                dtype=dtype,
                key_mapping=_WRAPPED,
                output_loading_info=True,
                **options,
                **_SAFE,
            )
    except Exception as error:  # transformers raises many kinds for a damaged folder
        raise ModelNotFound(f"the decoder in {folder} could not be read: {error}") from error
    model: PreTrainedModel = loaded[0]
    report: dict[str, Any] = loaded[1]
    if missing := sorted(report["missing_keys"]):
        raise ModelNotFound(f"the decoder in {folder} could not be read: its weights lack {_named(missing)}")
    summaries = bool(getattr(config, "summary_length", None))
    unread = [
        name
        for name in sorted(report["unexpected_keys"])
        if not _HARMLESS.fullmatch(name) and not (summaries and name.endswith(_SUMMARY))
    ]
    if unread:
        raise UnsupportedModel(
            f"every tensor of a decoder must have a place in what its config.json describes, and in {folder} "
            f"{_named(unread)} has none: it is another architecture, or another model's config.json"
        )
    return model


def _named(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} ({len(names)} tensors in all)"


def read_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """A decoder's tokenizer.

    Raises:
        ModelNotFound: the folder holds none that can be read.
    """
    from transformers import AutoTokenizer

    place = Path(folder)
    try:
        with quiet():
            made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), **_SAFE)
        return made
    except Exception as error:  # transformers and tokenizers raise many kinds
        reason = str(error)
        if (place / "tokenizer.model").is_file() and not (place / "tokenizer.json").is_file():
            absent = [name for name in ("sentencepiece", "tiktoken") if find_spec(name) is None]
            if absent:
                reason = (
                    f"it has tokenizer.model alone, which needs other packages: `pip install {' '.join(absent)}`, or "
                    "put the tokenizer.json of the same model beside it"
                )
        raise ModelNotFound(f"a decoder needs a tokenizer, and none could be read from {folder}: {reason}") from error


# -- GGUF ------------------------------------------------------------------------------------------------------------


def read_gguf_config(file: Path) -> PretrainedConfig:
    """The configuration in a GGUF file, once it is known that the engine can run the decoder.

    Raises:
        ModelNotFound: it is no GGUF file that can be read.
        UnsupportedModel: the engine cannot run what it holds.
    """
    from gguf import GGUFReader
    from transformers import AutoConfig

    try:
        header = GGUFReader(str(file))
        scaled = any(name.endswith("rope.scaling.factor") for name in header.fields)
        scaled |= any(tensor.name.startswith("rope_freqs") for tensor in header.tensors)
        kind = str(header.fields["general.architecture"].contents())
    except Exception as error:  # gguf and numpy raise many kinds for what is no GGUF file
        raise ModelNotFound(f"{file} could not be read as a GGUF file: {error}") from error
    if kind not in _GGUF:
        raise UnsupportedModel(f"a GGUF decoder must be of one of {', '.join(_GGUF)}, and {file} is of {kind!r}")
    if scaled:
        raise UnsupportedModel(
            f"{file} scales its rotary embedding, which is not read from GGUF: name its release in safetensors"
        )
    try:
        with quiet():
            config: PretrainedConfig = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name, **_SAFE)
        DecoderShape.of(config)
    except UnsupportedModel:
        raise
    except Exception as error:  # transformers raises many kinds
        raise ModelNotFound(f"{file} could not be read: {error}") from error
    return config


def read_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A decoder of a GGUF file in float32, and its tokenizer.

    Raises:
        ModelNotFound: it cannot be read.
        UnsupportedModel: as `read_gguf_config`; or it holds tensors that have no place in the decoder.
    """
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read_gguf_config(file)
    options: dict[str, Any] = {"gguf_file": file.name, **_SAFE}
    try:
        with quiet():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                str(file.parent), dtype=torch.float32, **options
            )
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(file.parent), **options)
        there, read = len(GGUFReader(str(file)).tensors), len(list(model.parameters()))
    except Exception as error:  # transformers raises many kinds
        raise ModelNotFound(f"{file} could not be read: {error}") from error
    if there != read:
        raise UnsupportedModel(
            f"every tensor of a GGUF file must have a place in its decoder, and {file} has {there} where a "
            f"{model.config.model_type} of its sizes has {read}: name the decoder's release in safetensors"
        )
    return model, tokenizer


# -- adapters and embedders ------------------------------------------------------------------------------------------


def read_adapter_config(folder: Path) -> Any:
    """PEFT's configuration of an adapter, of type ``peft.PeftConfig``.

    Raises:
        AdapterError: there is none that can be read.
    """
    from peft import PeftConfig

    if not (folder / "adapter_config.json").is_file():  # else PEFT would look for it on the hub
        raise AdapterError("must have adapter_config.json")
    try:
        with quiet():
            return PeftConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # PEFT raises many kinds
        raise AdapterError(f"must have a readable adapter_config.json: {error}") from error


def read_embedder(folder: str | Path, device: str) -> SentenceTransformer:
    """A sentence-transformers embedder.

    Raises:
        ModelNotFound: it cannot be read.
        UnsupportedModel: its modules are not sentence-transformers' own.
    """
    from sentence_transformers import SentenceTransformer

    path = Path(folder) / "modules.json"
    try:
        parts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        types = [str(part["type"]) for part in parts]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelNotFound(f"the embedder in {folder} has a modules.json that cannot be read: {error}") from error
    if foreign := [kind for kind in types if not kind.startswith("sentence_transformers.")]:
        raise UnsupportedModel(
            f"an embedder's modules must be sentence-transformers' own, and {folder} names {foreign[0]!r}: code that a "
            "checkpoint brings along is never run"
        )
    try:
        with quiet():
            return SentenceTransformer(str(folder), device=device, **_SAFE)
    except Exception as error:  # many kinds, for what is damaged or would run code
        raise ModelNotFound(f"the embedder in {folder} could not be read: {error}") from error
