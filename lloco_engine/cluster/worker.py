"""A worker of a cluster: a process that makes segments of what it is sent, and sends their files back.

It never opens a store. What it needs of one, it is told: a `Recipe`, and with each job the files of the segments that
the new one is made of. Before its first job it checks that what it loaded is what the store was made with.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lloco_engine import __version__, errors
from lloco_engine.errors import ConfigError, LLoCOError
from lloco_engine.jobs import Bench, Job
from lloco_engine.plugins import PLUGINS
from lloco_engine.store import Manifest
from lloco_engine.store.segments import read

if TYPE_CHECKING:
    from lloco_engine.decoder.template import Template

__all__ = ["Outcome", "Recipe", "Refused", "Worker"]


@dataclass(frozen=True)
class Recipe:
    """What a worker makes segments with.

    Args:
        manifest: the store's, as JSON.
        store: where the store is, for messages.
        decoder: name of the decoder, which is found on the worker's machine by it.
        template: the prompt's fixed text, without its tokenizer.
        device, dtype: of the decoder; None: what suits the worker's machine.
        plugins: the user's Python files that register compressors (`lloco_engine.plugins`).
        version: of the engine.
    """

    manifest: dict[str, Any]
    store: str
    decoder: str
    template: Template
    device: str | None
    dtype: str | None
    plugins: str = ""
    version: str = __version__


@dataclass(frozen=True)
class Outcome:
    """A job that is done: the segment's file, None where there is none to be made, and the seconds it took."""

    data: bytes | None
    seconds: float


@dataclass(frozen=True)
class Refused:
    """An error of the engine's own on a worker: its class's name, and what it says."""

    error: str
    reason: str

    def raised(self) -> LLoCOError:
        """The error, to be raised where the job was asked for."""
        made: LLoCOError = getattr(errors, self.error)(self.reason)
        return made


class Worker:
    """Makes segments, one at a time.

    Args:
        recipe: what with.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._bench: Bench | None = None

    def ready(self) -> Refused | None:
        """Load the decoder and compare all with what the store was made with; what is wrong, if anything is."""
        try:
            self._bench = self._loaded()
        except LLoCOError as error:
            where = f"worker {os.getpid()} on {socket.gethostname()}"
            return Refused(_class_of(error), f"{where}: {error}")
        return None

    def make(self, job: Job, needed: Mapping[str, bytes]) -> Outcome | Refused:
        """Do a job.

        Args:
            job: what is to be made.
            needed: the files of the segments that it needs, by id.
        """
        assert self._bench is not None
        try:
            segments = [read(needed[one], one, self._bench.form) for one in job.needs]
            packed = self._bench.make(job, segments)
        except LLoCOError as error:
            return Refused(_class_of(error), str(error))
        return Outcome(None if packed.file is None else packed.file.data, packed.seconds)

    def _loaded(self) -> Bench:
        from lloco_engine.compress import registry
        from lloco_engine.decoder.local import LocalDecoder
        from lloco_engine.store_setup import makers_of

        recipe = self._recipe
        if recipe.version != __version__:
            raise ConfigError(
                f"version of lloco must be that of the process that sends jobs, {recipe.version}, not "
                f"{__version__}: install the same one everywhere"
            )
        if recipe.plugins:
            os.environ[PLUGINS] = recipe.plugins
        manifest = Manifest.from_json(recipe.manifest)
        compressor = registry.get(manifest.compressor, **manifest.compressor_settings)
        decoder = LocalDecoder.load(recipe.decoder, device=recipe.device, dtype=recipe.dtype, template=recipe.template)
        manifest.check(makers_of(decoder, compressor), Path(recipe.store))
        decoder.template_cache()
        return Bench(decoder, compressor, manifest.ratio, manifest.form)


def without_tokenizer(template: Template) -> Template:
    """A template that can be sent; the worker gives it its own tokenizer."""
    return replace(template, tokenizer=None)


def _class_of(error: LLoCOError) -> str:
    """The name of the nearest class of an error that `lloco_engine.errors` has."""
    return next(one.__name__ for one in type(error).__mro__ if one.__name__ in errors.__all__)
