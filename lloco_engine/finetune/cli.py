"""``lloco finetune``, ``lloco practice`` and ``lloco self-study``: teach the decoder to read compressed documents."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lloco_engine.flags import AsJSON, Device, Options, with_options

if TYPE_CHECKING:
    from lloco_engine.finetune.config import FinetuneConfig
    from lloco_engine.finetune.run import DataFile, Finetune
    from lloco_engine.finetune.train import Progress

__all__ = ["register"]

_LINE_EVERY_S = 20.0  # between lines of progress where stderr is no terminal

Store = Annotated[
    Path | None, typer.Option("--store", envvar="LLOCO_STORE", metavar="DIR", help="Folder of the store.")
]
Decoder = Annotated[
    str | None,
    typer.Option(
        "--decoder",
        envvar="LLOCO_DECODER",
        metavar="NAME",
        help="'embedded', a local folder or a hub id. Default: the store's.",
    ),
]
Tenant = Annotated[str, typer.Option("--tenant", metavar="NAME", help="Whose documents of the store.")]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command()(with_options(finetune))
    app.command("self-study")(self_study)
    app.command()(practice)


def data_files(
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", metavar="FILE", help="JSON Lines, one document with its questions a line; repeatable."),
    ] = None,
    studied: Annotated[
        list[Path] | None,
        typer.Option("--self-study", metavar="FILE", help="What `lloco self-study` wrote; repeatable."),
    ] = None,
    limit: Annotated[
        list[int] | None,
        typer.Option("--limit", metavar="DOCS", min=1, help="First documents of each --data, in the same order."),
    ] = None,
) -> list[Any]:
    """What is trained on; `typer.BadParameter` where there is nothing."""
    from lloco_engine.finetune.run import DataFile

    limits = [*(limit or []), *([None] * len(data or []))]
    files = [DataFile(path, most) for path, most in zip(data or [], limits, strict=False)]
    files += [DataFile(path, self_study=True) for path in studied or []]
    if not files:
        raise typer.BadParameter("give at least one --data or --self-study file")
    return files


def changed_preset(
    preset: Annotated[
        str, typer.Option(metavar="NAME", help="small (decoders under a billion weights) or paper (LLoCO's own).")
    ] = "small",
    learning_rate: Annotated[float | None, typer.Option(metavar="X", help="Instead of the preset's.")] = None,
    rank: Annotated[int | None, typer.Option(metavar="N", help="Instead of the preset's.")] = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", help="Instead of the preset's.")] = None,
    max_minutes: Annotated[
        float, typer.Option(metavar="M", min=0.0, help="Wall time by which the run ends well; 0 is no limit.")
    ] = 0.0,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=JSON", help="Any other setting, e.g. ratios=[8,16]; repeatable."),
    ] = None,
) -> Callable[[float | None], Any]:
    """How it is trained: the preset with changes. A store's ratio is among those trained on, unless they were named."""
    named = {"learning_rate": learning_rate, "rank": rank, "epochs": epochs, "max_minutes": max_minutes}
    changes: dict[str, Any] = {name: value for name, value in named.items() if value is not None} | _settings(setting)

    def config(ratio: float | None) -> FinetuneConfig:
        from lloco_engine.finetune.config import preset as get

        made = get(preset, **changes)
        if ratio is None or "ratios" in changes:
            return made
        return replace(made, ratios=tuple(sorted({*made.ratios, ratio})))

    return config


Files = Annotated["list[DataFile]", Options(data_files)]
Training = Annotated["Callable[[float | None], FinetuneConfig]", Options(changed_preset)]


def finetune(
    *,
    files: Files,
    store: Store = None,
    group: Annotated[str, typer.Option("--group", metavar="NAME", help="Group of the store's documents.")] = "default",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write the adapter's folder here, without a store.")
    ] = None,
    config: Training,
    max_document_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Leave longer documents out.")
    ] = None,
    begin_with: Annotated[
        Path | None,
        typer.Option("--from", metavar="DIR", help="An adapter to go on from: of the same rank, of no other targets."),
    ] = None,
    refine: Annotated[
        int, typer.Option(metavar="N", min=0, help="With --out: steps of refinement for each segment that is read.")
    ] = 0,
    work: Annotated[
        Path | None, typer.Option("--work", metavar="DIR", help="The run's own folder, if not beside what it makes.")
    ] = None,
    tenant: Tenant = "",
    decoder: Decoder = None,
    device: Device = None,
    as_json: AsJSON = False,
) -> None:
    """Train a LoRA adapter that reads compressed documents.

    With --store, the adapter becomes the newest version of its group's, and
    answers questions whose hits are of that group; documents that are in the
    store are read from its segments. With --out, a folder is written. A run
    that was cut off goes on from its last checkpoint with the same command.

    \b
    Examples:
      lloco finetune --store work --data questions.jsonl --group law
      lloco finetune --store work --self-study studied.jsonl --group law --max-minutes 60
      lloco finetune --data a.jsonl --data b.jsonl --out adapter --preset paper
    """
    if (store is None) == (out is None):
        raise typer.BadParameter("give --store, to tune for a store's group, or --out, to write a folder")
    common = {"group": group, "longest": max_document_tokens, "start": begin_with}
    if out is not None:
        _for_folder(out, files, config(None), common, refine, work, decoder, device, as_json)
        return
    assert store is not None
    if refine:
        raise typer.BadParameter(
            "goes with --out; a store says itself how its segments are made", param_hint="--refine"
        )
    _for_store(store, files, config, {**common, "tenant": tenant, "work": work}, decoder, device, as_json)


def _for_store(
    store: Path,
    files: Sequence[DataFile],
    config: Callable[[float | None], FinetuneConfig],
    options: dict[str, Any],
    decoder: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    from lloco_engine.adapters.loading import DEFAULT
    from lloco_engine.adapters.routing import GROUP
    from lloco_engine.engine import Engine
    from lloco_engine.finetune.run import finetune_store

    with Engine.open(store, decoder=decoder, create=False, device=device or _own_device()) as engine:
        with _shown(as_json) as progress:
            made = config(engine.manifest.ratio)
            kept = finetune_store(engine, files, made, told=_told(as_json), progress=progress, **options)
        group = options["group"]
        tagged = any((info.metadata.get(GROUP) or DEFAULT) == group for info in engine.documents(options["tenant"]))
    if as_json:
        typer.echo(json.dumps({"group": kept.group, "version": kept.version, "manifest": kept.manifest.to_json()}))
    else:
        typer.echo(f"group {kept.group} is answered by version {kept.version}: {_outcome(kept.manifest.metrics)}")
    if not tagged:
        typer.echo(
            f"note: no document of the store is of group {group!r}, so only --adapter {group} uses it; "
            f"`lloco ingest --group {group}` says which are",
            err=True,
        )


def _for_folder(
    out: Path,
    files: Sequence[DataFile],
    config: FinetuneConfig,
    options: dict[str, Any],
    refine: int,
    work: Path | None,
    decoder: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    from lloco_engine.chunking import Chunker
    from lloco_engine.compress import registry
    from lloco_engine.config import CompressConfig, RefineConfig
    from lloco_engine.decoder.local import LocalDecoder
    from lloco_engine.finetune.run import Finetune

    loaded = LocalDecoder.load(decoder or "embedded", device=device or _own_device())
    chunker = Chunker(loaded.tokenizer, text_ids=loaded.template.text_ids)
    compressor = registry.get(CompressConfig.name, **RefineConfig(steps=refine).settings)
    run = Finetune(loaded, compressor, chunker, files, config, **options)
    _told(as_json)(run)
    with _shown(as_json) as progress:
        manifest = run.run(out, work or out.with_name(f".{out.name}.work"), progress)
    typer.echo(json.dumps(manifest.to_json()) if as_json else f"written to {out}: {_outcome(manifest.metrics)}")


def self_study(
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="JSON Lines file to write.", show_default=False)],
    store: Annotated[
        Path, typer.Option("--store", envvar="LLOCO_STORE", metavar="DIR", help="Folder of the store.")
    ] = Path("lloco-store"),
    group: Annotated[str | None, typer.Option("--group", metavar="NAME", help="Only documents of this group.")] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="CHUNKS", min=1, help="Only the first chunks.")
    ] = None,
    per_kind: Annotated[int, typer.Option(metavar="N", min=1, help="Questions of each kind tried over a chunk.")] = 1,
    gain: Annotated[
        float, typer.Option(metavar="NATS", help="By how much a token the text must make an answer likelier.")
    ] = 0.3,
    seed: Annotated[int, typer.Option("--seed", help="Of the questions' sampling.")] = 0,
    tenant: Tenant = "",
    decoder: Decoder = None,
    device: Device = None,
    as_json: AsJSON = False,
) -> None:
    """Let the decoder ask and answer over the store's chunks, for finetune.

    For where there are no questions to train on. Questions of several kinds
    are asked; those asked before are dropped, and those whose answer the text
    does not make likelier. A run that was cut off goes on where it stopped.

    \b
    Examples:
      lloco self-study --store work --group law --out studied.jsonl
      lloco finetune --store work --self-study studied.jsonl --group law
    """
    from lloco_engine.adapters.loading import DEFAULT
    from lloco_engine.adapters.routing import GROUP
    from lloco_engine.engine import Engine
    from lloco_engine.finetune.self_study import SelfStudy, SelfStudyConfig

    config = SelfStudyConfig(per_kind=per_kind, gain=gain, seed=seed)
    with Engine.open(store, decoder=decoder, create=False, device=device) as engine:
        infos = [i for i in engine.documents(tenant) if group in (None, i.metadata.get(GROUP) or DEFAULT)]
        chunks = [chunk for info in infos for chunk in engine.store.chunks(info.doc_id, info.tenant)][:limit]

        def progress(done: int, total: int) -> None:
            if not as_json:
                typer.echo(f"chunk {done} of {total}", err=True)

        report = SelfStudy(engine.local_decoder, config, progress).run(chunks, out)
    if as_json:
        typer.echo(json.dumps(report))
        return
    typer.echo(
        f"kept {report['questions_kept']} of {report['questions_tried']} questions over {report['chunks']} chunks, "
        f"in {out}"
    )
    for reason, count in report["dropped"].items():
        typer.echo(f"dropped, {reason}: {count}")


def practice(
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            metavar="FILE",
            help="JSON Lines, one document with its questions a line; repeatable.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="JSON Lines file to write.", show_default=False)],
    fact_every: Annotated[
        int, typer.Option(metavar="CHARS", help="Characters of text to a sown fact, at least one a text; 0: none.")
    ] = 1500,
    choices: Annotated[float, typer.Option(metavar="SHARE", help="Questions that become multiple choice.")] = 0.3,
    seed: Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")] = 0,
    as_json: AsJSON = False,
) -> None:
    """Make practice in reading of questions and documents, for finetune.

    Facts about invented places are sown into the texts and asked for, and some
    of the questions become multiple choice, by an option's text or its letter.
    The decoder is not needed, and the questions are not checked by anyone.

    \b
    Examples:
      lloco practice --data questions.jsonl --out practice.jsonl
      lloco practice --data meetings.jsonl --fact-every 6000 --out practice.jsonl
      lloco finetune --data practice.jsonl --out adapter
    """
    from lloco_engine.finetune.practice import PracticeConfig, practise, write
    from lloco_engine.readers.records import read_records

    config = PracticeConfig(fact_every=fact_every, choices=choices, seed=seed)
    records = [record for path in data for record in read_records(path)]
    report = write(out, practise(records, config))
    typer.echo(
        json.dumps(report)
        if as_json
        else f"{report['documents']} documents with {report['questions']} questions, {report['facts']} of them about "
        f"sown facts and {report['choices']} multiple choice, in {out}"
    )


def _own_device() -> str | None:
    """This process's GPU, where `accelerate launch` has begun one process for each."""
    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return None


def _settings(pairs: list[str] | None) -> dict[str, Any]:
    made = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        try:
            if not equals:
                raise ValueError("there is no '='")
            made[name.strip()] = json.loads(value)
        except ValueError as error:
            raise typer.BadParameter(f"must be NAME=JSON, not {pair!r} ({error})", param_hint="--set") from error
    return made


def _outcome(metrics: dict[str, Any]) -> str:
    if metrics["held_out_loss"] is None:
        return f"{metrics['updates']} updates, nothing held out"
    return (
        f"loss on {metrics['held_out_documents']} held-out documents {metrics['held_out_loss_before']:.3f} -> "
        f"{metrics['held_out_loss']:.3f} after update {metrics['best_update']} of {metrics['updates']}"
    )


def _told(as_json: bool) -> Callable[[Finetune], None]:
    def tell(run: Finetune) -> None:
        if not as_json:
            typer.echo(
                ", ".join(f"{name.replace('_', ' ')}: {count:,}" for name, count in run.summary.items()), err=True
            )

    return tell


@contextmanager
def _shown(as_json: bool) -> Iterator[Callable[[Progress], None] | None]:
    """Progress on stderr: a bar on a terminal, else a line now and then."""
    if as_json:
        yield None
        return
    if not sys.stderr.isatty():
        last = 0.0

        def lines(at: Progress) -> None:
            nonlocal last
            if time.monotonic() - last >= _LINE_EVERY_S or at.step == at.steps:
                last = time.monotonic()
                typer.echo(_line(at), err=True)

        yield lines
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda at: bar.update(task, description=_line(at), completed=at.step, total=at.steps)


def _line(at: Progress) -> str:
    held = "" if at.held_out is None else f", held out {at.held_out:.3f}"
    return (
        f"update {at.step} of {at.steps}: loss {at.loss:.3f}{held}, {at.tokens_per_s:.0f} tokens/s, "
        f"{at.seconds_left / 60:.1f} min left"
    )
