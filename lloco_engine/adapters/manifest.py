"""What an adapter was trained with and on: ``lloco.json`` beside PEFT's own files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from lloco_engine.config import Config
from lloco_engine.errors import AdapterError, ConfigError
from lloco_engine.fingerprints import agree

__all__ = ["FILES", "FORMAT_VERSION", "MANIFEST", "MUST_AGREE", "WEIGHTS", "AdapterManifest"]

FORMAT_VERSION = 1
MANIFEST = "lloco.json"
WEIGHTS = "adapter_model.safetensors"
FILES = ("adapter_config.json", WEIGHTS, MANIFEST, "log.jsonl")  # of an adapter's folder
MUST_AGREE = ("decoder_fingerprint", "tokenizer_fingerprint", "template_fingerprint", "memory")


@dataclass(frozen=True)
class AdapterManifest(Config):
    """Everything that an adapter depends on, and how good it was.

    Fingerprints identify the decoder; ``decoder`` is only its name. ``memory`` is the kind of memory that it reads;
    ``compressor``, ``compressor_settings`` and ``ratios`` are what it was trained on, and others of the same kind can
    be read too. ``data`` are the files trained on, each with its name, sha256, documents and questions; ``config`` is
    `FinetuneConfig` as JSON; ``weights_sha256`` is the hash of the file of weights; ``metrics`` are losses on the
    held-out documents; ``created`` is an ISO 8601 time.
    """

    format_version: int
    group: str
    decoder: str
    decoder_fingerprint: str
    tokenizer_fingerprint: str
    template_fingerprint: str
    memory: str
    compressor: str
    compressor_settings: dict[str, Any]
    ratios: list[float]
    data: list[dict[str, Any]]
    config: dict[str, Any]
    weights_sha256: str
    metrics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        for f in fields(self):
            value, wanted = getattr(self, f.name), _TYPES[str(f.type).split("[")[0]]
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise ConfigError(f"{f.name} of an adapter's manifest must be of type {f.type}, not {value!r}")

    def dumps(self) -> str:
        """The manifest as the text of ``lloco.json``."""
        return json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read ``lloco.json`` of an adapter's folder.

        Raises:
            AdapterError: it cannot be read, or a newer engine wrote it.
        """
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_bytes())
            if not isinstance(values, dict):
                raise TypeError(f"it must hold a JSON object, not {type(values).__name__}")
            version = values.get("format_version")
            if isinstance(version, int) and version > FORMAT_VERSION:
                raise AdapterError(f"format_version of {path} is {version}; this engine reads up to {FORMAT_VERSION}")
            return cls.from_json(values)
        except (OSError, ValueError, TypeError) as error:
            raise AdapterError(
                f"an adapter's folder must hold a readable {MANIFEST}, and {folder} does not ({error}); "
                "`lloco finetune` writes one"
            ) from error

    def fits(self, facts: Mapping[str, str]) -> bool:
        """Whether the adapter is for a decoder with these facts, some of those that `check` takes."""
        return all(agree(getattr(self, name), fact) for name, fact in facts.items())

    def check(self, facts: Mapping[str, str]) -> None:
        """Compare with the decoder and the memory that it is about to be used with.

        Args:
            facts: ``decoder_fingerprint``, ``tokenizer_fingerprint``, ``template_fingerprint`` and ``memory``.

        Raises:
            AdapterError: names the first field that differs, and both values.
        """
        for name in MUST_AGREE:
            if not agree(getattr(self, name), facts[name]):
                raise AdapterError(
                    f"adapter {self.group!r} was made with {name} {getattr(self, name)!r} (decoder {self.decoder!r}), "
                    f"not {facts[name]!r}: train another, or use --adapter none"
                )


_TYPES: dict[str, Any] = {"int": int, "float": (int, float), "str": str, "dict": dict, "list": list}
