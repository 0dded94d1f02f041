"""``lloco serve``, ``lloco mcp`` and ``lloco keys``: a store behind an address, and who may ask it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from lloco_engine.cli import stores
from lloco_engine.cli.options import (
    AsJSON,
    Models,
    StoreDir,
    Tenant,
    parse_settings,
)
from lloco_engine.cli.output import print_json, print_table, safe
from lloco_engine.errors import ConfigError
from lloco_engine.flags import with_options

__all__ = ["register"]

Keys = Annotated[
    Path | None,
    typer.Option(
        "--keys", envvar="LLOCO_KEYS", metavar="FILE", help="Keys of `lloco keys add`; without: this machine only."
    ),
]
KeysFile = Annotated[Path, typer.Option("--keys", envvar="LLOCO_KEYS", metavar="FILE", help="File of keys.")]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command()(with_options(serve))
    app.command("mcp")(with_options(tools))
    keys = typer.Typer(no_args_is_help=True, help="Keys: who may ask a server, for which tenant.")
    keys.command("add")(add)
    keys.command("list")(show)
    keys.command("remove")(remove)
    app.add_typer(keys, name="keys")


def serve(
    *,
    store: StoreDir = Path("lloco-store"),
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: one that is free.")] = 8000,
    keys: Keys = None,
    tenant: Tenant = "",
    limit: Annotated[
        list[str] | None,
        typer.Option(
            "--limit",
            metavar="NAME=NUMBER",
            help="concurrent, queue, requests, question_chars, body_bytes, upload_bytes, body_s or send_s; repeatable.",
        ),
    ] = None,
    models: Models,
) -> None:
    """Serve a store: the OpenAI API, and a page to look at.

    Open WebUI, the openai client, ChatOpenAI and OpenAILike take the address
    that it prints, with /v1. A store that is not there is made, empty. Without
    --keys it listens on this machine alone. Ctrl-C lets answers finish; what
    was being compressed goes on at the next start. Needs the extra 'serve'.

    \b
    Examples:
      lloco serve --store lloco-store
      lloco serve --port 9000 --tenant acme --limit concurrent=4 --limit queue=100
      lloco keys add --keys keys.json --tenant acme
      lloco serve --host 0.0.0.0 --keys keys.json
    """
    _need("fastapi", "serve")
    from lloco_engine.serve.limits import Limits
    from lloco_engine.serve.running import check_address, run

    if keys is not None and tenant:
        raise typer.BadParameter("--tenant is whose documents are served without keys; with --keys each has its own")
    allowed = _limits(limit or (), Limits)
    known = check_address(host, keys)
    if not store.exists():
        typer.echo(f"there is no store at {store}: an empty one is made", err=True)
    typer.echo(f"opening the store at {store}", err=True)
    with stores.open_engine(store, create=True, **models) as engine:
        run(
            engine,
            host=host,
            port=port,
            keys=known,
            tenant=tenant,
            limits=allowed,
            say=lambda text: typer.echo(text, err=True),
        )


def tools(
    *,
    store: StoreDir = Path("lloco-store"),
    http: Annotated[bool, typer.Option("--http", help="Listen at an address instead of standard input.")] = False,
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="With --http: where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="With --http; 0: one that is free.")] = 8001,
    keys: Keys = None,
    write: Annotated[bool, typer.Option("--write", help="Tools that add and delete documents, too.")] = False,
    tenant: Tenant = "",
    models: Models,
) -> None:
    """Give a store to agents as tools, by the Model Context Protocol.

    Tools: search, ask and list_documents, which only read; with --write also
    add_document and delete_document. An agent starts the command itself and
    talks to it over standard input and output; with --http it listens at
    /mcp (streamable HTTP). Needs the extra 'serve'.

    \b
    Examples:
      lloco mcp --store lloco-store
      lloco mcp --store lloco-store --tenant acme --write
      lloco mcp --http --port 8001
      lloco mcp --http --host 0.0.0.0 --keys keys.json
    """
    _need("mcp", "serve")
    from lloco_engine.serve.running import check_address
    from lloco_engine.serve.tools import run_http, run_stdio

    if keys is not None and (tenant or not http):
        raise typer.BadParameter("--keys is for --http, and each key has its own tenant; leave --tenant out, or --keys")
    known = check_address(host, keys) if http else None
    with stores.open_engine(store, **models) as engine:
        shared: dict[str, Any] = {"tenant": tenant, "write": write, "say": lambda text: typer.echo(text, err=True)}
        if http:
            run_http(engine, host=host, port=port, keys=known, **shared)
        else:
            run_stdio(engine, **shared)


def add(
    tenant: Annotated[str, typer.Option("--tenant", metavar="NAME", help="Whose documents it opens.")] = "",
    keys: KeysFile = Path("keys.json"),
    read_only: Annotated[bool, typer.Option("--read-only", help="It changes nothing.")] = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="It opens /metrics and nothing else.")] = False,
) -> None:
    """Make a key, and print it, once: the file keeps its hash.

    A server that runs takes it up at once.

    \b
    Examples:
      lloco keys add --tenant acme
      lloco keys add --tenant acme --read-only --keys /etc/lloco/keys.json
      lloco keys add --metrics
    """
    from lloco_engine.serve.keys import KeyFile

    if read_only and metrics:
        raise typer.BadParameter("--metrics opens figures alone, which only are read; leave --read-only out")
    scope = "metrics" if metrics else "read" if read_only else "write"
    given, made = KeyFile(keys).add(tenant, scope)  # type: ignore[arg-type]
    typer.echo(given)
    typer.echo(f"key {made.id} ({scope}) for tenant {safe(repr(tenant))} is in {keys}; it is not shown again", err=True)


def show(keys: KeysFile = Path("keys.json"), as_json: AsJSON = False) -> None:
    """List keys: their ids, tenants and what they may do, not the keys themselves."""
    from lloco_engine.serve.keys import KeyFile

    rows = [(key.id, key.tenant, key.scope, key.created) for key in KeyFile(keys).load()]
    names = ("id", "tenant", "scope", "created")
    if as_json:
        print_json([dict(zip(names, row, strict=True)) for row in rows])
        return
    print_table(names, rows)


def remove(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Of `lloco keys list`.")],
    keys: KeysFile = Path("keys.json"),
) -> None:
    """Take a key out; a server that runs lets it in no more."""
    from lloco_engine.serve.keys import KeyFile

    gone = KeyFile(keys).remove(key_id)
    typer.echo(f"key {gone.id} of tenant {safe(repr(gone.tenant))} was removed", err=True)


def _limits(pairs: Sequence[str], kind: Any) -> Any:
    try:
        return kind.from_json(parse_settings(pairs))
    except (ConfigError, TypeError) as error:
        names = ", ".join(one.name for one in fields(kind))
        raise typer.BadParameter(f"{error} (limits: {names})") from error


def _need(module: str, extra: str) -> None:
    """Refuse in one line where an extra is not installed."""
    if find_spec(module) is None:
        raise ConfigError(
            f"this command needs the extra {extra!r}, which is not installed: pip install 'lloco[{extra}]'"
        )
