"""What the tests of the vLLM plug-in share: stores, servers that read them, and what they are asked.

Servers run in an environment of their own, whose Python ``LLOCO_VLLM_PYTHON`` names (`make vllm-test` makes one).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import integration_cases as cases

from lloco_engine import Segment, SegmentReader
from lloco_engine.testing import save_tiny_decoder
from lloco_integrations.vllm.params import Memory, sign, store_fingerprint

PYTHON = os.environ.get("LLOCO_VLLM_PYTHON", sys.executable)
KEY = b"a key for tests, which is long enough"
ENVIRONMENT = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def made_store(folder: Path) -> tuple[Path, list[str]]:
    """A store at ``folder`` / store of the decoder at ``folder`` / tiny, and the ids of its segments."""
    decoder = save_tiny_decoder(folder / "tiny", max_position_embeddings=4096)
    with cases.open_engine(folder / "store", str(decoder)) as engine:
        assert not engine.ingest(cases.documents(topics=cases.TOPICS[:2])).failed
    return folder / "store", ids_in(folder / "store")


def ids_in(store: Path) -> list[str]:
    """Ids of a store's segments, in order."""
    return sorted(path.stem for path in store.glob("segments/*/*.safetensors"))


def has_vllm() -> bool:
    """Whether the servers' Python has vLLM."""
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('vllm.version') is None)"
    try:
        return subprocess.run([PYTHON, "-I", "-c", code], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@dataclass
class Server:
    """A running server."""

    url: str
    store: Path
    process: subprocess.Popen[bytes]
    log: Path
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=300))

    def memory(self, segments: Sequence[str], template: int, **more: Any) -> dict[str, Any]:
        """The signed ``kv_transfer_params`` of a request."""
        store = store_fingerprint(SegmentReader(self.store).manifest)
        made = Memory(store, tuple(segments), template, **{"expires": int(time.time()) + 600} | more)
        return sign(made, [KEY])

    def post(self, ids: Sequence[int], memory: dict[str, Any] | None = None, **more: Any) -> httpx.Response:
        """One completion, greedy."""
        body = {"model": "base", "prompt": list(ids), "max_tokens": 12, "temperature": 0, "return_token_ids": True}
        if memory is not None:
            body["kv_transfer_params"] = memory
        text = json.dumps(body | more)  # even what is no JSON: NaN, lone surrogates
        headers = {"Content-Type": "application/json"}
        return self.client.post(f"{self.url}/v1/completions", content=text, headers=headers)

    def tokens(self, ids: Sequence[int], memory: dict[str, Any] | None = None, **more: Any) -> list[int]:
        """Token ids of a completion."""
        answer = self.post(ids, memory, **more)
        assert answer.status_code == 200, answer.text
        made: list[int] = answer.json()["choices"][0]["token_ids"]
        return made

    def logits(self, ids: Sequence[int], memory: dict[str, Any] | None, most: int, **more: Any) -> dict[int, float]:
        """The largest logits of the first token."""
        return self.told(ids, memory, most, **{"max_tokens": 1} | more)[1][0]

    def told(
        self, ids: Sequence[int], memory: dict[str, Any] | None, most: int, **more: Any
    ) -> tuple[list[int], list[dict[int, float]]]:
        """Token ids of a completion, and the largest logits of each of them."""
        answer = self.post(ids, memory, **{"logprobs": most, "return_tokens_as_token_ids": True} | more)
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        tops = choice["logprobs"]["top_logprobs"]
        return choice["token_ids"], [{int(name.removeprefix("token_id:")): top[name] for name in top} for top in tops]

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        lines = self.client.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.rsplit(None, 1)[-1]) for line in lines if re.match(rf"{name}[ {{]", line))

    def kill(self) -> None:
        """Kill -9, all of its processes."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def served(
    model: Path,
    store: Path,
    folder: Path,
    *arguments: str,
    adapters: dict[str, Path] | None = None,
    plugin: bool = True,
    pool_mib: float = 256,
    **environment: str,
) -> Iterator[Server]:
    """A server of a decoder that reads a store, until the block ends; its log is in ``folder``."""
    port = _free_port()
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "base"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-logprobs", "-1", "--logprobs-mode", "raw_logits", *arguments]
    if adapters:
        pairs = [f"{name}={place}" for name, place in adapters.items()]
        command += ["--enable-lora", "--max-lora-rank", "32", "--max-loras", str(len(pairs) + 1)]
        command += ["--lora-modules", *pairs]
    if plugin:
        told = {"store": str(store), "pool_mib": pool_mib}
        connector = {
            "kv_connector": "LlocoConnector",
            "kv_connector_module_path": "lloco_integrations.vllm.connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": told,
        }
        command += ["--kv-transfer-config", json.dumps(connector)]
    else:
        environment["VLLM_PLUGINS"] = ""
    given = os.environ | ENVIRONMENT | {"LLOCO_VLLM_KEY": KEY.decode()} | environment
    with _running(command, port, store, folder, given) as server:
        yield server


@contextmanager
def served_as_printed(store: Path, key_file: Path, folder: Path, port: int = 0) -> Iterator[Server]:
    """A server that a shell starts by what `lloco vllm-args` prints, until the block ends; its log is in ``folder``."""
    port = port or _free_port()
    more = ["--device", "cpu", "--port", port, "--key-file", key_file, "--pool-mib", 256, "--max-model-len", 2048]
    lloco = [sys.executable, "-m", "lloco_engine", "vllm-args", "--store", store, *more]
    printed = subprocess.run([str(word) for word in lloco], capture_output=True, text=True, check=True).stdout
    command = printed.replace(" python -m ", f" {shlex.quote(PYTHON)} -m ", 1).replace("SPACE=4", "SPACE=1")
    with _running(["sh", "-c", f"exec env {command}"], port, store, folder, os.environ) as server:
        yield server


@contextmanager
def _running(
    command: Sequence[str], port: int, store: Path, folder: Path, environment: Mapping[str, str]
) -> Iterator[Server]:
    log = folder / f"vllm-{port}.log"
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    server = Server(f"http://127.0.0.1:{port}", store, process, log)
    try:
        _await(server)
        yield server
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
        server.client.close()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _await(server: Server) -> None:
    for _ in range(1800):
        if server.process.poll() is not None:
            break
        try:
            if server.client.get(f"{server.url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"the server does not answer:\n{server.log.read_text(errors='replace')[-6000:]}")


def segments_of(store: Path, ids: Sequence[str]) -> list[Segment]:
    """Segments of a store."""
    reader = SegmentReader(store)
    return [reader.read(one) for one in ids]
