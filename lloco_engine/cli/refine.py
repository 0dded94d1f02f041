"""``lloco refine``: better segments for the time there is."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lloco_engine.cli import stores
from lloco_engine.cli.options import (
    AsJSON,
    Cluster,
    Decoder,
    Device,
    RayCommand,
    StoreDir,
    Tenant,
)
from lloco_engine.cli.output import print_json, safe
from lloco_engine.config import RefineConfig
from lloco_engine.flags import with_options

if TYPE_CHECKING:
    from lloco_engine.refining import RefineProgress

__all__ = ["parse_seconds", "register", "steps_of"]

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command(cls=RayCommand)(with_options(refine))


def refine(
    *,
    store: StoreDir = Path("lloco-store"),
    documents: Annotated[
        list[str] | None,
        typer.Option("--documents", metavar="ID", help="Only this document; repeatable, in this order."),
    ] = None,
    tenant: Tenant = "",
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Stop after this long: 90, 90s, 10m or 2h.", show_default=False)
    ] = None,
    steps: Annotated[
        str, typer.Option(metavar="N", help=f"Steps for each segment; auto: {RefineConfig.steps}.")
    ] = "auto",
    stretch: Annotated[
        int, typer.Option(metavar="TOKENS", min=0, help="Tokens of the chunk that a step reads; 0: all of it.")
    ] = RefineConfig.stretch,
    decoder: Decoder = None,
    device: Device = None,
    cluster: Cluster,
    as_json: AsJSON = False,
) -> None:
    """Bring the store's segments nearer to their text.

    A few steps for each segment, without labels, towards what the decoder
    makes of the whole chunk. What is no better on a held-out part stays as
    it was. Documents go in order; a run that was cut off, or whose time was
    up, goes on where it stopped. `lloco show` tells each segment's divergence
    before and after. Others may ask and ingest meanwhile.

    \b
    Examples:
      lloco refine --budget 30m
      lloco refine --store work --documents report.pdf --steps 32
      lloco refine --ray
    """
    config = RefineConfig(steps=steps_of(steps), stretch=stretch)
    seconds = None if budget is None else parse_seconds(budget)
    with stores.open_engine(store, decoder=decoder, device=device) as engine:
        report = engine.refine(
            documents or None,
            tenant=tenant,
            config=config,
            budget=seconds,
            cluster=cluster,
            progress=None if as_json else _teller(),
        )
    if as_json:
        print_json(report.as_dict())
    else:
        if sys.stderr.isatty():
            typer.echo(err=True)
        typer.echo(
            f"{report.refined} segment(s) refined, {report.kept} kept as they were, {report.earlier} done before, "
            f"{report.left} left, in {report.seconds:.0f} s"
        )
        if report.refined + report.kept:
            typer.echo(
                f"held-out divergence, mean: {report.before:.3f} before, {report.after:.3f} after (nats a token)"
            )
        for failure in report.failed:
            typer.echo(f"failed: {safe(failure.source)}: {safe(failure.reason)}", err=True)
    if report.failed:
        raise typer.Exit(1)


def _teller() -> Callable[[RefineProgress], None]:
    """Says on stderr what was done: on one line where that is a terminal."""
    rewrites = sys.stderr.isatty()

    def tell(progress: RefineProgress) -> None:
        one = progress.divergence
        minutes = progress.seconds_left / 60
        text = (
            f"{progress.done} of {progress.total}  {safe(progress.document)[-40:]}  divergence {one.before:.3f} -> "
            f"{one.after:.3f}  {minutes:.0f} min left"
        )
        typer.echo(
            f"\r\033[K{text}" if rewrites else text, err=True, nl=not rewrites or progress.done == progress.total
        )

    return tell


def steps_of(text: str) -> int:
    """A number of steps, or ``auto``.

    Raises:
        typer.BadParameter: it is neither.
    """
    if text == "auto":
        return RefineConfig.steps
    if not text.isdecimal():
        raise typer.BadParameter(f"must be a whole number of steps or 'auto', not {text!r}")
    return int(text)


def parse_seconds(text: str) -> float:
    """A time such as 90, 90s, 10m or 2h in seconds.

    Raises:
        typer.BadParameter: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if found is None or float(found[1]) <= 0:
        raise typer.BadParameter(f"must be a time above 0 such as 90, 90s, 10m or 2h, not {text!r}")
    return float(found[1]) * _UNITS[found[2]]
