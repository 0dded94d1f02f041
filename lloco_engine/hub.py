"""A model's files from the hub: its configuration first, and then only what is read of the rest."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lloco_engine.errors import ModelNotFound
from lloco_engine.weights import weight_files

__all__ = ["is_hub_name", "snapshot"]

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:@([\w.][\w./-]*))?")
_SMALL = ["*.json", "*.jinja", "*.model", "*.txt"]
# under these names transformers reads weights; a release may hold the same once more in other formats
_WEIGHTS = ["model.safetensors", "model-*-of-*.safetensors"], ["pytorch_model.bin", "pytorch_model-*-of-*.bin"]
_OTHER_FORMATS = ["onnx/*", "openvino/*", "original/*", "*.onnx", "*.gguf"]


def is_hub_name(name: str) -> bool:
    """Whether a name can be one of the hub: ``owner/model`` or ``owner/model@revision``."""
    return _NAME.fullmatch(name) is not None


def snapshot(name: str, role: str, check: Callable[[str], object] | None = None) -> str:
    """The folder of a model of the hub, downloaded if it is not in the hub's own cache.

    Args:
        name: ``owner/model``, or ``owner/model@revision`` for a branch, tag or commit.
        role: ``"decoder"`` or ``"embedder"``.
        check: called with a folder that holds config.json, before anything larger is downloaded; raises where the
            model is of no use.

    Raises:
        ModelNotFound: it is not there, or the hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    download: Any = huggingface_hub.snapshot_download
    matched = _NAME.fullmatch(name)
    assert matched is not None
    model, revision = matched.groups()
    # an embedder's parts lie in folders of their own; a decoder's files all lie at the top
    leave: dict[str, Any] = {"ignore_patterns": [*_OTHER_FORMATS, *(["*/*"] if role == "decoder" else [])]}
    at: dict[str, Any] = {"revision": revision} if revision else {}

    def weights(number: int) -> list[str]:
        names = _WEIGHTS[number]
        return names if role == "decoder" else [*names, *(f"*/{one}" for one in names)]

    try:
        with contextlib.suppress(LocalEntryNotFoundError):
            cached = download(model, local_files_only=True, **at)
            if _has_model(Path(cached)):
                if check is not None:
                    check(cached)
                return str(cached)
        folder = download(model, allow_patterns=["config.json"], **at)
        if check is not None and (Path(folder) / "config.json").is_file():
            check(folder)
        if Path(folder).parent.name == "snapshots":
            at = {"revision": Path(folder).name}  # the commit whose configuration was checked, and no later one
        folder = download(model, allow_patterns=[*_SMALL, *weights(0)], **leave, **at)
        if not _has_model(Path(folder)):
            folder = download(model, allow_patterns=[*_SMALL, *weights(1)], **leave, **at)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelNotFound(
            f"no local folder is called {name!r}, and it could not be had from the hub ({reason}); "
            f"check the name and the network, give a local folder, or use --{role} embedded (`make install`)"
        ) from error
    if not _has_model(Path(folder)):
        raise ModelNotFound(
            f"the hub's {name!r} holds no config.json with safetensors or .bin weights; "
            "of a release in GGUF alone, download one file and name it by its path"
        )
    return str(folder)


def _has_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and bool(weight_files(folder))
