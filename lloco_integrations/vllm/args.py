"""``lloco vllm-args``: the command that starts a vLLM server for a store, as text for a shell."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lloco_engine import AdapterError, ConfigError, Engine
from lloco_integrations.vllm import CUDA
from lloco_integrations.vllm.client import served_name
from lloco_integrations.vllm.params import KEY_FILE
from lloco_integrations.vllm.prompt_embeds import TARGETS, check_targets

__all__ = ["app", "arguments"]

MODULE = "vllm.entrypoints.openai.api_server"
REFUSALS = "lloco_integrations.vllm.refusals.Refusals"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of LoRA, that vLLM knows
_LONGEST = 4096  # tokens of a prompt and its answer
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
_ON_CPU = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

app = typer.Typer(add_completion=False)


def arguments(
    engine: Engine,
    *,
    store: str = "",
    cache: Path | None = None,
    device: Literal["cpu", "cuda"] = "cuda",
    host: str = "127.0.0.1",
    port: int = 8000,
    pool_mib: int | None = None,
    key_file: Path | None = None,
    max_model_len: int | None = None,
) -> tuple[dict[str, str], list[str]]:
    """The environment of a server, and its arguments.

    Args:
        engine: open on the store, with its decoder by name; neither is loaded.
        store: where the server finds the store, a folder or a URL that fsspec knows; "" is where the engine has it.
        cache: the server's folder for what it reads from a URL.
        device: that it runs on.
        host, port: where it listens.
        pool_mib: memory for segments; None leaves it to the server.
        key_file: of the key that requests are signed with; None leaves it to the server's environment.
        max_model_len: tokens of a prompt and its answer, segments aside; None is 4096, or less where the decoder's
            window is smaller.

    Raises:
        AdapterError: vLLM cannot have one of the store's adapters; says why.
        ConfigError: a URL comes without a cache.
    """
    manifest, model = engine.manifest, engine.decoder_folder
    embeds = manifest.memory == "summary"
    longest = max_model_len or min(_LONGEST, engine.window)
    given: list[str] = ["--model", str(model), "--served-model-name", served_name(manifest.decoder_fingerprint)]
    given += ["--host", host, "--port", str(port), "--max-model-len", str(longest), "--generation-config", "vllm"]
    if device == "cpu":
        given += ["--dtype", "float32", "--enforce-eager"]
    if embeds:
        given += ["--enable-prompt-embeds"]
    else:
        given += ["--kv-transfer-config", json.dumps(_connector(engine, store, cache, pool_mib, key_file))]
        given += ["--middleware", REFUSALS]
        if device == "cuda":
            given += ["--attention-backend", "FLASH_ATTN"]
    given += _adapters(engine, embeds=embeds)
    return _ENVIRONMENT | (_ON_CPU if device == "cpu" else {} if embeds else {CUDA: "1"}), given


def _connector(
    engine: Engine, store: str, cache: Path | None, pool_mib: int | None, key_file: Path | None
) -> dict[str, Any]:
    if "://" in store and cache is None:
        raise ConfigError(f"a server reads {store} by way of a folder of its own: name one with --cache")
    extra: dict[str, Any] = {"store": store or str(engine.store.path.resolve())}
    extra |= {} if cache is None else {"cache": str(cache)}
    extra |= {} if pool_mib is None else {"pool_mib": pool_mib}
    extra |= {} if key_file is None else {"key_file": str(key_file)}
    return {
        "kv_connector": "LlocoConnector",
        "kv_connector_module_path": "lloco_integrations.vllm.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }


def _adapters(engine: Engine, *, embeds: bool) -> list[str]:
    folders = engine.adapters.folders()
    if not folders:
        return []
    ranks = []
    for name, folder in folders.items():
        if embeds:
            check_targets(folder, name)
        ranks.append(_rank(name, folder))
    given = ["--enable-lora", "--max-loras", str(len(folders) + 1)]  # one more, or the base answers with the last one
    given += ["--max-lora-rank", str(next(rank for rank in _RANKS if rank >= max(ranks)))]
    if embeds:
        given += ["--lora-target-modules", *TARGETS]
    return [*given, "--lora-modules", *(f"{name}={folder}" for name, folder in folders.items())]


def _rank(name: str, folder: Path) -> int:
    """The rank of an adapter that vLLM can have.

    Raises:
        AdapterError: it cannot.
    """
    try:
        config: Mapping[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        rank = max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"the adapter {name!r} must have a readable adapter_config.json: {error}") from error
    odd = [key for key in ("use_dora", "modules_to_save", "alpha_pattern", "layers_to_transform") if config.get(key)]
    if config.get("peft_type") != "LORA" or odd or config.get("bias", "none") != "none" or rank > _RANKS[-1]:
        what = ", ".join(odd) or f"{config.get('peft_type')} of rank {rank}, bias {config.get('bias')}"
        raise AdapterError(
            f"an adapter on vLLM must be plain LoRA of rank {_RANKS[-1]} at most, and {name!r} is not ({what}): "
            "remove it (`lloco adapters rm`), or answer in this process"
        )
    return rank


@app.command("vllm-args")
def vllm_args(
    store: Annotated[
        Path, typer.Option("--store", envvar="LLOCO_STORE", metavar="DIR", help="Folder of the store.")
    ] = Path("lloco-store"),
    decoder: Annotated[
        str | None,
        typer.Option("--decoder", metavar="NAME", help="Default: the store's own, as it is on this machine."),
    ] = None,
    at: Annotated[
        str, typer.Option("--at", metavar="DIR|URL", help="Where the server finds the store, if that is elsewhere.")
    ] = "",
    cache: Annotated[
        Path | None, typer.Option("--cache", metavar="DIR", help="The server's folder for segments from a URL.")
    ] = None,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="cuda or cpu.")] = "cuda",
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Where it listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8000,
    pool_mib: Annotated[
        int | None, typer.Option("--pool-mib", min=1, metavar="MIB", help="Memory for segments.")
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(
            "--key-file", envvar=KEY_FILE, metavar="FILE", help="The key that requests are signed with, on the server."
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            "--max-model-len",
            min=16,
            metavar="N",
            help="Tokens of prompt and answer, segments aside. Default: 4096, or the decoder's window.",
        ),
    ] = None,
) -> None:
    """Print the command that starts a vLLM server for a store.

    It is quoted for a shell. The server needs vLLM, the extra 'vllm' and the
    store's segments; questions go to it with --decoder vllm:http://HOST:PORT.

    \b
    Examples:
      lloco vllm-args --store lloco-store --key-file /etc/lloco/vllm.key
      lloco vllm-args --store lloco-store --device cpu --port 8100 | sh
      lloco vllm-args --at s3://bucket/store --cache /var/cache/lloco
    """
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device must be cuda or cpu, not {device!r}")
    with Engine.open(store, decoder=decoder, create=False) as engine:
        environment, given = arguments(
            engine,
            store=at,
            cache=cache,
            device=device,  # type: ignore[arg-type]
            host=host,
            port=port,
            pool_mib=pool_mib,
            key_file=key_file,
            max_model_len=max_model_len,
        )
    settings = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    typer.echo(" ".join([*settings, "python", "-m", MODULE, *map(shlex.quote, given)]))
