"""What a store was made with: one JSON file, written once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from lloco_engine import kinds
from lloco_engine.config import NUMBERS, Config, DType
from lloco_engine.errors import ConfigError, StoreCorrupt, StoreMismatch
from lloco_engine.fingerprints import agree
from lloco_engine.kinds import Format, Sizes
from lloco_engine.store.segments import content_id

__all__ = ["FORMAT_VERSION", "Manifest"]

FORMAT_VERSION = 2  # 1 knew no int4

# The same model may be named in several ways (a hub id, a folder): fingerprints say what it is.
_DESCRIPTIVE = frozenset({"decoder", "embedder", "created", "engine_version"})
_SEGMENT_FIELDS = (
    "decoder_fingerprint",
    "tokenizer_fingerprint",
    "template_fingerprint",
    "layers",
    "kv_heads",
    "head_dim",
    "memory",
    "compressor",
    "compressor_settings",
    "ratio",
    "dtype",
)


@dataclass(frozen=True)
class Manifest(Config):
    """Models, compressor and shapes that everything in a store was made with.

    ``memory`` is the kind of its segments (`lloco_engine.kinds`).

    Fingerprints identify models; ``decoder`` and ``embedder`` are only their names. ``layers``, ``kv_heads`` and
    ``head_dim`` are the decoder's; ``ratio`` is source tokens per slot; ``dtype`` is that of segment files;
    ``embedder_dim`` the length of a search vector; ``chunk`` is `ChunkConfig` as JSON; ``created`` an ISO 8601 time;
    ``summary_dim`` the numbers of an input embedding, where segments are read in the place of such (else 0). These do
    not depend on the template, so in their stores ``template_fingerprint`` is "none".
    """

    format_version: int
    decoder: str
    decoder_fingerprint: str
    tokenizer_fingerprint: str
    template_fingerprint: str
    layers: int
    kv_heads: int
    head_dim: int
    memory: str
    compressor: str
    compressor_settings: dict[str, Any]
    ratio: float
    dtype: DType
    embedder: str
    embedder_fingerprint: str
    embedder_dim: int
    chunk: dict[str, Any] = field(default_factory=dict)
    created: str = ""
    engine_version: str = ""
    summary_dim: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.ratio, int):
            object.__setattr__(self, "ratio", float(self.ratio))
        for f in fields(self):
            value, wanted = getattr(self, f.name), _TYPES[str(f.type).split("[")[0]]
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise ConfigError(f"{f.name} of a manifest must be of type {f.type}, not {value!r}")
        for name in ("layers", "kv_heads", "head_dim", "embedder_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} of a manifest must be at least 1, not {getattr(self, name)!r}")
        if kinds.get(self.memory).embeds != (self.summary_dim > 0):
            raise ConfigError(
                f"summary_dim of a manifest must suit memory {self.memory!r}, not be {self.summary_dim!r}"
            )
        if self.dtype not in NUMBERS:
            raise ConfigError(f"dtype of a manifest must be one of {', '.join(NUMBERS)}, not {self.dtype!r}")

    def dumps(self) -> str:
        """The manifest as the text of ``manifest.json``."""
        return json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read ``manifest.json``.

        Raises:
            StoreCorrupt: it cannot be read; names the file.
            StoreMismatch: a newer engine wrote it.
        """
        try:
            values = json.loads(path.read_bytes())
            if not isinstance(values, dict):
                raise TypeError(f"it must hold a JSON object, not {type(values).__name__}")
            version = values.get("format_version")
            if isinstance(version, int) and version > FORMAT_VERSION:
                raise StoreMismatch(
                    f"format_version of {path} is {version}; this engine reads up to {FORMAT_VERSION}: upgrade it"
                )
            return cls.from_json(values)
        except (OSError, ValueError, TypeError) as error:
            raise StoreCorrupt(
                f"{path} is not a store's manifest ({error}); put a copy of it back, or repair the store"
            ) from error

    def check(self, expect: Manifest | Mapping[str, Any], path: Path) -> None:
        """Compare with what the caller is about to use, a whole manifest or only some of its fields.

        Names of models, ``created`` and ``engine_version`` are not compared.

        Raises:
            StoreMismatch: names the first field that differs, the kind of memory before all, and both values.
            ConfigError: ``expect`` has a field that a manifest has not.
        """
        wanted = expect.to_json() if isinstance(expect, Manifest) else dict(expect)
        mine = self.to_json()
        if unknown := sorted(set(wanted) - set(mine)):
            raise ConfigError(f"a manifest has no field {unknown[0]!r}; it has {', '.join(mine)}")
        names = [name for name in mine if name in wanted and name not in _DESCRIPTIVE]
        for name in sorted(names, key=lambda name: name != "memory"):
            if name.endswith("_fingerprint") and agree(mine[name], wanted[name]):
                continue
            if _as_stored(mine[name]) != _as_stored(wanted[name]):
                raise StoreMismatch(
                    f"{name} of the store at {path} is {mine[name]!r}{self._named(name)}, not {wanted[name]!r}: "
                    "use what the store was made with, or make another store"
                )

    @property
    def form(self) -> Format:
        """What the segment files of the store have in common."""
        sizes = Sizes(self.layers, self.kv_heads, self.head_dim, self.summary_dim)
        return kinds.get(self.memory).format(sizes, self.dtype)

    def segment_id(self, tenant: str, token_ids: Iterable[int], previous: str | None = None) -> str:
        """Content address of a segment: 32 hex digits of what it is made from.

        Same decoder, compressor, settings, tenant and tokens give the same id, so an ingest that was cut off finds its
        work again. Tenants never share a segment. ``previous`` is the id of the segment that this one builds on.
        """
        made_with = {name: getattr(self, name) for name in _SEGMENT_FIELDS} | {"tenant": tenant}
        return content_id(made_with, token_ids, previous)

    def _named(self, name: str) -> str:
        if name in ("decoder_fingerprint", "tokenizer_fingerprint", "template_fingerprint"):
            return f" (decoder {self.decoder!r})"
        return f" (embedder {self.embedder!r})" if name.startswith("embedder_") else ""


_TYPES: dict[str, Any] = {"int": int, "float": float, "str": str, "DType": str, "dict": dict}


def _as_stored(value: Any) -> Any:
    return json.loads(json.dumps(value))  # JSON has no tuples
