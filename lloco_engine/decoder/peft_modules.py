"""PEFT adapters in a decoder's modules: put in whole, or refused and the modules as they were.

The runner reads the linear layers inside the decoder's layers through the modules that PEFT puts in their places, and
everything else (embeddings, norms, head) by its own weights. So an adapter is right if it changes those layers alone,
and every tensor of its file has a place there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lloco_engine.decoder.lora import PEFT_NAME
from lloco_engine.errors import AdapterError
from lloco_engine.pretrained import quiet, read_adapter_config

__all__ = ["KINDS", "PeftModules"]

# kinds of adapter that tests compare with PEFT's own model (tests/decoder/test_peft_kinds.py)
KINDS = (
    *("LORA", "ADALORA", "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA"),
    *("HRA", "IA3", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "ROAD", "SUPERTUNING", "WAVEFT"),
)
_WEIGHTS, _PICKLED = "adapter_model.safetensors", "adapter_model.bin"
_NOTES = {"peft_version", "auto_mapping", "revision", "base_model_name_or_path", "task_type", "inference_mode"}
# ways to begin that leave the decoder's own weights alone: the others take from these what the adapter begins with
_GENTLE_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_REFUSED = ("layer_replication", "alora_invocation_tokens", "arrow_config", "kasa_config", "trainable_token_indices")
_PREFIX = "base_model.model."


class PeftModules:
    """The linear modules of a model: its own, and for each adapter those that PEFT puts in their places.

    Every adapter is injected into the model's own modules, never into another's: PEFT gives wrong results, without a
    word, where adapters of several kinds are nested.

    Args:
        model: the decoder, without adapters.
        linears: its linear layers that are read through whatever module stands in their places.
    """

    def __init__(self, model: Any, linears: Sequence[Any]) -> None:
        read = set(map(id, linears))
        modules = dict(model.named_modules())
        self._model = model
        self._linears = {place: module for place, module in modules.items() if id(module) in read}
        self._others = {place: module for place, module in modules.items() if place and id(module) not in read}
        self._owners = {place: modules[place.rpartition(".")[0]] for place in modules if place}
        self._weights = frozenset(model.state_dict())
        self._adapters: dict[str, dict[str, Any]] = {}
        self._current: str | None = None

    def load(self, folder: Path, name: str) -> None:
        """Make the modules of an adapter's folder, and put them into the model.

        Raises:
            AdapterError: the folder holds no adapter that can be read whole; the model is as it was.
        """
        try:
            config = _config(folder)
            _check_config(config)
            weights = _weights(folder)
            self._check_weights(weights)
            self._inject(config, name, weights)
        except AdapterError as error:
            raise AdapterError(f"the adapter in {folder} {error}") from error
        except Exception as error:  # PEFT and torch raise many kinds for what does not fit
            raise AdapterError(f"{folder} does not hold a PEFT adapter for this decoder: {error}") from error
        for module in self._adapters[name].values():
            module.eval()

    def add(self, config: Any, name: str) -> dict[str, torch.nn.Parameter]:
        """Make the modules of a new adapter, and put them into the model; returns the parameters by name.

        Raises:
            AdapterError: the model has no such targets, or the adapter is of a kind that is not read; the model is as
                it was.
        """
        try:
            _check_config(config)
            self._inject(config, name, None)
        except Exception as error:
            said = f"the adapter {error}" if isinstance(error, AdapterError) else str(error)
            raise AdapterError(f"the decoder cannot be adapted at {_targets(config)}: {said}") from error
        return {
            f"{place}.{key}".replace(f".{PEFT_NAME}.", f".{name}."): parameter
            for place, module in self._adapters[name].items()
            for key, parameter in module.named_parameters()
            if "lora_" in key
        }

    def use(self, name: str | None) -> None:
        """Put an adapter's modules into the model, or the model's own."""
        if name != self._current:
            self._put(self._linears | (self._adapters[name] if name is not None else {}))
            self._current = name

    def remove(self, name: str) -> None:
        """Let go of an adapter."""
        if self._current == name:
            self.use(None)
        del self._adapters[name]

    # -- making modules -----------------------------------------------------------------------------------------------

    def _inject(self, config: Any, name: str, weights: dict[str, torch.Tensor] | None) -> None:
        from peft.functional import get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict

        before = self._current
        self.use(None)
        data = {place: module.weight.data for place, module in self._linears.items()}
        try:
            with quiet():  # PEFT warns of many things that are checked here
                inject_adapter_in_model(config, self._model, PEFT_NAME)
                self._check_places()
                if weights is not None:
                    asked = get_peft_model_state_dict(self._model, adapter_name=PEFT_NAME, save_embedding_layers=False)
                    _check_names(set(weights), set(asked))
                    read: Any = set_peft_model_state_dict(self._model, weights, PEFT_NAME)
                    _check_names(set(read.unexpected_keys), set())
            now = {place: self._at(place) for place in self._linears}
            if any(module.weight.data_ptr() != data[place].data_ptr() for place, module in self._linears.items()):
                raise AdapterError("changes the decoder's own weights as it is put in, which is not read")
            self._adapters[name] = {place: new for place, new in now.items() if new is not self._linears[place]}
            self._current = name
        except BaseException:
            self._put(self._others | self._linears)
            for place, module in self._linears.items():
                module.weight.data = data[place]
            self.use(before)
            raise
        finally:
            self._model.__dict__.pop("peft_config", None)

    def _at(self, place: str) -> Any:
        return self._owners[place]._modules.get(_attribute(place))

    def _put(self, modules: Mapping[str, Any]) -> None:
        for place, module in modules.items():
            if self._at(place) is not module:
                setattr(self._owners[place], _attribute(place), module)

    def _check_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Refuse tensors that would overwrite the decoder's own: biases (``bias="all"``) and whole modules."""
        names = {key.removeprefix(_PREFIX).replace(".base_layer", "") for key in weights}
        if own := sorted(names & self._weights):
            raise AdapterError(f"changes the decoder's own {own[0]}{_more(own)}, which is not read from an adapter")

    def _check_places(self) -> None:
        """Refuse modules that PEFT has put where the runner does not look."""
        others = self._others.items()
        changed = [place for place, module in others if self._at(place) is not module]
        if changed:
            raise AdapterError(
                f"changes {changed[0]}{_more(changed)}: only the linear layers of attention and MLP can be adapted"
            )


def _config(folder: Path) -> Any:
    """PEFT's configuration of an adapter, none of whose settings PEFT left out."""
    config = read_adapter_config(folder)
    said = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    unknown = sorted(key for key, value in said.items() if value and key not in _NOTES and not hasattr(config, key))
    if unknown:
        raise AdapterError(f"has settings that the installed PEFT does not know, {', '.join(unknown)}; update peft")
    return config


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    if (folder / _WEIGHTS).is_file() or not (folder / _PICKLED).is_file():
        try:
            return load_file(folder / _WEIGHTS)
        except Exception as error:
            raise AdapterError(f"must have readable weights in {_WEIGHTS}: {error}") from error
    try:
        weights: dict[str, torch.Tensor] = torch.load(folder / _PICKLED, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is damaged or would run code
        raise AdapterError(f"must have readable weights in {_PICKLED}: {error}") from error
    return weights


def _check_config(config: Any) -> None:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in KINDS:
        raise AdapterError(f"is of kind {kind}, and those that are read are {', '.join(KINDS)}")
    begins = getattr(config, "init_lora_weights", None)
    if begins not in _GENTLE_STARTS:
        raise AdapterError(
            f"changes the decoder's own weights (init_lora_weights={begins!r}); save it with PEFT's "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA adapter of it"
        )
    for setting in _REFUSED:
        if getattr(config, setting, None):
            raise AdapterError(f"needs {setting}, which is not read; train one without it")
    if getattr(config, "modules_to_save", None):
        raise AdapterError(f"replaces {', '.join(config.modules_to_save)} (modules_to_save), which is not read")


def _check_names(found: set[str], expected: set[str]) -> None:
    """Refuse an adapter whose tensors are not those that its configuration asks for."""
    found = {key.removeprefix(_PREFIX) for key in found}
    expected = {key.removeprefix(_PREFIX) for key in expected}
    if unread := sorted(found - expected):
        raise AdapterError(f"has {unread[0]}{_more(unread)}, which has no place in the decoder as it is configured")
    if missing := sorted(expected - found):
        raise AdapterError(f"lacks {missing[0]}{_more(missing)}, which its configuration asks for")


def _attribute(place: str) -> str:
    return place.rpartition(".")[2]


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _targets(config: Any) -> Any:
    targets = getattr(config, "target_modules", None)
    return sorted(targets) if isinstance(targets, set | list | tuple) else targets
