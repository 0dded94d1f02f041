"""``lloco data``: published data sets into the records that ``lloco eval`` and ``lloco finetune`` read."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lloco_engine.eval.published import NAMES
from lloco_engine.flags import AsJSON

__all__ = ["data"]


def data(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of {', '.join(NAMES)}.")],
    source: Annotated[
        Path | None, typer.Argument(metavar="[SOURCE]", help="Its file or folder; without one, the hub is asked.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="JSON Lines file to write.")] = Path("data.jsonl"),
    split: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which part. Default: the one to evaluate on.")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="DOCS", min=1, help="Write only the first documents.")] = None,
    as_json: AsJSON = False,
) -> None:
    """Turn a published data set into records, one document with its questions a
    line.

    \b
    What is read:
      quality          QuALITY v1.0.1: QuALITY.v1.0.1.htmlstripped.SPLIT, or its folder
      qasper, qmsum,   SCROLLS: SPLIT.jsonl of {id, pid, input, output}, or its folder;
      narrative_qa     without SOURCE, tau/scrolls on the hub
      hotpotqa         hotpot_dev_distractor_v1.json, or the folder with it
      narrativeqa_csv  the folder with documents.csv, qaps.csv, summaries.csv and the stories

    A bad record is named on stderr and left out; then the exit code is 1.

    \b
    Examples:
      lloco data quality QuALITY.v1.0.1.htmlstripped.dev --out quality.jsonl
      lloco data qmsum scrolls/qmsum --split train --out qmsum-train.jsonl
      lloco data qasper --out qasper.jsonl
      lloco data narrativeqa_csv narrativeqa --split valid --limit 20 --out narrativeqa.jsonl
    """
    from lloco_engine.atomic import open_file
    from lloco_engine.eval.machine import check_writable
    from lloco_engine.eval.published import Bad, get

    published = get(name)
    split = split or next(part for part in published.splits if part != "train")
    if split not in published.splits:
        raise typer.BadParameter(f"must be one of {', '.join(published.splits)}, not {split!r}", param_hint="--split")
    check_writable(out)
    place = source if source is not None else published.fetch(split)
    documents = questions = skipped = 0
    with open_file(out) as lines:
        for item in published.read(place, split):
            if isinstance(item, Bad):
                skipped += 1
                typer.echo(f"skipped: {item.reason}", err=True)
            elif limit is None or documents < limit:
                documents, questions = documents + 1, questions + len(item.questions)
                lines.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")
    if as_json:
        typer.echo(json.dumps({"documents": documents, "questions": questions, "skipped": skipped, "out": str(out)}))
    else:
        typer.echo(
            f"{documents:,} documents with {questions:,} questions written to {out}, {skipped:,} records skipped"
        )
    if skipped:
        raise typer.Exit(1)
