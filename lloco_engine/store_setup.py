"""What a store is made with: the caller's choice, else its manifest's, else the default; and a store opened with it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lloco_engine import __version__, kinds, models
from lloco_engine.config import ChunkConfig, CompressConfig, PrefixConfig, StoreConfig
from lloco_engine.decoder.facts import DecoderFacts
from lloco_engine.errors import ConfigError, StoreError, StoreNotFound
from lloco_engine.kinds import Room
from lloco_engine.store import FORMAT_VERSION, Manifest, Store

if TYPE_CHECKING:
    from lloco_engine.chunking import Chunker
    from lloco_engine.compress.base import Compressor
    from lloco_engine.decoder.answering import AnsweringDecoder
    from lloco_engine.decoder.template import Template
    from lloco_engine.embedder import Encodes
    from lloco_engine.remote import Address

__all__ = ["Setup", "makers_of", "open_store", "stored_manifest"]


_STEP = 64  # a default segment size that is made to fit is a multiple of it
_LEAST = 256  # tokens below which nothing fits well: the size must be chosen then


class Setup:
    """A decoder, an embedder and settings, each the caller's choice, else the store's, else the default.

    Args:
        stored: the manifest of the store; None where it is yet to be made.
        decoder: a name, or an opened decoder.
        embedder: a name, or an embedder.
        compress: which compressor, and how hard.
        chunk: sizes of chunks and search windows.
        store: how segments are kept.
        device: for an embedder by name.
        template: as `LocalDecoder` takes it.
        compressor: one that is made already, instead of that which ``compress`` or the store names.
    """

    def __init__(
        self,
        stored: Manifest | None,
        *,
        decoder: str | AnsweringDecoder | None,
        embedder: str | Encodes | None,
        compress: CompressConfig | None,
        chunk: ChunkConfig | None,
        store: StoreConfig | None,
        device: str | None,
        template: str | None = None,
        compressor: Compressor | None = None,
    ) -> None:
        from lloco_engine.compress import registry
        from lloco_engine.embedder import Embedder

        self._address = None if decoder is None else _elsewhere(decoder, stored)
        if self._address is not None:
            decoder = self._address.local or None
        if stored is not None:
            decoder = decoder or stored.decoder
            embedder = embedder or stored.embedder
            compress = compress or CompressConfig(stored.compressor, stored.ratio, stored.compressor_settings)
            chunk = chunk or ChunkConfig.from_json(stored.chunk)
        self.decoder = decoder or models.DEFAULT_DECODER
        self.template = template
        self.stored = stored
        embedder = embedder or models.DEFAULT_EMBEDDER
        self.embedder: Encodes = Embedder(embedder, device) if isinstance(embedder, str) else embedder
        self.compress = compress or CompressConfig()
        self._chunk = chunk
        self.store = store or StoreConfig()
        self.compressor = compressor or registry.get(self.compress.name, **self.compress.settings)
        self.kind = kinds.get(self.compressor.memory)
        if self.store.dtype == "auto":
            self.store = replace(self.store, dtype=self.kind.dtype if stored is None else stored.dtype)

    @cached_property
    def facts(self) -> DecoderFacts:
        """The decoder without its weights, its template as the store was made with it."""
        # which weights answer elsewhere is seen to there
        weights = self.stored.decoder_fingerprint if self._address is not None and self.stored is not None else None
        facts = DecoderFacts.of(self.decoder, self.template, weights)
        if self.stored is None or not isinstance(self.decoder, str):
            return facts
        made_with = self.stored.template_fingerprint
        forms = _forms(facts.template, self.stored.created)
        return replace(facts, template=next((one for one in forms if one.fingerprint == made_with), facts.template))

    @property
    def elsewhere(self) -> str:
        """Where the decoder runs, where that is not in this process; else ""."""
        if self._address is not None:
            return self._address.place
        if isinstance(self.decoder, str) or not hasattr(self.decoder, "device"):  # a name, or facts to search by
            return ""
        return self.decoder.name if self.decoder.device is None else ""

    def require_weights(self) -> None:
        """Raise `ConfigError` where the decoder's weights are not to be had in this process."""
        if self.elsewhere:
            raise ConfigError(
                "the decoder must run in this process to compress, refine, score or train, and it runs at "
                f"{self.elsewhere}, which answers only: do that with a local decoder "
                f"(`lloco ingest --decoder {self.facts.name}`), and the servers read what it adds to the store"
            )

    def open_decoder(self, device: str | None, dtype: str | None) -> AnsweringDecoder:
        """The decoder, ready to answer.

        Args:
            device, dtype: of its weights, where they are loaded here.

        Raises:
            ModelNotFound, UnsupportedModel: it cannot be loaded.
            DecoderUnavailable: it runs elsewhere, and cannot be reached, or is another one.
        """
        if not isinstance(self.decoder, str):
            return self.decoder
        if self._address is not None:
            assert self.stored is not None
            return self._address.opens(self._address.place, self.facts, self.stored.to_json())
        from lloco_engine.decoder.local import LocalDecoder

        loaded = LocalDecoder.load(self.decoder, device=device, dtype=dtype, template=self.facts.template)
        loaded.template_cache()  # once per process: not a cost of the first question
        return loaded

    @cached_property
    def chunk(self) -> ChunkConfig:
        """Sizes of chunks and search windows; those that nobody chose are made to fit the decoder's window."""
        if self._chunk is not None:
            return self._chunk
        default, facts = ChunkConfig(), self.facts
        longest = self.compressor.longest_chunk(facts)
        if not _LEAST <= longest < default.segment_tokens:
            return default
        fitting = replace(default, segment_tokens=longest // _STEP * _STEP)
        print(
            f"lloco: segment_tokens is {fitting.segment_tokens} in this store, not {default.segment_tokens}: that is "
            f"what the window of {facts.shape.window} of decoder {facts.name!r} has room for",
            file=sys.stderr,
        )
        return fitting

    @property
    def chunker(self) -> Chunker:
        """What cuts documents into the store's chunks."""
        from lloco_engine.chunking import Chunker

        return Chunker(self.facts.tokenizer, self.chunk, self.facts.template.text_ids)

    @property
    def text_room(self) -> int:
        """Positions of the decoder's window beside the template prefix and the longest segment."""
        return max(0, self.facts.shape.window - self.facts.template_tokens - self.chunk.segment_tokens)

    def expected(self) -> dict[str, Any]:
        """The fields of a manifest that a store must have to be used with this."""
        return makers_of(self.facts, self.compressor) | {
            "compressor": self.compressor.name,
            "ratio": self._ratio(),
            "dtype": self.store.dtype,
            "embedder_fingerprint": self.embedder.fingerprint,
            "chunk": self.chunk.to_json(),
            "summary_dim": self.facts.shape.embedding if self.kind.embeds else 0,
        }

    def _ratio(self) -> float:
        """Source tokens per slot of a whole segment."""
        asked, slots = self.compress.ratio, self.compressor.slots(self.facts)
        if slots is None:
            return float(asked)
        given = max(1.0, self.chunk.segment_tokens / slots)
        if asked not in (CompressConfig.ratio, given):
            raise ConfigError(
                f"ratio must be left out for the compressor {self.compressor.name!r}: the decoder {self.facts.name!r} "
                f"makes {slots} slots of any segment, {given:g} tokens each, not {asked:g}; choose "
                "segment_tokens instead"
            )
        return given

    def check(self, prefix: PrefixConfig) -> None:
        """Raise `ConfigError` where the decoder cannot read segments as they are to be placed."""
        self.kind.check(prefix, Room.of(self.facts, 0))

    def manifest(self) -> Manifest:
        """The manifest of a new store.

        Raises:
            ConfigError: a chunk can be longer than the compressor can take with this decoder.
        """
        facts = self.facts
        longest = self.compressor.longest_chunk(facts)
        if self.chunk.segment_tokens > longest:
            raise ConfigError(
                f"segment_tokens must be at most {longest} for the compressor {self.compressor.name!r} in the window "
                f"of {facts.shape.window} of decoder {facts.name!r}, not {self.chunk.segment_tokens}"
            )
        return Manifest(
            format_version=FORMAT_VERSION,
            decoder=facts.name,
            embedder=self.embedder.name,
            embedder_dim=self.embedder.dim,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            engine_version=__version__,
            **self.expected(),
        )


def makers_of(decoder: DecoderFacts | AnsweringDecoder, compressor: Compressor) -> dict[str, Any]:
    """The fields of a manifest that say which decoder and compressor make segments."""
    return {
        "decoder_fingerprint": decoder.fingerprint,
        "tokenizer_fingerprint": decoder.tokenizer_fingerprint,
        "template_fingerprint": "none" if kinds.get(compressor.memory).embeds else decoder.template.fingerprint,
        "layers": decoder.shape.layers,
        "kv_heads": decoder.shape.kv_heads,
        "head_dim": decoder.shape.head_dim,
        "memory": compressor.memory,
        "compressor_settings": compressor.settings,
    }


def _elsewhere(decoder: object, stored: Manifest | None) -> Address | None:
    """Where a decoder runs by its name, if that is elsewhere.

    Raises:
        ConfigError: there is no store yet.
    """
    if not isinstance(decoder, str) or ":" not in decoder:
        return None
    from lloco_engine.remote import Address

    address = Address.of(decoder)
    if address is not None and stored is None:
        raise ConfigError(
            f"a decoder that runs elsewhere answers from a store that is there, and there is none for {decoder!r}: "
            "make it with a decoder in this process first (`lloco ingest --decoder NAME`)"
        )
    return address


def _forms(template: Template, created: str) -> Iterator[Template]:
    """A template as it is today, and as releases before had it, who told it the day: local time, so one beside too."""
    yield from (template, template.in_pieces)
    if created and template.has_clock:
        for days in (0, -1, 1):
            dated = template.on(datetime.fromisoformat(created) + timedelta(days=days))
            yield from (dated, dated.in_pieces)


def stored_manifest(path: Path, *, create: bool = True) -> Manifest | None:
    """The manifest of the store in ``path``; None where there is no store.

    Raises:
        StoreNotFound: there is nothing, and ``create`` is False.
        StoreCorrupt: it cannot be read.
        StoreMismatch: a newer engine wrote it.
    """
    if not create and not path.exists():
        Store.open(path)  # says so
    file = path / "manifest.json"
    return Manifest.load(file) if file.exists() else None


def open_store(path: Path, setup: Setup, *, create: bool) -> Store:
    """Open the store in ``path``, or make it.

    Raises:
        StoreNotFound: there is none, and ``create`` is False.
        StoreMismatch: it was made with something else; names the field.
        StoreError: as `Store.open` and `Store.create`.
    """
    if setup.stored is None:
        try:
            return Store.open(path)  # says what is wrong where a store lost its manifest
        except StoreNotFound:
            if not create:
                raise
        try:
            return Store.create(path, setup.manifest(), setup.store)
        except StoreError:
            if stored_manifest(path) is None:
                raise
            # another process made it meanwhile
    else:
        setup.stored.check({"memory": setup.compressor.memory}, path)  # before what else the other kind would need
    return Store.open(path, expect=setup.expected(), config=setup.store)
