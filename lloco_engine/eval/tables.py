"""Markdown tables of results: what ``lloco eval``, ``bench``, ``memories`` and ``scores`` wrote with ``--json``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["HEADLINES", "KINDS", "answered", "bench", "evaluations", "kind_of", "memories", "scores"]

Result = Mapping[str, Any]

METHODS = {
    "none": "no context",
    "full": "full text",
    "text_slots": "as much text, the best windows",
    "text_slots_retrieved": "as much text, the best windows of the best chunks",
    "text_retrieved": "text, retrieved",
    "kv": "compact KV",
    "kv_guided": "compact KV, search weighing in",
    "kv_retrieved": "compact KV, retrieved",
    "kvzip": "KVzip's eviction",
    "kvzip_retrieved": "KVzip's eviction, retrieved",
    "snapkv": "SnapKV's eviction",
    "snapkv_retrieved": "SnapKV's eviction, retrieved",
}
SCORES = {
    "f1": "F1",
    "em": "exact match",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "rouge_geometric": "geometric mean",
    "accuracy": "accuracy, likelihood",
    "accuracy_generated": "accuracy, generated",
    "success": "success",
}
HEADLINES = ("f1", "rouge_1", "rouge_2", "rouge_l", "accuracy", "success")  # scores whose differences are shown
_BASELINES = ("none", "full", "text_retrieved")
# settings that tell runs of one task apart: a column each where the runs of a table differ
_APART = {
    "passages_per_chunk": ("passages a chunk", 1),
    "segments": ("segments", 1),
    "beams": ("beams", 1),
    "dtype": ("numbers on disk", "float16"),
}


def evaluations(results: Sequence[Result], shown: Sequence[str] | None = None) -> Iterator[str]:
    """One table of the rows of one or more evaluations, and what each row is worth beside its baselines.

    Args:
        results: of one decoder. Settings in which they differ become columns.
        shown: scores that have a column, None for all that were taken.
    """
    configs = [result["config"] for result in results]
    apart = {name: how for name, how in _APART.items() if len({config.get(name, how[1]) for config in configs}) > 1}
    sizes = {(row["documents"], row["questions"]) for result in results for row in result["results"]}
    counts = ["documents", "questions"] if len(sizes) > 1 else []
    taken = [name for name in SCORES if any(row.get(name) is not None for r in results for row in r["results"])]
    scores = [name for name in taken if shown is None or name in shown]
    hints = any(hints_of(row, result["config"]) for result in results for row in result["results"])

    def start(each: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
        return [
            *(str(config.get(name, default)) for name, (_, default) in apart.items()),
            METHODS.get(each["method"], each["method"]),
            adapter_of(each["adapter"]),
            *([", ".join(hints_of(each, config)) or "-"] if hints else []),
            "-" if each["ratio"] is None else f"{each['ratio']:g}x",
        ]

    first = [
        *(title for title, _ in apart.values()),
        "the decoder reads",
        "adapter",
        *(["hints"] if hints else []),
        "ratio",
    ]
    costs = ["text tokens", "slots", "source tokens"]
    yield table(
        [*first, "loss", "recovered", *(SCORES[name] for name in scores), *counts, *costs],
        [
            [
                *start(row, result["config"]),
                *(_bounded(row, name) for name in ("loss", "recovered", *scores)),
                *(number(row[name], 0) for name in (*counts, "prompt_tokens", "prompt_slots", "source_tokens")),
            ]
            for result in results
            for row in result["results"]
        ],
    )
    compared = ["loss", *(name for name in HEADLINES if name in scores)]
    lines = [
        [
            *start(each, result["config"]),
            f"{METHODS[each['against']['method']]}, adapter {adapter_of(each['against']['adapter'])}",
            *(_difference(each["metrics"].get(name)) for name in compared),
        ]
        for result in results
        for each in result.get("differences", ())
        if each["method"] not in _BASELINES
    ]
    if lines:
        yield "A row less a baseline, paired by document (of loss, below 0 is better; clear of 0 in bold):"
        yield table([*first, "less", *(SCORES.get(name, name) for name in compared)], lines)
    notes = dict.fromkeys(note for config in configs for note in config.get("notes", ()))
    if notes:
        yield "\n".join(f"* {note}" for note in notes)


def hints_of(row: Mapping[str, Any], config: Mapping[str, Any]) -> Sequence[str]:
    """What helped a row's answers beside what the decoder read: none where no answers were generated."""
    if "hints" in row:
        return tuple(row["hints"])
    searched = row["method"].endswith("_guided") or (row["method"].endswith("_retrieved") and row["ratio"] is not None)
    if not searched or row["method"].startswith("text") or not config.get("answers") or config.get("beams", 1) > 1:
        return ()
    if "hints" in config:
        return tuple(config["hints"])
    return ("spelling", "pointing") if config.get("pointing", 1) else ("spelling",)  # always on, once


def adapter_of(name: str) -> str:
    """An adapter's name without the digits of its content."""
    return name.partition("@")[0]


def bench(result: Result) -> Iterator[str]:
    """What a bench measured, by the length of the source and as a whole."""
    details = result["details"]
    whole, text = details.get("whole", {}), details.get("in_context", {})
    memory = details.get("peak_memory_mb_by_phase", {})
    yield answered(details)
    if whole:
        columns: dict[str, Callable[[str], str]] = {
            "source tokens, all of them read": lambda length: f"{int(length):,}",
            "slots": lambda length: number(whole[length].get("prompt_slots"), 0),
            "first token, s": lambda length: number(whole[length].get("ttft_s"), 3),
            "over no context": lambda length: number(whole[length].get("ttft_over_no_context"), 2),
            "in context, s": lambda length: number(text.get(length, {}).get("ttft_s"), 1),
            "tokens a second": lambda length: number(whole[length].get("tokens_per_s"), 0),
            "over no context, decoding": lambda length: number(whole[length].get("decode_over_no_context"), 2),
            "peak memory, MB": lambda length: number(memory.get(f"whole_{length}"), 0),
            "in context, MB": lambda length: number(memory.get(f"in_context_{length}"), 0),
        }
        yield table(list(columns), [[value(length) for value in columns.values()] for length in whole])
    lines = [
        [name.replace("_", " "), _figure(value)] for name, value in result.items() if not isinstance(value, Mapping)
    ]
    retrieved = details.get("retrieved", {})
    names = (
        "ttft_over_no_context_cold",
        "ttft_over_no_context_with_embedding",
        "decode_over_no_context_without_lookup",
        "segments",
        "prompt_slots",
    )
    lines += [[f"retrieved: {name.replace('_', ' ')}", _figure(retrieved[name])] for name in names if name in retrieved]
    generate = details.get("transformers_generate", {})
    if "ratio_without_lookup" in generate:
        lines.append(
            ["decode over transformers generate, without guessing ahead", _figure(generate["ratio_without_lookup"])]
        )
    for dtype, sizes in details.get("bytes_per_source_token", {}).items():
        lines.append([f"bytes on disk per source token, {dtype}", _figure(sizes["store"])])
    yield table(["measured", "value"], lines)


def answered(details: Mapping[str, Any]) -> str:
    """How the answers of a bench were made."""
    if "settings" not in details:  # of a bench that measured the decoder, and not the engine
        aside = "only beside transformers' `generate` are tokens guessed ahead"
        return f"Of base weights, with no adapter and no hints; {aside}."
    made = details["settings"]
    generate, prefix = made["generate"], made["prefix"]
    return (
        f"Answered as the engine does by default: adapter {adapter_of(made['adapter'])}, guesses ahead "
        f"{'on' if generate['lookup'] else 'off'}, hints {', '.join(generate['hints']) or 'none'}, focus "
        f"{prefix['focus']}, relevance {prefix['relevance']:g}."
    )


def memories(result: Result) -> Iterator[str]:
    """What compact KV and summary embeddings cost beside each other."""
    dtypes = list(result["rows"][0]["bytes_per_segment"])
    yield table(
        ["memory", "slots", *(f"bytes, {dtype}" for dtype in dtypes), "bytes per source token",
         "first token over no context", "compressing, s"],
        [
            [
                row["memory"],
                number(row["slots_per_segment"], 0),
                *(number(row["bytes_per_segment"][dtype], 0) for dtype in dtypes),
                number(row["bytes_per_source_token"]["float16"], 1),
                number(row["ttft_over_no_context"], 2),
                number(row["compress_s_per_segment"], 1),
            ]
            for row in result["rows"]
        ],
    )  # fmt: skip
    large = {name: value for name, value in result["llama_2_7b"].items() if name != "note"}
    yield "Bytes of one segment's numbers for the shape of Llama-2-7B, computed and not measured:"
    yield table([name.replace("_", " ") for name in large], [[number(value, 0) for value in large.values()]])


def scores(result: Result) -> Iterator[str]:
    """Which best scores answered and unanswerable questions have, and how follow-ups are found."""
    yield table(
        ["questions", "answered there", "number", "lowest", "median", "highest", f"below {result['floor']:g}"],
        [
            [
                row["questions"],
                "yes" if row["answered"] else "no",
                number(row["count"], 0),
                *(number(row[name], 2) for name in ("lowest", "median", "highest")),
                number(row["below_floor"], 0),
            ]
            for row in result["rows"]
        ],
    )
    yield table(
        ["asked", "searched", "number", "right document first", "answer among 4"],
        [
            [
                row["questions"],
                row["searched"],
                *(number(row[name], 0) for name in ("count", "document_first", "evidence_in_4")),
            ]
            for row in result["follow_ups"]
        ],
    )


KINDS: dict[str, tuple[str, ...]] = {  # what tells the kinds of results apart
    "eval": ("results", "config"),
    "bench": ("details",),
    "memories": ("rows", "llama_2_7b"),
    "scores": ("rows", "follow_ups"),
}


def kind_of(value: object) -> str | None:
    """The command whose result a value is, None where it is none."""
    if not isinstance(value, dict):
        return None
    return next((kind for kind, names in KINDS.items() if all(name in value for name in names)), None)


def circumstances(result: Result) -> str:
    """Where and when a result was measured, empty where it does not depend on the machine."""
    values = next((result[name] for name in ("config", "details") if "hardware" in result.get(name, {})), result)
    hardware, versions = values.get("hardware"), values.get("versions", {})
    if not hardware:
        return ""
    where = hardware.get("accelerator") or hardware.get("processor", "unknown machine")
    used = ", ".join(f"{name} {version}" for name, version in versions.items() if name in ("lloco", "torch"))
    made = f"On {where}, threads: {hardware.get('threads', '?')}, {hardware.get('dtype', '?')}"
    return f"{made}; {used}; {values.get('date', 'no date')}."


def about(results: Sequence[Result]) -> str:
    """What evaluations are of."""
    config, row = results[0]["config"], results[0]["results"][0]
    return (
        f"Task {config.get('task', 'plain')}, {row['questions']:,} questions about {row['documents']:,} documents. "
        f"Decoder {Path(config['decoder']['name']).name}, compressor {config['compressor']['name']}."
    )


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def number(value: Any, digits: int) -> str:
    """A number as it is shown, "-" for none."""
    if value is None:
        return "-"
    return f"{value:,.{digits}f}" if isinstance(value, int | float) else str(value)


def _bounded(row: Mapping[str, Any], name: str) -> str:
    shown, bounds = number(row.get(name), 3), row.get("intervals", {}).get(name)
    return shown if bounds is None else f"{shown} [{bounds[0]:.3f}, {bounds[1]:.3f}]"


def _difference(taken: Mapping[str, Any] | None) -> str:
    if taken is None:
        return "-"
    shown, bounds = f"{taken['difference']:+.3f}", taken["interval"]
    if bounds is None:
        return shown
    shown += f" [{bounds[0]:+.3f}, {bounds[1]:+.3f}]"
    return f"**{shown}**" if bounds[0] > 0 or bounds[1] < 0 else shown


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return number(value, 0)
