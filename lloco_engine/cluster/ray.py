"""Workers that are actors of a Ray cluster: this machine's own, or one at an address (https://docs.ray.io)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import floor
from typing import TYPE_CHECKING, Any

from lloco_engine.cluster.pool import Crew, Pool, WorkerDied
from lloco_engine.cluster.worker import Recipe, Worker
from lloco_engine.errors import ConfigError
from lloco_engine.jobs import Job, Maker

if TYPE_CHECKING:
    from lloco_engine.store import Store

__all__ = ["RayCluster"]

# No statistics are sent, and workers that this process starts run with its own priority: they are what it waits for.
_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # what Ray asks before it listens on any but the loopback interface
_LOCAL = "local"
_OBJECTS = 256 * 2**20  # bytes for what is on its way, of a cluster that is this machine's own


@dataclass(frozen=True)
class RayCluster:
    """A Ray cluster whose workers make segments: ``Engine.ingest(..., cluster=RayCluster())``.

    Args:
        address: ``"local"`` starts workers on this machine, which nothing outside it can reach; else as ``ray.init``
            takes it: ``"auto"`` for the cluster that this machine is a part of, ``"HOST:PORT"``. Where the process is
            connected to a cluster already, that one is used and left as it is.
        workers: how many; None: as many as the cluster has room for when the run begins.
        cpus: cores of each worker.
        gpus: GPUs of each, also a part of one; None: one each where the cluster has any, else none.
        options: more options of the actors, as ``ray.remote`` takes them (``runtime_env``, ``resources``,
            ``scheduling_strategy``).

    Raises:
        ConfigError: a number is outside its rule.
    """

    address: str = _LOCAL
    workers: int | None = None
    cpus: float = 1
    gpus: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.address, str) or not self.address:
            raise ConfigError(f"address of a Ray cluster must be 'local', 'auto' or HOST:PORT, not {self.address!r}")
        if self.workers is not None and (not isinstance(self.workers, int) or self.workers < 1):
            raise ConfigError(f"workers must be a whole number, at least 1, not {self.workers!r}")
        if self.cpus <= 0:
            raise ConfigError(f"cpus of a worker must be above 0, not {self.cpus!r}")
        if self.gpus is not None and self.gpus < 0:
            raise ConfigError(f"gpus of a worker must not be negative, not {self.gpus!r}")

    def maker(self, store: Store, recipe: Recipe) -> Maker:
        """What makes a store's segments here; workers are started when there is something to do.

        Raises:
            ConfigError: Ray is not installed, the cluster cannot be reached, or has no room for one worker.
        """
        return Pool(store, _RayCrew(self, recipe))


class _RayCrew(Crew):
    """See `Crew`: a worker is an actor, a ticket an object reference."""

    def __init__(self, cluster: RayCluster, recipe: Recipe) -> None:
        self._ray = _import_ray()
        self._ours = not self._ray.is_initialized()
        if self._ours:
            _connect(self._ray, cluster.address)
        self._actors: list[Any] = []
        self._asks: dict[str, float] = {}
        try:
            self.size = self._plan(cluster)
        except BaseException:
            self.close()
            raise
        self._options = {
            "num_cpus": self._asks["CPU"],
            "num_gpus": self._asks.get("GPU", 0),
            "max_restarts": 0,  # the pool replaces a worker, and knows which job it died of
            **cluster.options,
        }
        self._recipe = recipe

    def _plan(self, cluster: RayCluster) -> int:
        """How many workers there will be."""
        has = self._ray.cluster_resources()
        gpus = cluster.gpus if cluster.gpus is not None else float(has.get("GPU", 0) >= 1)
        self._asks = {"CPU": cluster.cpus} | ({"GPU": gpus} if gpus else {})
        if cluster.workers is not None:
            return cluster.workers
        room: int = min(floor(has.get(name, 0) / asked) for name, asked in self._asks.items())
        if room < 1:
            raise ConfigError(
                f"a worker must fit the cluster, and {self._lacks(has)}: ask for less, or say how many workers there "
                "will be where the cluster grows on demand"
            )
        return room

    def _lacks(self, has: Mapping[str, float]) -> str:
        asks = ", ".join(f"{asked:g} {name}" for name, asked in self._asks.items())
        there = ", ".join(f"{has.get(name, 0):g} {name}" for name in self._asks)
        return f"each asks for {asks}, while it has {there}"

    def lacks(self) -> str:
        """See `Crew.lacks`."""
        return f"{self._lacks(self._ray.available_resources())} free"

    def hire(self) -> Any:
        """See `Crew.hire`."""
        actor = self._ray.remote(**self._options)(Worker).remote(self._recipe)
        self._actors.append(actor)
        return actor

    def dismiss(self, worker: Any) -> None:
        """See `Crew.dismiss`."""
        self._actors.remove(worker)
        self._ray.kill(worker)

    def ready(self, worker: Any) -> Any:
        """See `Crew.ready`."""
        return worker.ready.remote()

    def send(self, worker: Any, job: Job, needed: Mapping[str, bytes]) -> Any:
        """See `Crew.send`."""
        return worker.make.remote(job, needed)

    def wait(self, tickets: Sequence[Any], timeout: float) -> list[Any]:
        """See `Crew.wait`."""
        if not tickets:
            return []
        done, others = self._ray.wait(list(tickets), num_returns=1, timeout=timeout)
        if done and others:
            done += self._ray.wait(others, num_returns=len(others), timeout=0)[0]
        return list(done)

    def answer(self, ticket: Any) -> Any:
        """See `Crew.answer`."""
        dead = self._ray.exceptions
        try:
            return self._ray.get(ticket)
        except (dead.RayActorError, dead.WorkerCrashedError, dead.OutOfMemoryError, dead.NodeDiedError) as error:
            raise WorkerDied(" ".join(str(error).split())[:300]) from error

    def close(self) -> None:
        """See `Crew.close`; a cluster that this process was connected to before stays so."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors.clear()
        if self._ours:
            self._ray.shutdown()


def _import_ray() -> Any:
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ConfigError(f"a Ray cluster needs Ray ({error}): pip install 'lloco[ray]'") from error
    return ray


def _connect(ray: Any, address: str) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    try:
        if address == _LOCAL:
            with _loopback(ray):
                ray.init(address, include_dashboard=False, object_store_memory=_OBJECTS, **options)
        else:
            ray.init(address, **options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"no Ray cluster can be used at {address!r}: {error}") from error


@contextmanager
def _loopback(ray: Any) -> Iterator[None]:
    """Let what is started meanwhile listen on 127.0.0.1 alone, as Ray does by itself on macOS."""
    constants = ray._private.ray_constants
    before = constants.ENABLE_RAY_CLUSTER
    constants.ENABLE_RAY_CLUSTER, os.environ[_LOOPBACK] = False, "0"
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before
        del os.environ[_LOOPBACK]
