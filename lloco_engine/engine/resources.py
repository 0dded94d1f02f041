"""What an engine works with: a store, and the models that it was made with."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, cast

from lloco_engine.adapters.routing import Adapters
from lloco_engine.jobs import Bench, Here, Maker
from lloco_engine.process import ProcessLock
from lloco_engine.store import Store
from lloco_engine.store_setup import Setup

if TYPE_CHECKING:
    from lloco_engine.cluster import Cluster
    from lloco_engine.decoder.answering import AnsweringDecoder
    from lloco_engine.decoder.local import LocalDecoder

__all__ = ["Resources"]


class Resources:
    """An open store with its decoder, adapters, and what makes its segments. Weights are loaded when first needed.

    Args:
        store: open, and made with ``setup``.
        setup: which decoder, embedder and compressor, and their settings.
        device, dtype: of the decoder's weights, where they are loaded here.

    Raises:
        DecoderUnavailable: the decoder runs elsewhere, and cannot be reached, or is another one.
        AdapterError: the decoder runs elsewhere, and has not the store's adapters.
    """

    def __init__(self, store: Store, setup: Setup, device: str | None, dtype: str | None) -> None:
        self.store, self.setup = store, setup
        self.adapters = Adapters(store, lambda: self.decoder)
        self.lock = ProcessLock(f"the engine of {store.path}")
        self._device, self._dtype = device, dtype
        self._decoder: AnsweringDecoder | None = None
        self._compressing = threading.Lock()
        if setup.elsewhere:
            try:
                self.adapters.load_all()  # whether the decoder answers, and has them, is found out now
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Let go of the store and of the decoder: its weights, or what leads to it."""
        self.store.close()
        if self.lock.here:
            with self.lock:
                if self._decoder is not None and isinstance(self.setup.decoder, str):
                    self._decoder.close()
                self._decoder = None

    @property
    def decoder(self) -> AnsweringDecoder:
        """The decoder, opened on first use."""
        with self.lock:
            if self._decoder is None:
                self._decoder = self.setup.open_decoder(self._device, self._dtype)
            return self._decoder

    @property
    def local_decoder(self) -> LocalDecoder:
        """The decoder with its weights in this process.

        Raises:
            ConfigError: it runs elsewhere.
        """
        self.setup.require_weights()
        return cast("LocalDecoder", self.decoder)

    def maker(self, cluster: Cluster | str | None) -> Maker:
        """What makes segments: this process, or the workers of a cluster.

        Raises:
            ConfigError: the decoder runs elsewhere, or there is no such cluster.
        """
        self.setup.require_weights()
        setup, form = self.setup, self.store.manifest.form
        if cluster is not None:
            from lloco_engine.cluster import maker_on

            return maker_on(cluster, self.store, setup, self._device, self._dtype)
        return Here(
            self.store,
            lambda: Bench(self.local_decoder, setup.compressor, setup.compress.ratio, form),
            self._compressing,
        )
