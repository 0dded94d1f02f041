"""A server that runs: it listens, says where, and stops without cutting answers off."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import uvicorn

from lloco_engine.engine import Engine
from lloco_engine.errors import ConfigError, LLoCOError
from lloco_engine.serve import logs
from lloco_engine.serve.app import create_app
from lloco_engine.serve.gate import is_loopback
from lloco_engine.serve.keys import KeyFile
from lloco_engine.serve.limits import Limits

__all__ = ["ServerThatSays", "check_address", "listening", "run", "serving", "take_turns", "uvicorn_config"]

_GRACE_S = 60  # for answers that are being made when the server is told to stop


def check_address(host: str, keys: Path | None) -> KeyFile | None:
    """The keys, if there are any; without, only an address that no other machine reaches is listened on.

    Raises:
        ConfigError: the address can be reached by others and there are no keys, or the file has none.
    """
    if keys is None:
        if not is_loopback(host):
            raise ConfigError(
                f"without keys a server listens on 127.0.0.1 alone, for whoever reaches it may read and change the "
                f"store, not on {host!r}; make a key by `lloco keys add --keys keys.json --tenant NAME` and give it "
                f"--keys keys.json"
            )
        return None
    file = KeyFile(keys)
    if not file.load():
        raise ConfigError(
            f"{keys} must hold a key, and holds none; `lloco keys add --keys {keys} --tenant NAME` adds one"
        )
    return file


def uvicorn_config(app: object, host: str, port: int) -> uvicorn.Config:
    """How an application is served: no access log (the gate writes one), and time to finish answers."""
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE_S,
        timeout_keep_alive=15,
        lifespan="on",
    )


def run(
    engine: Engine,
    *,
    host: str,
    port: int,
    keys: KeyFile | None,
    tenant: str = "",
    limits: Limits | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Serve an engine until the process is told to stop.

    Args:
        engine: open.
        host, port: where to listen; port 0 takes one that is free.
        keys: from `check_address`.
        tenant: whose documents are served without keys.
        limits: of requests.
        say: told what is being done, for a person.
    """
    logs.install()
    take_turns()
    began = time.perf_counter()
    say("loading the decoder and the search embedder ...")
    _ = engine.embedder.dim
    engine.decoder.warm()
    say(f"loaded in {time.perf_counter() - began:.1f} s")
    app = create_app(engine, keys=keys, tenant=tenant, limits=limits)
    ServerThatSays(uvicorn_config(app, host, port), say, "{address} (the page), {address}/v1 (the API)").run()


def take_turns() -> None:
    """Have the process's threads take turns more often than Python does by itself, every 5 ms: the thread that sends
    pieces waits for those that make them."""
    sys.setswitchinterval(0.0005)


@contextmanager
def listening(app: object) -> Iterator[str]:
    """The address of an application that is served in a thread while the block runs, on this machine alone."""
    server = uvicorn.Server(uvicorn_config(app, "127.0.0.1", 0))
    thread = threading.Thread(target=server.run, name="lloco-serve", daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise LLoCOError("the server could not start; its log says why")
            time.sleep(0.005)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def serving(engine: Engine, *, tenant: str = "", limits: Limits | None = None) -> AbstractContextManager[str]:
    """A server beside a program's own work, ``with serving(engine) as address``; arguments are as for `create_app`."""
    return listening(create_app(engine, tenant=tenant, limits=limits))


class ServerThatSays(uvicorn.Server):
    """Says where it listens, once it does, and when all is over: uvicorn raises the signal anew that stopped it.

    Args:
        config: of uvicorn.
        say: told so.
        what: is there; ``{address}`` stands for the address.
    """

    def __init__(self, config: uvicorn.Config, say: Callable[[str], None], what: str) -> None:
        super().__init__(config)
        self._say, self._what = say, what

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            self._say(f"listening on {self._what.format(address=f'http://{shown}:{port}')}; Ctrl-C stops")

    async def shutdown(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        await super().shutdown(sockets)  # type: ignore[arg-type]
        self._say("stopped")
