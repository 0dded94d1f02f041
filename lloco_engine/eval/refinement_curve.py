r"""What refinement is worth and costs, by steps and stretch: a table over chunks of a data file.

::

    python -m lloco_engine.eval.refinement_curve FILE --passages 5 --chunks 1 --ratios 16,30 --runs 3:0,8:128 \
      --plot curve.svg
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from lloco_engine.compress.attention_matching import AttentionMatching
from lloco_engine.compress.refinement import refine
from lloco_engine.compress.uncompressed import Uncompressed
from lloco_engine.config import PrefixConfig, RefineConfig
from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.eval.data import JOINT, read_records
from lloco_engine.eval.plot import check_suffix
from lloco_engine.prefix import place
from lloco_engine.types import AnySegment, Segment

__all__ = ["Curve", "main"]

_RATES = ("values", "pace", "keys", "biases")
_TOGETHER = 6  # questions of a pass


class Curve:
    """Losses of gold answers without context, with all of it, and with segments of several kinds.

    Args:
        decoder: reads with its base weights.
        ratios: source tokens per slot.
        runs: kinds of refinement; the fit alone comes beside them.
    """

    def __init__(self, decoder: LocalDecoder, ratios: Sequence[float], runs: Sequence[RefineConfig]) -> None:
        self._decoder, self._ratios, self._runs = decoder, ratios, runs
        self._losses: dict[str, tuple[float, int]] = {}  # by row: sum in nats, tokens
        self._prefills: dict[str, list[float]] = {}  # by row: what it cost, in prefills of its chunk
        self._seconds: dict[str, list[float]] = {}  # by row: CPU time of all of it, the fit included
        self._held: dict[str, list[float]] = {}  # by row: divergence on what was held out

    def add(self, text: str, asked: Sequence[tuple[str, str]]) -> None:
        """Measure one chunk with its questions and gold answers."""
        decoder = self._decoder
        ids = decoder.template.text_ids(text)
        self._count("none", None, asked)
        self._count("full", Uncompressed().compress(decoder, ids, [1])[0], asked)
        began = time.process_time()
        cache = decoder.prefill(ids, room=len(ids) + len(decoder.template.repeat_ids()))
        prefill = time.process_time() - began
        for ratio in self._ratios:
            began = time.process_time()
            (fit,) = AttentionMatching().compress(decoder, ids, [ratio])
            fitting = time.process_time() - began
            self._spent(_name(ratio), fitting, prefill)
            assert isinstance(fit, Segment)
            self._count(_name(ratio), fit, asked)
            for run in self._runs:
                began, name = time.process_time(), _name(ratio, run)
                made = refine(decoder, ids, fit, run, cache)
                self._spent(name, time.process_time() - began, prefill, fitting)
                if made.divergence is not None:
                    self._held.setdefault(_name(ratio), []).append(made.divergence.before)
                    self._held.setdefault(name, []).append(made.divergence.after)
                self._count(name, made, asked)

    def _spent(self, name: str, seconds: float, prefill: float, before: float = 0.0) -> None:
        self._prefills.setdefault(name, []).append(seconds / prefill)
        self._seconds.setdefault(name, []).append(before + seconds)

    def _count(self, name: str, segment: AnySegment | None, asked: Sequence[tuple[str, str]]) -> None:
        prefix = None
        if segment is not None:
            prefix = place([segment], PrefixConfig(), template_tokens=self._decoder.template_tokens)
        total, tokens = self._losses.get(name, (0.0, 0))
        for at in range(0, len(asked), _TOGETHER):
            part = asked[at : at + _TOGETHER]
            prompts = [Prompt(question, prefix) for question, _ in part]
            for loss, many in self._decoder.answer_losses(prompts, [answer for _, answer in part]):
                total, tokens = total + loss, tokens + many
        self._losses[name] = total, tokens

    def rows(self) -> list[dict[str, float | str]]:
        """One row a kind of segment: loss a token, the share recovered of what full text is worth, means of the rest.

        ``prefills`` is CPU time over that of one prefill of the chunk: of the fit, or of the refinement alone;
        ``seconds`` the CPU time that a segment takes altogether.
        """
        loss = {name: total / tokens for name, (total, tokens) in self._losses.items()}
        gain = loss["none"] - loss["full"]
        made: list[dict[str, float | str]] = []
        for name, one in loss.items():
            row: dict[str, float | str] = {"row": name, "loss": one, "recovered": (loss["none"] - one) / gain}
            columns = {"held_out": self._held, "prefills": self._prefills, "seconds": self._seconds}
            for column, by_row in columns.items():
                if values := by_row.get(name):
                    row[column] = sum(values) / len(values)
            made.append(row)
        return made

    def draw(self, path: Path) -> None:
        """Quality against offline seconds: a line for each ratio, from the fit on.

        Raises:
            ConfigError: the suffix is neither .png nor .svg.
        """
        check_suffix(path)
        from matplotlib.figure import Figure

        rows = {str(row["row"]): row for row in self.rows()}
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axes = figure.subplots()
        for ratio in self._ratios:
            names = [_name(ratio), *(_name(ratio, run) for run in self._runs)]
            points = sorted((float(rows[name]["seconds"]), float(rows[name]["recovered"]), name) for name in names)
            axes.plot(*zip(*((x, y) for x, y, _ in points), strict=True), marker="o", label=f"{ratio:g}x")
            for x, y, name in points:
                axes.annotate(name.partition(" ")[2], (x, y), (4, -9), textcoords="offset points", fontsize=7)
        axes.axhline(1, color="#767676", linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlabel("CPU seconds to make a segment")
        axes.set_ylabel("share recovered of what full text is worth")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)


def _name(ratio: float, run: RefineConfig | None = None) -> str:
    if run is None:
        return f"{ratio:g}x fit"
    own = [(name, getattr(run, name)) for name in _RATES]
    told = "".join(f", {name} {value:g}" for name, value in own if value != getattr(RefineConfig, name))
    return f"{ratio:g}x {run.steps} steps of {run.stretch or 'all'}{told}"


def _runs(text: str) -> list[RefineConfig]:
    runs = []
    for steps, stretch, *rates in (part.split(":") for part in text.split(",")):
        run = RefineConfig(steps=int(steps), stretch=int(stretch))
        runs.append(run.but(dict(zip(_RATES, map(float, rates), strict=False))))
    return runs


def main(arguments: Iterable[str] | None = None) -> None:
    """Print the table after every chunk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="JSON Lines, one document with its questions a line")
    parser.add_argument("--passages", type=int, default=1, help="documents of a chunk")
    parser.add_argument("--chunks", type=int, default=5)
    parser.add_argument("--skip", type=int, default=0, help="documents to leave out at the beginning")
    parser.add_argument("--questions", type=int, default=6, help="most questions of a document")
    parser.add_argument("--ratios", default="16,32")
    parser.add_argument(
        "--runs",
        type=_runs,
        default=_runs("4:128,8:128,16:128"),
        help=f"steps:stretch[:{'[:'.join(_RATES)}{4 * ']'}, ...; stretch 0: all",
    )
    parser.add_argument("--plot", type=Path, help="draw quality against seconds: a .png or .svg")
    parser.add_argument("--decoder", default="embedded")
    given = parser.parse_args(None if arguments is None else list(arguments))
    curve = Curve(LocalDecoder.load(given.decoder), [float(ratio) for ratio in given.ratios.split(",")], given.runs)
    records = read_records(given.data, given.skip + given.passages * given.chunks)[given.skip :]
    for at in range(0, len(records), given.passages):
        some = records[at : at + given.passages]
        asked = [(each.question, each.answers[0]) for one in some for each in one.questions[: given.questions]]
        curve.add(JOINT.join(one.text.strip() for one in some), asked)
        print(f"after {at + len(some)} documents")
        for row in curve.rows():
            shown = (f"{name} {value:.3f}" for name, value in row.items() if isinstance(value, float))
            print(f"  {row['row']:24} {'  '.join(shown)}", flush=True)
        if given.plot is not None:
            curve.draw(given.plot)


if __name__ == "__main__":
    main()
