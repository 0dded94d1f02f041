"""An adapter's folder into a decoder, once it is known to be for that decoder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from lloco_engine.adapters.manifest import MANIFEST, WEIGHTS, AdapterManifest
from lloco_engine.errors import AdapterError

if TYPE_CHECKING:
    from lloco_engine.decoder.answering import AnsweringDecoder

__all__ = ["DEFAULT", "default_folder", "facts_of", "hash_of_named", "load", "load_named", "read"]

DEFAULT = "default"  # group of documents that have none; the shipped adapter's name


def facts_of(decoder: AnsweringDecoder) -> dict[str, str]:
    """The fingerprints of a decoder, its tokenizer and its template, as manifests name them."""
    return {
        "decoder_fingerprint": decoder.fingerprint,
        "tokenizer_fingerprint": decoder.tokenizer_fingerprint,
        "template_fingerprint": decoder.template.fingerprint,
    }


def read(folder: Path) -> AdapterManifest:
    """The manifest of an adapter's folder, after its weights were compared with the manifest's hash.

    Raises:
        AdapterError: a file is missing or damaged; names it.
    """
    manifest = AdapterManifest.load(folder)
    path = folder / WEIGHTS
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise AdapterError(f"an adapter's folder must hold {WEIGHTS}, and {folder} does not: {error}") from error
    if digest != manifest.weights_sha256:
        raise AdapterError(f"{path} is damaged: it does not match the hash in {MANIFEST}; put a copy of it back")
    return manifest


def load(decoder: AnsweringDecoder, folder: Path, name: str, memory: str = "compact_kv") -> AdapterManifest:
    """Load an adapter under a name.

    Args:
        decoder: to be adapted.
        folder: of the adapter, as `lloco finetune` writes it.
        name: to call it by.
        memory: the kind of memory that it is to read.

    Raises:
        AdapterError: it is damaged, or was made for something else; names the field.
    """
    manifest = read(folder)
    manifest.check(facts_of(decoder) | {"memory": memory})
    decoder.load_adapter(folder, name)
    return manifest


def default_folder() -> Path | None:
    """The general adapter of the embedded decoder, which the package ships; None where it was left out."""
    folder = Path(__file__).parent / DEFAULT
    return folder if (folder / MANIFEST).is_file() else None


def load_named(decoder: AnsweringDecoder, reference: str, memory: str = "compact_kv") -> str | None:
    """An adapter by reference, loaded if it is not yet: for those who have no store.

    Args:
        decoder: to be adapted.
        reference: ``"none"``; the name of one that is loaded; ``"default"``, the shipped one; or a folder.
        memory: the kind of memory that it is to read.

    Returns:
        the name to give to the decoder, None for the base weights.

    Raises:
        AdapterError: there is none, or it was made for something else.
    """
    if reference == "none":
        return None
    if reference in decoder.adapters:
        return reference
    folder = default_folder() if reference == DEFAULT else Path(reference).expanduser()
    if folder is None or not (folder / MANIFEST).is_file():
        raise AdapterError(
            f"an adapter is 'none', 'default', or a folder that `lloco finetune` wrote, and {reference!r} is none of "
            f"them; loaded: {', '.join(decoder.adapters) or 'none'}"
        )
    name = (
        reference
        if reference == DEFAULT
        else f"{folder.name}@{hashlib.sha256(bytes(folder.resolve())).hexdigest()[:8]}"
    )
    name = name.replace(".", "_")  # PEFT keeps adapters in a module, whose names have no dots
    if name not in decoder.adapters:
        load(decoder, folder, name, memory)
    return name


def hash_of_named(reference: str) -> str | None:
    """SHA-256 of the weights that `load_named` would load; None for what was loaded by hand."""
    folder = default_folder() if reference == DEFAULT else Path(reference).expanduser()
    if folder is None or not (folder / MANIFEST).is_file():
        return None
    return AdapterManifest.load(folder).weights_sha256
